"""Speed and memory of the training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Times the training steps alone: evaluation and checkpoints between `end` and the next `begin` do not count.

        watch.begin(); batch = next(batches); watch.batch_ready(); step(batch); watch.end()

    Args:
        images_per_iteration: size of the global batch.
        max_iter: iterations of the whole run.
        device: whose memory is told.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        images_per_iteration: int,
        max_iter: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images_per_iteration = images_per_iteration
        self.max_iter = max_iter
        self.device = device
        self._clock = clock
        self._begun = 0.0
        self._seconds = self._waited = 0.0  # since the last `timings`
        self._count = 0
        self._steady = 0.0  # of all iterations but the first, which warms up
        self._steady_count = -1

    def begin(self) -> None:
        """A step begins: it now waits for its batch."""
        self._begun = self._clock()

    def batch_ready(self) -> None:
        """The batch has come."""
        self._waited += self._clock() - self._begun

    def end(self) -> None:
        """The step is done."""
        seconds = self._clock() - self._begun
        self._seconds += seconds
        self._count += 1
        self._steady += seconds if self._steady_count >= 0 else 0.0
        self._steady_count += 1

    def timings(self, iteration: int) -> dict[str, float]:
        """What there is to tell after `iteration` steps.

        Returns:
            Of the steps since the last call: `img_per_s`, `iteration_s`, `data_share` (part of the time spent
            waiting for
            batches, in [0, 1]). Besides `memory_bytes`, the most so far (PyTorch's tensors on a GPU, else this
            process), and `eta_s`, from the mean step. Without a step only the memory.
        """
        timings: dict[str, float] = {}
        if self._seconds > 0:
            mean = self._steady / self._steady_count if self._steady_count > 0 else self._seconds / self._count
            timings = {
                "img_per_s": self.images_per_iteration * self._count / self._seconds,
                "iteration_s": self._seconds / self._count,
                "data_share": self._waited / self._seconds,
                "eta_s": mean * (self.max_iter - iteration),
            }
        self._seconds = self._waited = 0.0
        self._count = 0
        memory = _peak_memory(self.device)
        return timings if memory is None else {**timings, "memory_bytes": memory}


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return None  # no `resource` there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB
