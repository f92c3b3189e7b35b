"""Which process this is among all of a job: read from what torchrun or SLURM says to it, without torch.

    place = find_place("slurm", os.environ)   # Place(rank=3, world=16, local_rank=3, address="node07", port=28352)

`cluster=local` reads torchrun's variables and is one process without them; `cluster=slurm` reads those that srun gives
every task of a step. Ranks meet at rank 0: its host is the first of the step's nodes, its port follows from the job.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mtl_rcnn.errors import ConfigError

__all__ = ["Place", "expand_hosts", "find_place", "step_port", "without_step"]

FIRST_PORT, PORTS = 20000, 10000
"""Ports of SLURM jobs: below those that Linux gives to outgoing connections (from 32768 on)."""

_STEPS_OF_A_JOB = 16
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TASKS = "SLURM_STEP_NUM_TASKS"
"""Unlike SLURM_NTASKS, srun alone sets it: a batch script is one process whatever its job may start."""
_SLURM = ("SLURM_PROCID", _TASKS, "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")


@dataclass(frozen=True)
class Place:
    """A process among all processes of a job.

    Attributes:
        rank: in [0, world).
        world: number of processes on all machines.
        local_rank: index among this machine's processes.
        address: host of rank 0; None for one process.
        port: of rank 0, where the ranks meet; None for one process.
    """

    rank: int
    world: int
    local_rank: int
    address: str | None = None
    port: int | None = None


def find_place(cluster: str, environ: Mapping[str, str]) -> Place:
    """The place that the environment gives this process.

    Args:
        cluster: "local" (torchrun, or one process) or "slurm" (srun, or a job of submitit).
        environ: such as `os.environ`. MASTER_ADDR and MASTER_PORT, where set, count more than what SLURM's say.

    Raises:
        ConfigError: an incomplete or contradictory environment, or one of another cluster.
    """
    if cluster == "local":
        return _torchrun(environ)
    if cluster == "slurm":
        return _slurm(environ)
    raise ConfigError(f"cluster.kind={cluster}: expected local or slurm")


def expand_hosts(text: str) -> list[str]:
    """The hosts of a SLURM node list, in its order: "a[1-2,07]-ib,b" is a1-ib, a2-ib, a07-ib, b.

    Raises:
        ConfigError: brackets that do not close, or a range that is none.
    """
    hosts = []
    for name in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        hosts += _expand(name, text)
    if text.count("[") != text.count("]") or not hosts:
        raise ConfigError(f"environment: cannot read the SLURM node list {text!r}; set MASTER_ADDR to rank 0's host")
    return hosts


def step_port(job_id: int, step_id: int) -> int:
    """Rank 0's port, in [20000, 30000): the same on all ranks of a step, another for other steps and for the next
    624 jobs."""
    return FIRST_PORT + (job_id * _STEPS_OF_A_JOB + step_id % _STEPS_OF_A_JOB) % PORTS


def without_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that a task of srun starts for itself, and that is no task of that step."""
    return {name: value for name, value in environ.items() if name not in (_TASKS, "SLURM_PROCID")}


def _torchrun(environ: Mapping[str, str]) -> Place:
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        _refuse_step(environ)
        return Place(0, 1, 0)
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} not set although RANK or WORLD_SIZE is; "
            "start with torchrun, which sets all of them, or unset them to run one process"
        )
    rank, world, local_rank, port = (_integer(environ, name) for name in _TORCHRUN if name != "MASTER_ADDR")
    if not (0 <= rank < world and 0 <= local_rank < world):
        raise ConfigError(
            f"environment: RANK={rank} and LOCAL_RANK={local_rank} must lie in [0, WORLD_SIZE) with WORLD_SIZE={world}"
        )
    return Place(rank, world, local_rank, environ["MASTER_ADDR"], port)


def _refuse_step(environ: Mapping[str, str]) -> None:
    """Every task of a step would believe to be alone and write into the same run."""
    tasks = environ.get(_TASKS, "1")
    if tasks != "1":
        raise ConfigError(
            f"cluster=local: srun started {tasks} tasks ({_TASKS}={tasks}), each of which would run alone into the "
            "same output_dir; add cluster=slurm to make them the ranks of one run, or start one task (srun -n 1)"
        )


def _slurm(environ: Mapping[str, str]) -> Place:
    missing = [name for name in _SLURM if name not in environ]
    if missing:
        raise ConfigError(
            f"cluster=slurm: {', '.join(missing)} not set: this process is not a task of srun; start it with srun (in "
            "an sbatch script too) or through hydra/launcher=submitit_slurm, or use cluster=local"
        )
    if "RANK" in environ:
        raise ConfigError(
            "cluster=slurm: RANK is set, so torchrun started this process; use cluster=local under torchrun, also "
            "inside a SLURM job"
        )
    rank, world, local_rank = (_integer(environ, name) for name in _SLURM[:3])
    if world == 1:
        return Place(0, 1, 0)
    address = environ.get("MASTER_ADDR") or expand_hosts(environ["SLURM_STEP_NODELIST"])[0]
    if environ.get("MASTER_PORT"):
        port = _integer(environ, "MASTER_PORT")
    else:
        port = step_port(_integer(environ, "SLURM_JOB_ID"), _integer(environ, "SLURM_STEP_ID"))
    return Place(rank, world, local_rank, address, port)


def _expand(name: str, text: str) -> list[str]:
    head, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, tail = rest.partition("]")
    numbers = [number for part in inside.split(",") for number in _numbers(part, text)]
    return [f"{head}{number}{end}" for number in numbers for end in _expand(tail, text)]


def _numbers(part: str, text: str) -> list[str]:
    """ "08-11" as 08, 09, 10, 11; "7" as 7."""
    first, _, last = part.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise ConfigError(f"environment: cannot read {part!r} in the SLURM node list {text!r}; set MASTER_ADDR")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"environment: {name}={environ[name]!r} is not a whole number") from None
