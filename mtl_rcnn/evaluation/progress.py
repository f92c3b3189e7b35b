"""One line that says how far a loop over images is: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

logger = logging.getLogger(__name__)


class Progress:
    """Counts images; use as a context.

    Args:
        title: what is being done, such as "evaluating shapes_val".
        total: images to come; None if nobody knows.
        enabled: False on all ranks but one.
        period: seconds between log lines when there is no terminal.
        console: where the bar is drawn; decides whether there is a terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        enabled: bool = True,
        period: float = 5.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.period, self.clock = title, total, period, clock
        self.done = 0
        self._enabled = enabled
        console = console or Console()
        self._bar = _bar(console) if enabled and console.is_terminal else None

    def __enter__(self) -> Progress:
        self._start = self._last = self.clock()
        if self._bar is not None:
            self._bar.start()
            self._job = self._bar.add_task(self.title, total=self.total, rate=0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._enabled and kind is None:
            logger.info("%s: %d images in %s, %.1f img/s", self.title, self.done, clock_text(self.seconds), self.rate)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self.clock() - self._start

    @property
    def rate(self) -> float:
        """Images per second since the start."""
        return self.done / max(self.seconds, 1e-9)

    def advance(self, images: int) -> None:
        """Counts some more images, and shows it if it is time to."""
        self.done += images
        if self._bar is not None:
            self._bar.update(self._job, advance=images, rate=self.rate)
        elif self._enabled and self.clock() - self._last >= self.period:
            self._last = self.clock()
            logger.info("%s", self.line())

    def line(self) -> str:
        """Such as "evaluating shapes_val: 120/500 images, 8.3 img/s, ETA 0:00:46"."""
        if self.total is None:
            return f"{self.title}: {self.done} images, {self.rate:.1f} img/s"
        left = max(self.total - self.done, 0) / max(self.rate, 1e-9)
        return f"{self.title}: {self.done}/{self.total} images, {self.rate:.1f} img/s, ETA {clock_text(left)}"


def clock_text(seconds: float) -> str:
    """Such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _bar(console: Console) -> Bar:
    rate = TextColumn("{task.fields[rate]:.1f} img/s")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TextColumn("ETA")
    return Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
