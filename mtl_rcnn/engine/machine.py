"""What every rank needs and one rank of each machine makes."""

from __future__ import annotations

import ctypes
import logging
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from detectron2.utils import comm

from mtl_rcnn.engine.distributed import Ranks, barrier

logger = logging.getLogger(__name__)
T = TypeVar("T")


def once_per_machine(make: Callable[[], T], ranks: Ranks | None) -> T:
    """What `make` returns on local rank 0; the other ranks of its machine get it pickled.

    A `RecordStore` in it pickles as a reference: all ranks of the machine map the same memory. A rank that cannot open
    this (each rank in a container of its own, say) calls `make` itself, with a warning. An error of `make` is that of
    its rank: `fail_together` ends the others.

    Args:
        make: its result is not None, and pickles.
        ranks: that all call this now; None: this process alone.
    """
    if ranks is None or ranks.world == 1:
        return _made(make)
    made = _made(make) if ranks.local_rank == 0 else None
    offers = comm.all_gather(None if made is None else pickle.dumps(made))
    if made is None:
        made = _first_that_opens(offers)
    barrier()  # the makers keep their memory until everybody has it
    if made is None:
        logger.warning("rank %d cannot share the data of local rank 0, and reads its own copy", ranks.rank)
        made = _made(make)
    return made


def _made(make: Callable[[], T]) -> T:
    """And gives back what `make` needed on the way (the objects of whole JSON files), which glibc would keep."""
    made = make()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    return made


def _first_that_opens(offers: Sequence[bytes | None]) -> object | None:
    """Of the local ranks 0 of all machines, only this machine's can be opened."""
    for offer in offers:
        try:
            if offer is not None:
                return pickle.loads(offer)
        except OSError:
            continue
    return None
