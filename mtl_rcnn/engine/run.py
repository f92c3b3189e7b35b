"""The run's directory: one for all ranks, with everything needed to see later what was run."""

from __future__ import annotations

import faulthandler
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.distributed import Ranks, barrier, gather_objects
from mtl_rcnn.errors import ConfigError

_PACKAGES = ("mtl-rcnn", "detectron2", "torch", "torchvision", "numpy", "faster-coco-eval")
_REDACTED = "<redacted>"
_SECRET_NAME = re.compile(
    r"secret|token|key|passw|passphrase|_pwd|credential|auth|cookie|private|signature|dsn|webhook", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"(?<=://)[^/\s]*(?=@)"  # user and password in an address, as of a proxy
    r"|\b(hf_|gh[oprsu]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA|eyJ)[\w.-]+"  # tokens that say whose they are
)


def open_run(cfg: DictConfig, ranks: Ranks) -> Path:
    """Makes the directory, starts the log, saves config, command, versions, environment and hosts, and sets up torch
    for the run.

    Raises:
        ConfigError: the directory cannot be made or written.
    """
    folder = Path(cfg.output_dir)
    hosts = gather_objects(_host(ranks))
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
            (folder / "command.txt").write_text(_command(), encoding="utf-8")
            (folder / "environment.json").write_text(_json(redacted(os.environ)), encoding="utf-8")
            (folder / "hosts.json").write_text(_json(hosts), encoding="utf-8")
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
    """Rank 0 logs to the terminal and `log.txt`, every other rank to its own file; warnings of any rank are kept.

    SIGQUIT has a process write into its file where each of its threads is, and go on; a crash of machine code does too.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, "mtl_rcnn", False):
            root.removeHandler(handler)
            handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if ranks.is_main else []
    if folder is not None:
        name = "log.txt" if ranks.is_main else f"log_rank_{ranks.rank}.txt"
        handlers.append(_RankLog(folder / name, encoding="utf-8"))
    for handler in handlers:
        handler.mtl_rcnn = True
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("mtl_rcnn").setLevel(logging.INFO)
    # It would print a traceback of errors whose text is enough; the others come with theirs anyway.
    logging.getLogger("detectron2.engine.train_loop").setLevel(logging.CRITICAL)


def leave_in_log(message: str) -> None:
    """Writes a message and where each thread is into this rank's file, not to the terminal."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RankLog):
            print(f"{message}\n", file=handler.stream, flush=True)
            faulthandler.dump_traceback(handler.stream)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def redacted(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by name, without what looks like a secret: values of variables whose name says so (token, key,
    password, ...), passwords in addresses, and tokens of known forms in any value."""
    return {
        name: _REDACTED if _SECRET_NAME.search(name) else _SECRET_VALUE.sub(_REDACTED, value)
        for name, value in sorted(environ.items())
    }


class _RankLog(logging.FileHandler):
    """The log file of a rank, which also takes the stacks of its threads."""

    def __init__(self, path: Path, encoding: str) -> None:
        super().__init__(path, encoding=encoding)
        self.of_crashes = not faulthandler.is_enabled()
        if self.of_crashes:
            faulthandler.enable(self.stream)
        if hasattr(faulthandler, "register"):  # not on Windows
            faulthandler.register(signal.SIGQUIT, self.stream)

    def close(self) -> None:
        if hasattr(faulthandler, "unregister"):
            faulthandler.unregister(signal.SIGQUIT)
        if self.of_crashes:
            faulthandler.disable()
        super().close()


def _host(ranks: Ranks) -> dict[str, str | int]:
    """Where this rank computes; the node is SLURM's name of the host."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    host = {"rank": ranks.rank, "host": socket.gethostname(), "local_rank": ranks.local_rank, "device": device}
    node = os.environ.get("SLURMD_NODENAME")
    return {**host, "node": node} if node else host


def _json(content: object) -> str:
    return json.dumps(content, indent=1) + "\n"


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
