"""How all ranks end when one of them fails, is killed, is stopped, or no longer answers.

    with joined(cfg) as ranks:
        train(cfg, ranks)

What only somebody beside a rank can see is the part of `guard`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed as dist
from omegaconf import DictConfig

from mtl_rcnn.engine.cluster import Place, find_place
from mtl_rcnn.engine.distributed import Ranks, barrier, distributed
from mtl_rcnn.engine.guard import Guard, Post, guarded
from mtl_rcnn.engine.run import leave_in_log
from mtl_rcnn.errors import MtlRcnnError

__all__ = ["fail_together", "is_lost_connection", "joined"]

_POLL_SECONDS = 0.5
_CAUSE_SECONDS = 4.0
"""So long a rank that lost its connections waits for the message of why; guards look once a second."""
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


@contextmanager
def joined(cfg: DictConfig) -> Iterator[Ranks]:
    """`distributed` and `fail_together` as the `device` and `cluster` of a tool's configuration say."""
    node = cfg.cluster
    with (
        guarded(find_place(node.kind, os.environ), node.heartbeat_s) as guard,
        distributed(cfg.device, node.kind, node.timeout_s) as ranks,
        fail_together(ranks, guard),
    ):
        yield ranks


@contextmanager
def fail_together(ranks: Ranks, guard: Guard | None = None) -> Iterator[None]:
    """A failure of one rank inside the block ends all ranks within 30 seconds. Every rank enters and leaves together.

    A rank in which an exception arises prints `error on rank R (HOST): ...` (with a traceback, unless it is an
    `MtlRcnnError`, whose text is enough), leaves the message in the store through which the ranks met, and ends its
    process with status 2 for an `MtlRcnnError`, else 1. What a rank cannot tell itself its guard does (`guard`): that
    its process was killed, crashed, has been stopped, or that its machine no longer answers. A thread on every rank
    looks into the store twice a second and ends its process too, even one that waits in a collective; one process per
    machine repeats the message. The first failure counts: broken connections that follow from it are not reported.

    The log of every rank then holds the message, and where the rank was.

    With one process nothing is watched, and an exception simply passes through.

    Args:
        ranks: this process among all.
        guard: of this process, made before the ranks met; None: nobody tells of a rank that is killed or stopped.
    """
    if ranks.world == 1:
        yield
        return
    monitor = _Monitor(ranks, guard)
    monitor.start()
    try:
        yield
        barrier()  # none leaves, and rank 0 keeps the store, until all have succeeded
    except BaseException as error:
        monitor.fail(error)
    monitor.stop()


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is one of a collective to which another rank did not come: the fault is the other's."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)


class _Monitor:
    """One rank's watch on the failures of the others."""

    def __init__(self, ranks: Ranks, guard: Guard | None) -> None:
        self.ranks, self.guard = ranks, guard
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.post = Post.of(Place(ranks.rank, ranks.world, ranks.local_rank, address, port), ranks.attempt)
        self.store = self.post.connect()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="fail_together", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()
        self._dismiss()

    def fail(self, error: BaseException) -> NoReturn:
        """Reports this rank's exception, unless it follows from an earlier failure, and ends the process."""
        try:
            if is_lost_connection(error):
                time.sleep(_CAUSE_SECONDS)  # the watch ends the process when it learns the cause
            self.stopped.set()
            self.thread.join()
            message = self.post.error(_describe(error))
            first = self._publish(message)
            if first == message:
                _without_waiting(_report, error, message)
                time.sleep(3 * _POLL_SECONDS)  # the others read the message; rank 0's end may take the store away
            else:
                _without_waiting(self._repeat, first)
        finally:
            self._exit(2 if isinstance(error, MtlRcnnError) else 1)

    def _publish(self, message: str) -> str:
        """Stores the message if it is the first one; returns the first one."""
        try:
            return self.post.publish(self.store, message)
        except (RuntimeError, ConnectionError):  # the store is gone: nobody is left to tell, and `message` is printed
            return message

    def _watch(self) -> None:
        while not self.stopped.wait(_POLL_SECONDS):
            failure = self._look()
            if failure is not None:
                try:
                    _without_waiting(self._repeat, failure)
                finally:
                    self._exit(1)

    def _look(self) -> str | None:
        """The message of a rank that failed, or None."""
        key = self.post.failed
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except (RuntimeError, ConnectionError):
            if self.stopped.wait(4 * _POLL_SECONDS):  # all succeeded and rank 0, with the store, was faster to end
                return None
            place = f"{self.post.address}:{self.post.port}"
            return f"lost the connection to {place}: the process of rank 0 or its launcher has ended, or was killed"

    def _repeat(self, message: str) -> None:
        if self.ranks.local_rank == 0:
            print(f"rank {self.ranks.rank} ends: {message}", file=sys.stderr, flush=True)
        leave_in_log(message)

    def _dismiss(self) -> None:
        if self.guard is not None:
            self.guard.dismiss()

    def _exit(self, status: int) -> NoReturn:
        """Ends the process now: an orderly end could wait for ranks that never come. Loader workers, which could wait
        to hand over a batch, end before."""
        try:
            for worker in multiprocessing.active_children():
                worker.kill()
            self._dismiss()
        finally:
            os._exit(status)


def _describe(error: BaseException) -> str:
    if isinstance(error, MtlRcnnError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _report(error: BaseException, message: str) -> None:
    sys.stdout.flush()
    if not isinstance(error, MtlRcnnError | KeyboardInterrupt):
        traceback.print_exception(error)
    print(message, file=sys.stderr, flush=True)
    leave_in_log(message)


def _without_waiting(say: Callable[..., None], *what: Any) -> None:
    """Says something, for which nobody waits longer than two seconds: the disk or the pipe may be what hangs."""
    speaker = threading.Thread(target=say, args=what, daemon=True)
    speaker.start()
    speaker.join(2)
