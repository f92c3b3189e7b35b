"""Drawings side by side, on sheets and in files."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.visualize.gallery import contact_sheet, draw_prediction, side_by_side, write_image


class Fills:
    """Stands for a target: tints the whole image."""

    covers = False

    def __init__(self, color):
        self.color = color

    def draw(self, canvas, prediction):
        assert canvas.class_names == ("cat",)
        if len(prediction["boxes"]):
            canvas.mask(np.ones((canvas.height, canvas.width), dtype=bool), self.color, alpha=1.0)


def plain(height, width, value):
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_targets_draw_in_order():
    targets = [Fills((10, 20, 30)), Fills((40, 50, 60))]
    one, none = ({"boxes": torch.zeros(count, 4)} for count in (1, 0))
    drawn = draw_prediction(plain(40, 60, 7), one, targets, ["cat"], scale=2.0)
    assert drawn.shape == (80, 120, 3)
    assert (drawn[40, 60] == [40, 50, 60]).all()
    assert (draw_prediction(plain(40, 60, 7), none, targets, ["cat"], scale=2.0) == 7).all()
    captioned = draw_prediction(plain(40, 60, 7), none, targets, ["cat"], scale=2.0, caption="a.jpg")
    assert (captioned[:10, :20] != 7).any()


class Covers(Fills):
    covers = True


def test_what_covers_the_picture_gets_a_panel_beside_other_tasks():
    one = {"boxes": torch.zeros(1, 4)}
    drawn = draw_prediction(
        plain(40, 60, 7), one, [Covers((1, 2, 3)), Covers((4, 5, 6)), Fills((7, 8, 9))], ["cat"], scale=2.0
    )
    assert drawn.shape == (80, 3 * 120 + 2 * 6, 3)
    for start, color in ((0, [7, 8, 9]), (126, [4, 5, 6]), (252, [1, 2, 3])):
        assert (drawn[:, start : start + 120] == color).all()
    alone = draw_prediction(plain(40, 60, 7), one, [Covers((1, 2, 3))], ["cat"], scale=2.0)
    assert alone.shape == (80, 120, 3)
    assert side_by_side(drawn, drawn).shape[1] == drawn.shape[1], "below each other"


def test_a_sheet_has_a_cell_per_image():
    sheet = contact_sheet([plain(30, 40, 1), plain(20, 60, 2), plain(50, 10, 3)], columns=2)
    assert sheet.shape == (30 + 6 + 50 + 6, 40 + 6 + 60, 3)
    assert (sheet[:30, :40] == 1).all()
    assert (sheet[:20, 46:] == 2).all()
    assert (sheet[36:86, :10] == 3).all()
    assert (sheet[36:86, 46:] > 200).all()


def test_more_columns_than_images():
    assert contact_sheet([plain(30, 40, 1)], columns=4).shape == (36, 40, 3)


def test_truth_stands_left_of_the_prediction_under_titles():
    both = side_by_side(plain(50, 100, 1), plain(50, 100, 2))
    assert (both[26:76, :100] == 1).all()
    assert (both[26:76, 106:] == 2).all()
    assert (both[:26, :100] < 128).any(), "a title"
    assert (both[:26, 106:] < 128).any()


@pytest.mark.parametrize(
    ("images", "columns", "titles"), [([], 2, None), ([plain(2, 2, 0)], 0, None), ([plain(2, 2, 0)], 1, [])]
)
def test_a_sheet_of_nothing_is_an_error(images, columns, titles):
    with pytest.raises(ValueError, match=r"expected at least one|1 images, but 0 titles"):
        contact_sheet(images, columns, titles)


def test_an_image_file_holds_rgb_and_its_folder_is_made(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    path = write_image(tmp_path / "new" / "folder" / "a.png", rgb)
    assert (cv2.imread(str(path))[:, :, ::-1] == rgb).all()
    assert write_image(tmp_path / "b.JPG", rgb).stat().st_size > 0


def test_an_image_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(MtlRcnnError, match=r"a\.bmp: images are written as \.png, \.jpg or \.jpeg, not as \.bmp"):
        write_image(tmp_path / "a.bmp", plain(2, 2, 0))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MtlRcnnError, match=r"a\.png: cannot be written"):
        write_image(tmp_path / "file" / "a.png", plain(2, 2, 0))
