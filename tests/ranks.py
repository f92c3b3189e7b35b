"""Starts a Python script, or a function, as several gloo processes on this machine, as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(command: list[str], world: int, timeout: float = 300) -> list[tuple[int, str]]:
    """(exit status, output and errors) of each rank of `python <command>`."""
    processes = start_ranks(command, world)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


def start_ranks(command: list[str], world: int, **options: Any) -> list[subprocess.Popen[str]]:
    """Ranks of `python <command>` that run; `options` of Popen."""
    shared = _shared(world)
    shared["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in range(world)
    ]


def fork_ranks(function: Callable[[], object], world: int, timeout: float = 300) -> list[int]:
    """Exit status of each rank of `function`, run in forks of this process, which need no time for imports."""
    processes = start_forks(function, world)
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def start_forks(function: Callable[[], object], world: int, said: Path | None = None) -> list[BaseProcess]:
    """Ranks of `function` that run, in forks of this process; `said`: a folder for their output and errors,
    <rank>.txt."""
    shared = _shared(world)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_as_rank, args=(function, rank, shared, said)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _as_rank(function: Callable[[], object], rank: int, shared: dict[str, str], said: Path | None) -> None:
    os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    if said is not None:
        with open(said / f"{rank}.txt", "w") as file:
            for standard in (1, 2):
                os.dup2(file.fileno(), standard)
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    function()


def _shared(world: int) -> dict[str, str]:
    """The environment of all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
