"""The run's directory: one for all ranks, with everything needed to see later what was run."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.distributed import Ranks, barrier
from mtl_rcnn.errors import ConfigError

_PACKAGES = ("mtl-rcnn", "detectron2", "torch", "torchvision", "numpy", "faster-coco-eval")


def open_run(cfg: DictConfig, ranks: Ranks) -> Path:
    """Makes the directory, starts the log, saves config, command and versions, and sets up torch for the run.

    Raises:
        ConfigError: the directory cannot be made or written.
    """
    folder = Path(cfg.output_dir)
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
            (folder / "command.txt").write_text(_command(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"output_dir={folder}: cannot be written ({error.strerror or error}); mend it, or choose another"
            ) from error
    barrier()
    setup_logging(folder, ranks)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    repeatable(ranks.device)
    return folder


def repeatable(device: torch.device) -> None:
    """Makes equal runs give equal gradients, on the CPU: parallel accumulation does not unless asked to. What has no
    such version only warns."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def setup_logging(folder: Path | None, ranks: Ranks) -> None:
    """Rank 0 logs to the terminal and `log.txt`, every other rank to its own file; warnings of any rank are kept."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "mtl_rcnn", False):
            root.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if ranks.is_main else []
    if folder is not None:
        name = "log.txt" if ranks.is_main else f"log_rank_{ranks.rank}.txt"
        handlers.append(logging.FileHandler(folder / name, encoding="utf-8"))
    for handler in handlers:
        handler.mtl_rcnn = True
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("mtl_rcnn").setLevel(logging.INFO)
    # It would print a traceback of errors whose text is enough; the others come with theirs anyway.
    logging.getLogger("detectron2.engine.train_loop").setLevel(logging.CRITICAL)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _command() -> str:
    lines = [shlex.join([sys.executable, *sys.argv]), f"cwd: {os.getcwd()}", f"git: {_git_state()}"]
    return "\n".join([*lines, *(f"{name}: {version}" for name, version in versions().items())]) + "\n"


def _git_state() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "not a git clone"
