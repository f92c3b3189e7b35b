"""Work done in threads ahead of its use, in order, and never far ahead: what waits is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

_END = object()


def prefetched(items: Iterable[Given], number: int) -> Iterator[Given]:
    """The items in order, up to `number` of them fetched in advance by a thread of its own; 0: none."""
    if number == 0:
        yield from items
        return
    source = iter(items)
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, source, _END) for _ in range(number))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, source, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def in_threads(function: Callable[[Given], Made], items: Iterable[Given], threads: int, ahead: int) -> Iterator[Made]:
    """`map(function, items)` in order by so many threads (0: none), at most `ahead` results before their use."""
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
