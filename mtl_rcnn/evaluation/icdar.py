"""The two protocols of the ICDAR robust reading competitions for lines of text, and the form of their results.

Both pool their counts over all images. Ground truth that says "do not care" is no loss if it is not found, and what is
found there is no false alarm.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_rcnn.evaluation.quadrilaterals import area, corners, iou, shared_area

IOU = 0.5
"""A detection matches a line from more than this polygon IoU on (2015)."""
IN_IGNORED = 0.5
"""A detection with more than this share of its area in one do-not-care region does not count (2015)."""
AREA_RECALL, AREA_PRECISION = 0.8, 0.4
"""Least shares of a line and of a detection that they have in common (2013)."""
SPLIT_CREDIT = 0.8
"""What a line found in pieces is worth, and each of its pieces (2013)."""

Polygon = Sequence[float]
"""x1, y1, ..., x4, y4 in pixels of the image."""


@dataclass
class Tally:
    """Sums over images.

    Attributes:
        lines, found: what counts of the ground truth and of the detections.
        recalled, precise: their credits.
    """

    lines: int = 0
    found: int = 0
    recalled: float = 0.0
    precise: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.lines + other.lines,
            self.found + other.found,
            self.recalled + other.recalled,
            self.precise + other.precise,
        )

    @property
    def recall(self) -> float:
        """In 0..1; 0 without lines."""
        return self.recalled / self.lines if self.lines else 0.0

    @property
    def precision(self) -> float:
        """In 0..1; 0 without detections."""
        return self.precise / self.found if self.found else 0.0

    @property
    def hmean(self) -> float:
        """Harmonic mean of both."""
        total = self.recall + self.precision
        return 2 * self.recall * self.precision / total if total else 0.0


def match_by_iou(lines: Sequence[Polygon], ignored: Sequence[bool], found: Sequence[Polygon]) -> Tally:
    """One image by the rule of ICDAR 2015, challenge 4, task 1: polygon IoU above 0.5, one to one, in file order.

    Detections with more than half of their area in a do-not-care region are dropped first. Followed is the script of
    the competition's site as it is copied in many repositories (such as MhLiao/DB, `icdar2015_eval/detection/iou.py`).
    """
    truth, guesses = [corners(line) for line in lines], [corners(polygon) for polygon in found]
    regions = [polygon for polygon, is_ignored in zip(truth, ignored) if is_ignored]
    truth = [polygon for polygon, is_ignored in zip(truth, ignored) if not is_ignored]
    guesses = [guess for guess in guesses if not any(_lies_in(guess, region) for region in regions)]
    free = set(range(len(guesses)))
    for line in truth:
        match = next((index for index in sorted(free) if iou(line, guesses[index]) > IOU), None)
        free.discard(match)
    matched = float(len(guesses) - len(free))
    return Tally(len(truth), len(guesses), matched, matched)


def match_by_areas(lines: Sequence[Polygon], ignored: Sequence[bool], found: Sequence[Polygon]) -> Tally:
    """One image by the rule of ICDAR 2013 (DetEval, Wolf and Jolion 2006) on the upright boxes around all polygons.

    One to one: a pair that overlaps nothing else, with area recall >= 0.8, area precision >= 0.4 and centres nearer
    than half the sum of the diagonals, counts fully. One to many: detections with precision >= 0.4 that together cover
    a line with recall >= 0.8 give the line and each of themselves 0.8. Many to one: lines with recall >= 0.8 that
    together give a detection precision >= 0.4 count fully, and so does the detection. Where ports of DetEval differ,
    this follows the competition's own Python script: a split or a merge needs at least two that overlap, and one of
    which a single piece passes is a pair, with full credit. Boxes are one pixel wider than the difference of their
    coordinates, as there.
    """
    truth, guesses = _boxes(lines), _boxes(found)
    spared = np.asarray(list(ignored), dtype=bool)
    shared = _shared_boxes(truth, guesses)
    recall, precision = shared / _box_areas(truth)[:, None], shared / _box_areas(guesses)[None]
    dropped = (precision[spared] > AREA_PRECISION).any(axis=0)
    state = _Matching(recall, precision, ~spared, ~dropped)
    state.pairs(_centres_near(truth, guesses))
    state.splits()
    state.merges()
    return Tally(int((~spared).sum()), int((~dropped).sum()), state.recalled, state.precise)


def submission(images: Mapping[str, Sequence[Polygon]], boxes: bool = False) -> bytes:
    """A zip file as the competition's site takes it: `res_<stem>.txt` for each image, a line per polygon.

    Args:
        images: stem of the image's file name -> polygons.
        boxes: left, top, right, bottom (2013) rather than eight coordinates (2015).
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for stem, polygons in images.items():
            rows = _boxes(polygons) if boxes else polygons
            content = "".join(",".join(str(round(value)) for value in row) + "\r\n" for row in rows)
            archive.writestr(zipfile.ZipInfo(f"res_{stem}.txt"), content)  # without a date: equal results, equal files
    return buffer.getvalue()


class _Matching:
    """Credits of one image; a line or a detection is matched once. Matrices are (lines, detections)."""

    def __init__(self, recall: np.ndarray, precision: np.ndarray, lines: np.ndarray, found: np.ndarray) -> None:
        self.recall, self.precision = recall, precision
        self.lines, self.found = lines.copy(), found.copy()  # still to be matched
        touching = (recall > 0) & lines[:, None] & found[None]
        self.pieces_of_line, self.lines_of_piece = touching.sum(axis=1), touching.sum(axis=0)
        self.recalled = self.precise = 0.0

    def pairs(self, near: np.ndarray) -> None:
        """One to one."""
        good = (self.recall >= AREA_RECALL) & (self.precision >= AREA_PRECISION)
        alone = (good.sum(axis=1) == 1)[:, None] & (good.sum(axis=0) == 1)[None]
        single = (self.pieces_of_line == 1)[:, None] & (self.lines_of_piece == 1)[None]
        for line, piece in np.argwhere(good & alone & single & near & self.lines[:, None] & self.found[None]):
            self._take([line], [piece], 1.0, 1.0)

    def splits(self) -> None:
        """One line, many detections."""
        for line in np.flatnonzero(self.lines & (self.pieces_of_line >= 2)):
            pieces = np.flatnonzero(self.found & (self.precision[line] >= AREA_PRECISION))
            if round(self.recall[line, pieces].sum(), 4) >= AREA_RECALL:
                credit = 1.0 if len(pieces) == 1 else SPLIT_CREDIT
                self._take([line], pieces, credit, credit * len(pieces))

    def merges(self) -> None:
        """Many lines, one detection."""
        for piece in np.flatnonzero(self.found & (self.lines_of_piece >= 2)):
            lines = np.flatnonzero(self.lines & (self.recall[:, piece] >= AREA_RECALL))
            if round(self.precision[lines, piece].sum(), 4) >= AREA_PRECISION:
                self._take(lines, [piece], float(len(lines)), 1.0)

    def _take(
        self, lines: Sequence[int] | np.ndarray, found: Sequence[int] | np.ndarray, recalled: float, precise: float
    ) -> None:
        self.lines[lines] = self.found[found] = False
        self.recalled += recalled
        self.precise += precise


def _lies_in(guess: np.ndarray, region: np.ndarray) -> bool:
    size = area(guess)
    return size > 0 and shared_area(guess, region) / size > IN_IGNORED


def _boxes(polygons: Sequence[Polygon]) -> np.ndarray:
    """(N, 4) left, top, right, bottom."""
    points = np.asarray(list(polygons), dtype=np.float64).reshape(-1, 4, 2)
    return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)


def _box_areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _shared_boxes(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    sides = np.minimum(one[:, None, 2:], other[None, :, 2:]) - np.maximum(one[:, None, :2], other[None, :, :2]) + 1
    return np.clip(sides, 0, None).prod(axis=2)


def _centres_near(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(lines, detections): centres nearer than half the sum of the diagonals."""
    middle = [boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2] + 1) / 2 for boxes in (one, other)]
    diagonal = [np.hypot(*(boxes[:, 2:] - boxes[:, :2] + 1).T) for boxes in (one, other)]
    distance = np.linalg.norm(middle[0][:, None] - middle[1][None], axis=2)
    return 2 * distance < diagonal[0][:, None] + diagonal[1][None]
