"""Ranks: who computes, and what they say to each other. How they end when one of them fails: `failures`.

Ranks come from the environment that `torchrun` or SLURM sets (see `cluster`); without it there is one process and no
process group. Everything here works the same with one process, and `detectron2.utils.comm` sees the same ranks (its
functions of the *local* rank excepted: they need Detectron2's own launcher; `Ranks.local_rank` says the same).

    with distributed("auto", "slurm") as ranks:
        train(ranks)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    "attempt",
    "barrier",
    "broadcast_object",
    "distributed",
    "gather_objects",
    "init",
    "is_main",
    "share_buffers",
    "world_size",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes.

    Attributes:
        rank: in [0, world); rank 0 writes files and the log.
        world: number of processes on all machines.
        local_rank: index among this machine's processes.
        device: where this process computes.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device

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
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_meeting_place(place, timeout),
            timeout=timeout,
            rank=ranks.rank,
            world_size=ranks.world,
            device_id=ranks.device if on_gpu else None,
        )
    return ranks


def attempt() -> int:
    """How often torchrun has restarted the ranks. Its store outlives them, so that each attempt needs its own keys."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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


def _meeting_place(place: Place, timeout: timedelta) -> dist.Store:
    """The store of torchrun's agent or, without one, of rank 0.

    What torch itself makes of MASTER_ADDR and MASTER_PORT would find, after a restart, the addresses of processes of
    the last attempt (torch 2.14: "connectFullMesh failed", connection refused).
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    first = place.rank == 0 and not served
    store = dist.TCPStore(
        str(place.address), int(place.port or 0), place.world, first, timeout=timeout, multi_tenant=first
    )
    return dist.PrefixStore(f"attempt_{attempt()}", store)


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
