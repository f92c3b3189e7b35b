"""What a canvas draws lies where the numbers say, stays readable, and leaves the rest of the image alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from mtl_rcnn.visualize.canvas import Canvas, color_of

GREY = 100
RED, GREEN = (255, 0, 0), (0, 255, 0)


def grey(height=300, width=420):
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def changed(image):
    """(H, W) bool: pixels that are no longer grey."""
    return (image != GREY).any(axis=2)


def close(image, color, tolerance=60):
    return np.abs(image.astype(int) - color).max(axis=2) <= tolerance


def test_colors_are_stable_and_neighbours_differ():
    colors = [color_of(index) for index in range(24)]
    assert colors == [color_of(index) for index in range(24)]
    assert all(0 <= channel <= 255 for color in colors for channel in color)
    for first, second in pairwise(colors):
        assert np.abs(np.subtract(first, second)).sum() > 150


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((100, 200), {}, (400, 800)),
        ((10, 10), {}, (160, 160)),
        ((480, 640), {}, (480, 640)),
        ((480, 640), {"scale": 0.5}, (240, 320)),
        ((100, 200), {"scale": 1.0}, (100, 200)),
    ],
)
def test_small_images_are_enlarged(size, options, expected):
    assert Canvas(grey(*size), **options).image.shape == (*expected, 3)


def test_the_image_given_is_not_drawn_on():
    image = grey()
    canvas = Canvas(image, scale=1.0)
    canvas.box([10, 10, 50, 50], "label", RED)
    canvas.mask(np.ones(image.shape[:2], dtype=bool), GREEN)
    assert not changed(image).any()
    assert changed(canvas.image).any()


def test_a_box_is_an_outline_at_its_place_and_scale():
    canvas = Canvas(grey(100, 100), scale=3.0)
    canvas.box(torch.tensor([20.0, 40.0, 60.0, 80.0]), color=RED)
    image = canvas.image
    for y, x in ((120, 120), (240, 120), (180, 60), (180, 180)):
        assert close(image[y - 1 : y + 1, x - 1 : x + 1], RED).any(), (y, x)
    assert not changed(image)[126:234, 66:174].any()
    assert not changed(image)[:110].any()


def test_labels_stay_inside_and_keep_off_each_other():
    canvas = Canvas(grey(), scale=1.0)
    for color in (RED, GREEN, (0, 0, 255)):
        canvas.box([-20, -20, 90, 60], "person 98%", color)
    image = canvas.image
    plates = [close(image, np.multiply(color, 0.8) + 20, 15).sum() for color in (RED, GREEN, (0, 0, 255))]
    assert min(plates) > 500, "each label has its own visible plate"


@pytest.mark.parametrize(("color", "ink"), [((255, 255, 80), 0), ((40, 20, 160), 255)])
def test_text_contrasts_with_its_plate(color, ink):
    canvas = Canvas(grey(), scale=1.0)
    canvas.box([100, 100, 250, 250], "WWWWWW", color)
    plate = canvas.image[80:99, 103:160].astype(int)
    luminance = plate @ [0.299, 0.587, 0.114]
    assert abs(luminance - ink).min() < 40


def test_captions_are_stacked_in_the_corner():
    canvas = Canvas(grey(), scale=1.0)
    canvas.caption("one")
    first = changed(canvas.image).sum(axis=0)[5]
    canvas.caption("two")
    assert changed(canvas.image).sum(axis=0)[5] == 2 * first


def test_a_mask_tints_its_pixels_only():
    mask = torch.zeros(100, 120, dtype=torch.bool)
    mask[20:60, 30:90] = True
    canvas = Canvas(grey(100, 120), scale=2.0)
    canvas.mask(mask, GREEN, alpha=0.5)
    image = canvas.image
    assert (image[60, 100] == [50, 177, 50]).all()
    assert not changed(image)[:38].any()
    assert not changed(image)[:, 184:].any()
    empty = Canvas(grey(100, 120))
    empty.mask(torch.zeros(100, 120, dtype=torch.bool), GREEN)
    assert not changed(empty.image).any()


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"expected a mask of the image's size \(100, 120\), got \(120, 100\)"):
        Canvas(grey(100, 120)).mask(np.ones((120, 100), dtype=bool))


def test_keypoints_under_the_threshold_and_their_edges_are_left_out():
    points = torch.tensor([[50.0, 50.0, 0.9], [150.0, 50.0, 0.8], [150.0, 150.0, 0.05]])
    canvas = Canvas(grey(200, 200), scale=1.0)
    canvas.skeleton(points, [(0, 1), (1, 2)], RED, threshold=0.1)
    drawn = changed(canvas.image)
    assert close(canvas.image[47:53, 100:101], RED).any(), "the edge of two visible points"
    assert not drawn[65:].any(), "neither the third point nor its edge"


def test_nothing_visible_draws_nothing():
    canvas = Canvas(grey())
    canvas.skeleton(torch.zeros(5, 3), [(0, 1)], RED)
    canvas.skeleton(np.zeros((0, 3)), [], RED)
    assert not changed(canvas.image).any()


def test_coordinates_far_outside_do_no_harm():
    canvas = Canvas(grey(), scale=1.0)
    canvas.box([-1e9, -1e9, 1e9, 1e9], "far", RED)
    canvas.skeleton(torch.tensor([[1e9, 1e9, 1.0], [10.0, 10.0, 1.0]]), [(0, 1)], RED)
    assert canvas.image.shape == (300, 420, 3)


def test_a_raster_covers_the_image():
    canvas = Canvas(grey(50, 50), scale=2.0)
    canvas.raster(np.full((50, 50, 3), 200, dtype=np.uint8), alpha=0.5)
    assert (canvas.image == 150).all()


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_not_an_image_is_an_error(image):
    with pytest.raises(ValueError, match=r"expected an image \(H, W, 3\) of uint8"):
        Canvas(image)


def test_a_note_lies_below_its_box_and_a_label_above():
    canvas = Canvas(grey(), scale=1.0)
    canvas.box([60, 80, 200, 160], "label", RED)
    canvas.note([60, 80, 200, 160], "red, striped", GREEN)
    label, note = close(canvas.image, (224, 20, 20)), close(canvas.image, (20, 224, 20))
    assert note.any()
    assert np.flatnonzero(note.any(axis=1)).min() >= 160
    assert np.flatnonzero(label.any(axis=1)).min() < 80


def test_a_note_of_a_box_at_the_lower_border_stays_in_the_drawing():
    canvas = Canvas(grey(), scale=1.0)
    canvas.note([60, 200, 300, 300], "red, striped", GREEN)
    rows = np.flatnonzero(close(canvas.image, (20, 224, 20)).any(axis=1))
    assert 260 < rows.min() < rows.max() < 300


def test_captions_stand_below_each_other_on_their_colours() -> None:
    canvas = Canvas(np.full((200, 300, 3), 128, np.uint8), scale=1)
    for text, color in (("acm", (255, 0, 0)), ("gjpqy", (0, 255, 0)), ("AT", (0, 0, 255))):
        canvas.caption(text, color)
    column = canvas.image[:, 1]  # left of the letters
    tops = [int(np.flatnonzero(column[:, channel] > 200)[0]) for channel in range(3)]
    ends = [int(np.flatnonzero(column[:, channel] > 200)[-1]) for channel in range(3)]
    assert tops[0] == 0
    assert tops[1] == ends[0] + 1
    assert tops[2] == ends[1] + 1


def test_a_polygon_has_its_outline_and_its_text() -> None:
    canvas = Canvas(np.full((200, 300, 3), 90, np.uint8), scale=1.0)
    canvas.polygon([50, 80, 250, 60, 255, 110, 55, 130], color=(255, 0, 0))
    plain = canvas.image
    assert plain[69, 150].tolist() == [255, 0, 0]
    assert (plain[95, 150] == 90).all()
    canvas.polygon([50, 80, 250, 60, 255, 110, 55, 130], "0.91", (255, 0, 0))
    assert (canvas.image != plain).any(axis=(1, 2)).sum() > 8
