"""Which class is taken for which: a matrix of counts, background included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_rcnn.evaluation.matching import CocoProblem, match

BACKGROUND = "background"


@dataclass(frozen=True)
class Confusion:
    """Counts of C classes and, last, the background.

    Attributes:
        names: C + 1 names.
        counts: (C + 1, C + 1) int64. Rows are what is there, columns what was detected: the last column counts objects
            that no detection found, the last row detections that found no object; its own corner is 0.
    """

    names: tuple[str, ...]
    counts: np.ndarray

    def occurring(self) -> Confusion:
        """Without the classes that are neither there nor detected."""
        kept = [i for i in range(len(self.names) - 1) if self.counts[i].any() or self.counts[:, i].any()]
        kept.append(len(self.names) - 1)
        return Confusion(tuple(self.names[i] for i in kept), self.counts[np.ix_(kept, kept)])

    def rows(self) -> list[list[str]]:
        """The matrix as a table with a header."""
        header = ["truth \\ detected", *self.names]
        return [header, *([name, *map(str, counts)] for name, counts in zip(self.names, self.counts.tolist()))]

    def mistaken(self, most: int = 3) -> list[str]:
        """The commonest mistakes of one class for another, such as "'cat' is detected as 'dog' (12 of 14)"."""
        classes = self.counts[:-1, :-1] * (1 - np.eye(len(self.names) - 1, dtype=np.int64))
        order = np.argsort(-classes, axis=None, kind="stable")[:most]
        pairs = [np.unravel_index(flat, classes.shape) for flat in order]
        return [
            f"'{self.names[truth]}' is detected as '{self.names[found]}' ({classes[truth, found]} of "
            f"{self.counts[truth].sum()})"
            for truth, found in pairs
            if classes[truth, found] > 0
        ]


def confusion(problem: CocoProblem, class_names: Sequence[str], thresholds: Mapping[int, float]) -> Confusion:
    """The confusion of one problem.

    Detections with at least their class's threshold are matched with objects of any class: in order of score, each
    takes the free object that it is most similar to, from 0.5 on. Those most similar to an ignore region are left out.
    """
    matches = match(problem, by_class=False).above(thresholds)
    background = len(class_names)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for index, found in zip(matches.classes, matches.found):
        counts[matches.object_classes[found] if found >= 0 else background, index] += 1
    missed = np.ones(len(matches.object_classes), dtype=bool)
    missed[matches.found[matches.found >= 0]] = False
    np.add.at(counts, (matches.object_classes[missed], background), 1)
    return Confusion((*class_names, BACKGROUND), counts)


def added(matrices: Sequence[Confusion]) -> Confusion:
    """The sum of matrices over the same classes."""
    return Confusion(matrices[0].names, np.sum([matrix.counts for matrix in matrices], axis=0))
