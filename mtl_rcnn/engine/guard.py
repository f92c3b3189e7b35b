"""A small process beside each rank, which sees what the rank cannot tell: that it was stopped or killed, or that
another machine no longer answers.

It is a fork without the rank's files and sockets: neither a process that is stopped nor the interpreter's lock, which a
rank may hold for a minute (reading JSON, scoring), keeps it from looking. It is made before the ranks meet: later, one
of their threads might hold a lock that the fork would wait for in vain. It tells through the store where they meet,
as `failures` does. Linux only; elsewhere there is none.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from mtl_rcnn.engine.cluster import Place
from mtl_rcnn.engine.distributed import key_of_attempt

__all__ = ["Guard", "Post", "guarded"]

BEAT_SECONDS = 1.0
_MARGIN_SECONDS = 5.0
"""So much longer a silent machine is waited for than a stopped process, which tells more."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Post:
    """Where a rank stands and whom it tells.

    Attributes:
        rank, world, host: of this rank, among so many, on this machine.
        address, port: of the store where the ranks meet.
        attempt: `Ranks.attempt`; a guard learns it from the store.
        timeout_s: of one conversation with the store.
    """

    rank: int
    world: int
    host: str
    address: str
    port: int
    attempt: str = ""
    timeout_s: float = 10.0

    @staticmethod
    def of(place: Place, attempt: str = "") -> Post:
        """That of a process with a place among several."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        return Post(place.rank, place.world, host, str(place.address), int(place.port or 0), attempt)

    def connect(self) -> dist.TCPStore:
        """An own connection: that of the process group is locked while it waits for other ranks."""
        timeout = timedelta(seconds=self.timeout_s)
        return dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=timeout)

    def error(self, text: str) -> str:
        """The one message of a failure of this rank."""
        return _error(self.rank, self.host, text)

    def publish(self, store: dist.TCPStore, message: str) -> str:
        """Stores the message for all ranks if it is the first one; returns the first one."""
        return store.compare_set(self.failed, "", message).decode()

    @property
    def failed(self) -> str:
        """Key of the first failure's message."""
        return f"mtl_rcnn/{self.attempt}/failed"

    def beat(self, rank: int) -> str:
        """Key of a rank's sign of life."""
        return f"mtl_rcnn/{self.attempt}/beat/{rank}"


@contextmanager
def guarded(place: Place, limit_s: float | None) -> Iterator[Guard | None]:
    """A guard of this process while the block runs; None where there is none: one process, no limit, not Linux."""
    if place.world == 1 or limit_s is None or sys.platform != "linux":
        yield None
        return
    guard = Guard(Post.of(place), limit_s)
    try:
        yield guard
    finally:
        guard.dismiss()


class Guard:
    """Starts the guard of this process.

    It tells the other ranks, through `post`, when this process was killed or crashed; when it has been stopped
    (SIGSTOP, SIGTSTP) for `limit_s`, which it then is killed for; and when another machine gave no more sign of life
    for `limit_s` and 5 s. Rank 0's guard looks at all ranks, the others at rank 0. Where all of a job is stopped and
    continued, as by `scontrol suspend`, time begins anew.
    """

    def __init__(self, post: Post, limit_s: float) -> None:
        guarded = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads: those that libraries keep
            self.process: int | None = os.fork()
        if self.process == 0:
            try:
                errors = _let_go()
                try:
                    _Lookout(post, guarded, limit_s, errors).watch()
                except Exception:  # the rank goes on without a guard, which is to be seen
                    traceback.print_exc(file=errors)
                    errors.flush()
            finally:
                os._exit(0)

    def dismiss(self) -> None:
        """Ends the guard: what it would tell from now on is no news."""
        if self.process is not None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = None


def _let_go() -> TextIO:
    """Signals are meant for the rank; its open sockets would hide from the other ranks that it has ended. Returns
    standard error, which C10D, that tells of every lost connection at length, no longer has."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 3)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 3:
            with suppress(OSError):  # that of the list itself
                os.close(descriptor)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    return open(3, "w", encoding="utf-8")


@dataclass
class _Lookout:
    post: Post
    guarded: int
    limit_s: float
    errors: TextIO
    store: dist.TCPStore | None = None
    stopped_since: float | None = None
    answered: float | None = None
    """When the store last answered; None before the ranks have met."""
    beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    """Of the ranks that are looked at: the last sign of life, and since when it has been the last."""
    silent: tuple[int, str] | None = None
    """A rank and its host, from which nothing is heard."""

    def watch(self) -> None:
        """Looks about once a second until there is something to tell, or the store is gone."""
        conversation = threading.Thread(target=self._converse, daemon=True)
        conversation.start()
        last = time.monotonic()
        while True:
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            if now - last > 3 * BEAT_SECONDS:  # this process was stopped itself, or has waited for a processor
                self._begin_anew(now)
            last = now
            state = _state(self.guarded)
            if state is None:
                self._tell(self.post.error("its process was killed (by SIGKILL where memory runs out) or crashed"))
                return
            self.stopped_since = (self.stopped_since or now) if state == "T" else None
            if self.stopped_since and now - self.stopped_since > self.limit_s:
                self._tell(self.post.error(f"its process has been stopped (SIGSTOP) for {self.limit_s:g} s"))
                os.kill(self.guarded, signal.SIGKILL)
                return
            if self.silent is not None:
                self._tell(_error(*self.silent, self._silence()))
                return
            late = self.answered is not None and now - self.answered > self.limit_s + _MARGIN_SECONDS
            if late and conversation.is_alive():
                self._tell(_error(0, self.post.address, self._silence()))
                os.kill(self.guarded, signal.SIGKILL)  # it cannot learn of it in any other way
                return

    def _converse(self) -> None:
        """Signs of life, given and read. Ends with the connection: the rank, which has one too, then ends itself."""
        # Rank 0's guard looks at the others, and they at it. Who never gave a sign of life is not missed.
        unheard, heard = set(range(1, self.post.world)) if self.post.rank == 0 else {0}, []
        number = 0
        self.store = self._meet()
        try:
            while self.store is not None:
                number += 1
                if self.stopped_since is None:
                    self.store.set(self.post.beat(self.post.rank), f"{number} {self.post.host}")
                heard += [rank for rank in unheard if self.store.check([self.post.beat(rank)])]
                unheard.difference_update(heard)
                beats = self.store.multi_get([self.post.beat(rank) for rank in heard]) if heard else []
                self.answered = time.monotonic()
                self._note(dict(zip(heard, beats)))
                time.sleep(BEAT_SECONDS)
        except (RuntimeError, ConnectionError):
            return

    def _meet(self) -> dist.TCPStore | None:
        """The store, when it is there: ranks may wait for each other for minutes."""
        while os.getppid() == self.guarded:
            try:
                store = self.post.connect()
                attempt = store.get(key_of_attempt(self.post.rank, self.guarded)).decode()
                self.post = replace(self.post, attempt=attempt)
                return store
            except (RuntimeError, ConnectionError):
                time.sleep(BEAT_SECONDS)
        return None

    def _note(self, found: dict[int, bytes]) -> None:
        now = time.monotonic()
        for rank, beat in found.items():
            if rank not in self.beats or self.beats[rank][0] != beat:
                self.beats[rank] = (beat, now)
            elif now - self.beats[rank][1] > self.limit_s + _MARGIN_SECONDS:
                self.silent = (rank, beat.decode().partition(" ")[2])

    def _begin_anew(self, now: float) -> None:
        self.stopped_since, self.silent = None, None
        self.answered = self.answered and now
        self.beats = {rank: (beat, now) for rank, (beat, _) in self.beats.items()}

    def _silence(self) -> str:
        return f"no sign of life for {self.limit_s + _MARGIN_SECONDS:g} s: its machine or the network hangs"

    def _tell(self, message: str) -> None:
        if not self._publish(message):
            print(message, file=self.errors, flush=True)

    def _publish(self, message: str) -> bool:
        """Whether the store took it. It may be in the process that is stopped, or on a machine that hangs."""
        done = threading.Event()

        def publish() -> None:
            try:
                if self.store is not None:
                    self.post.publish(self.store, message)
                    done.set()
            except (RuntimeError, ConnectionError):
                return  # the store has ended: all ranks learn that from their connections

        threading.Thread(target=publish, daemon=True).start()
        return done.wait(2 * BEAT_SECONDS)


def _state(process: int) -> str | None:
    """State letter of the parent process (proc(5): T is stopped), None if it has ended."""
    if os.getppid() != process:
        return None
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # it has ended since, or this process may open no more files
        return None if os.getppid() != process else "?"
    return stat.rpartition(")")[2].split()[0]  # after the name, which is in brackets and may hold anything


def _error(rank: int, host: str, text: str) -> str:
    return f"error on rank {rank} ({host}): {text}"
