"""Writing beside the training: a copy of the state, and one thread that writes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

__all__ = ["BackgroundWriter", "snapshot"]

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs jobs in one thread, in order and one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job when the one before is done. Raises what that one raised: its own is then not started."""
        self._wait()
        self._job = self._thread.submit(job)

    def close(self, quiet: bool = False) -> None:
        """Waits for the last job. Raises what it raised; if `quiet`, logs it: another error is on its way."""
        try:
            self._wait()
        except Exception as error:
            if not quiet:
                raise
            logger.error("%s", error)
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.result()


def snapshot(value: Any) -> Any:
    """A copy that later steps do not change: tensors in CPU memory, containers new, everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((key, snapshot(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value
