"""Ranks: who computes, and what they say to each other. How they end when one of them fails: `failures`.

Ranks come from the environment that `torchrun` or SLURM sets (see `cluster`); without it there is one process and no
process group. Everything here works the same with one process, and `detectron2.utils.comm` sees the same ranks (its
functions of the *local* rank excepted: they need Detectron2's own launcher; `Ranks.local_rank` says the same).

    with distributed("auto", "slurm") as ranks:
        train(ranks)
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl_rcnn.engine.cluster import Place, find_place
from mtl_rcnn.errors import ConfigError, TrainingError

__all__ = [
    "Ranks",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "distributed",
    "gather_objects",
    "init",
    "is_main",
    "key_of_attempt",
    "share_buffers",
    "world_size",
]

_ANSWER_SECONDS = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes.

    Attributes:
        rank: in [0, world); rank 0 writes files and the log.
        world: number of processes on all machines.
        local_rank: index among this machine's processes.
        device: where this process computes.
        attempt: name of this start of the ranks, which torchrun may restart; the same on all of them.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    attempt: str = "0"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


@contextmanager
def distributed(device: str = "auto", cluster: str = "local", timeout_s: float = 600.0) -> Iterator[Ranks]:
    """`init`, and the process group's end when the block is left."""
    ranks = init(device, cluster, timeout_s)
    try:
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def init(device: str = "auto", cluster: str = "local", timeout_s: float = 600.0) -> Ranks:
    """Reads the ranks from the environment and, where there is more than one, joins them in a process group.

    Afterwards MASTER_ADDR and MASTER_PORT of the environment say where the ranks met.

    Args:
        device: "cpu" (gloo), "cuda" (NCCL), or "auto": a GPU where there is one.
        cluster: who started the ranks: "local" (torchrun, or nobody) or "slurm" (srun, submitit).
        timeout_s: seconds after which a collective that some rank never joined is an error.

    Raises:
        ConfigError: an incomplete or contradictory environment, or a device that this machine lacks.
    """
    place = find_place(cluster, os.environ)
    # SLURM may show each task its own GPU alone (--gpus-per-task, --gpu-bind), which then is the first.
    gpu = 0 if cluster == "slurm" and torch.cuda.device_count() == 1 else place.local_rank
    ranks = Ranks(place.rank, place.world, place.local_rank, choose_device(device, gpu))
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(ranks.device)
    if ranks.world > 1:
        os.environ.update(MASTER_ADDR=str(place.address), MASTER_PORT=str(place.port))
        timeout = timedelta(seconds=timeout_s)
        store, attempt = _meet(place, timeout)
        ranks = replace(ranks, attempt=attempt)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            timeout=timeout,
            rank=ranks.rank,
            world_size=ranks.world,
            device_id=ranks.device if on_gpu else None,
        )
    return ranks


def is_main() -> bool:
    """Whether this process is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's `value` (anything that pickles) on every rank; the other ranks' argument is not read."""
    if world_size() == 1:
        return value
    box = [value if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's `value` (anything that pickles), in order of rank, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` (any shape, on this rank's device) over the ranks, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def share_buffers(module: nn.Module) -> None:
    """Gives every rank rank 0's buffers (such as batch norm's statistics, of which each rank has its own after a
    step)."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def key_of_attempt(rank: int, process: int) -> str:
    """Where the store says which attempt a process belongs to (`Ranks.attempt`), for the sake of its guard."""
    return f"mtl_rcnn/attempt_of/{rank}/{socket.gethostname()}/{process}"


def _meet(place: Place, timeout: timedelta) -> tuple[dist.Store, str]:
    """The store of torchrun's agent or, without one, of rank 0, and the name of this attempt.

    An agent's store outlives the ranks that it restarts. What torch itself makes of MASTER_ADDR and MASTER_PORT would
    find the addresses of processes of the last attempt in it (torch 2.14: "connectFullMesh failed", connection
    refused), so that each attempt has its own keys.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    first = place.rank == 0 and not served
    store = dist.TCPStore(
        str(place.address),
        int(place.port or 0),
        place.world,
        first,
        timeout=timeout,
        wait_for_workers=not served,
        multi_tenant=first,
    )
    attempt = _agree_on_attempt(store, place, timeout) if served else "0"
    store.set(key_of_attempt(place.rank, os.getpid()), attempt)
    return dist.PrefixStore(attempt, store), attempt


def _agree_on_attempt(store: dist.Store, place: Place, timeout: timedelta) -> str:
    """A name that rank 0 makes up, on all ranks.

    The store may hold questions and answers of earlier attempts, whose processes have ended. No rank can tell by
    TORCHELASTIC_RESTART_COUNT: each machine's agent counts its own failures. So every question has a name of its own,
    and rank 0 answers whatever is asked until all ranks have understood.
    """
    mine = uuid.uuid4().hex
    if place.rank > 0:
        store.set(f"mtl_rcnn/asked/{place.rank}", mine)
        attempt = store.get(f"mtl_rcnn/answer/{mine}").decode()  # waits for it
        store.set(f"mtl_rcnn/understood/{attempt}/{place.rank}", "")
        return attempt
    waiting, until = set(range(1, place.world)), time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > until:
            missing = ", ".join(map(str, sorted(waiting)))
            raise TrainingError(f"ranks {missing} have not come within {timeout.total_seconds():g} s")
        for rank in [rank for rank in waiting if store.check([f"mtl_rcnn/asked/{rank}"])]:
            store.set(f"mtl_rcnn/answer/{store.get(f'mtl_rcnn/asked/{rank}').decode()}", mine)
        time.sleep(_ANSWER_SECONDS)
        waiting = {rank for rank in waiting if not store.check([f"mtl_rcnn/understood/{mine}/{rank}"])}
    return mine


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means for a process. ConfigError if there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for but PyTorch sees no GPU; use device=cpu or device=auto")
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(  # not of the configuration alone: ranks with a GPU do not see it
            f"device: local rank {local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}; "
            f"start at most {torch.cuda.device_count()} processes here (torchrun --nproc-per-node, srun "
            "--ntasks-per-node) or use device=cpu"
        )
    return torch.device("cuda", local_rank)
