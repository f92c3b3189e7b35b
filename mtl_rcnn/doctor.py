"""Says whether this machine can train, and what to type where it cannot: `python -m mtl_rcnn.doctor`.

One table, a line per thing looked at; the exit status is 0 only if no line says FIX. Nothing but Python itself is
needed: everything else is imported inside its own check, and a check that fails is a line of the table, not a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DISTRIBUTION = "mtl-rcnn"
LEAST_DISK = 2 * 2**30
"""Bytes: five checkpoints of a ResNet-50 with the optimizer's state."""
LEAST_SHARED_MEMORY = 256 * 2**20
"""Bytes: loader workers hand batches over through it. Containers have 64 MiB unless told otherwise."""

_CLONE = Path(__file__).resolve().parents[1]
_MODULES = {"opencv-python": "cv2", "pillow": "PIL", "hydra-core": "hydra", "mtl-rcnn": "mtl_rcnn"}
"""Distribution -> module, where they differ in more than a hyphen."""
_CORE = ("torch", "torchvision", "detectron2")
_OTHER_BUILDS = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")}
"""Distributions that hold the same module as the one that is required."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        what: was looked at.
        found: in words.
        fix: what is wrong and what to type; "" if all is well.
    """

    what: str
    found: str
    fix: str = ""


def main() -> int:
    """Prints the table; returns the exit status, 1 if anything is to be fixed."""
    warnings.simplefilter("ignore")
    findings = diagnose()
    print(as_text(findings))
    return int(any(finding.fix for finding in findings))


def diagnose() -> list[Finding]:
    """All findings, in the table's order."""
    checks = (_python, _packages, _torch_pair, _devices, _detectron2, _shared_memory, _disk)
    return [finding for check in checks for finding in _guarded(check)]


def as_text(findings: list[Finding]) -> str:
    """The table, and what is to be typed below each line that needs it."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{'FIX' if finding.fix else 'OK':<4} {finding.what:<{width}}  {finding.found}")
        lines += textwrap.wrap(finding.fix, 100, initial_indent="       -> ", subsequent_indent="          ")
    number = sum(bool(finding.fix) for finding in findings)
    return "\n".join([*lines, "", f"{number} to fix" if number else "everything is in place"])


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # broken installations raise anything, and the other lines are still worth reading
        name = check.__name__.strip("_").replace("_", " ")
        fix = f"this could not be looked at; mend the lines above first, or report it with: pip freeze; {name}"
        yield Finding(name, f"fails: {_describe(error)}", fix)


# Python and the packages that the project's own metadata asks for


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}, {os.cpu_count()} cores"
    wanted = _own_metadata("Requires-Python")
    if wanted is None or _within(platform.python_version(), wanted):
        yield Finding("python", found)
    else:
        yield Finding("python", found, f"expected {wanted}: make an environment with it, python3.12 -m venv .venv")


def _packages() -> Iterator[Finding]:
    if _own_metadata("Name") is None:
        yield Finding(DISTRIBUTION, "not installed: its version ranges are unknown", f"pip install -e {_CLONE}")
        yield from (finding for name in _CORE if (finding := _import_failure(name)))
        return
    yield Finding(DISTRIBUTION, f"{_own_metadata('Version')} in {Path(__file__).parent}")
    if importlib.util.find_spec("packaging") is None:
        yield Finding("packaging", "missing", "pip install packaging")
        yield from (finding for name in _CORE if (finding := _import_failure(name)))
        return
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Any) -> Finding:
    """A package: installed, in its range, and it can be imported."""
    name, wanted = requirement.name, str(requirement.specifier)
    installed = next((n for n in (name, *_OTHER_BUILDS.get(name, ())) if _version(n) is not None), None)
    failure = _import_failure(name)
    if installed is None:
        return failure or Finding(name, f"{_module_path(name)}, of unknown version (expected {wanted})")
    version = _version(installed)
    found = f"{version} ({wanted})" if installed == name else f"{version} of {installed} ({wanted})"
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, found, f"version {version} is outside {wanted}: {_install(name, wanted)}")
    return Finding(name, f"{found}, but {failure.found}", failure.fix) if failure else Finding(name, found)


def _import_failure(name: str) -> Finding | None:
    """What happens when a package cannot be imported; None if it can."""
    try:
        _import(name)
    except ModuleNotFoundError as error:
        if error.name == _module(name):
            return Finding(name, "missing", _install(name))
        return Finding(name, f"broken: {_describe(error)}", f"pip install {error.name}")
    except Exception as error:  # a broken binary raises OSError, RuntimeError, AttributeError ...
        return Finding(name, f"broken: {_describe(error)}", _reinstall(name))
    return None


def _torch_pair() -> Iterator[Finding]:
    """Whether torchvision was built for the torch that is installed: its own metadata says for which."""
    torch_version = _version("torch")
    if torch_version is None or _version("torchvision") is None or importlib.util.find_spec("packaging") is None:
        return  # said among the packages
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("torchvision") or []:
        requirement = Requirement(line)
        if requirement.name == "torch":
            fits = requirement.specifier.contains(torch_version.split("+")[0], prereleases=True)
            found = f"torchvision {_version('torchvision')} expects torch {requirement.specifier}, has {torch_version}"
            yield Finding("torch + torchvision", found, "" if fits else _reinstall())


# What computes


def _devices() -> Iterator[Finding]:
    if _import_failure("torch"):
        return  # said among the packages
    torch = _import("torch")
    yield from _operators(torch, "cpu", f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            yield from _operators(torch, f"cuda:{index}", found)
    else:
        yield _no_gpu(torch)


def _no_gpu(torch: ModuleType) -> Finding:
    seen = _nvidia_gpus()
    if not seen:
        return Finding("cuda", "no GPU on this machine: training runs on the CPU")
    if torch.version.cuda is None:
        return Finding("cuda", f"{seen[0]}, but torch {torch.__version__} is built without CUDA", _reinstall())
    fix = (
        f"torch is built for CUDA {torch.version.cuda} and cannot use the driver: type nvidia-smi and compare its CUDA "
        "version, which must not be older; echo $CUDA_VISIBLE_DEVICES must not be empty where it is set"
    )
    return Finding("cuda", f"{seen[0]}, but torch cannot use it", fix)


def _nvidia_gpus() -> list[str]:
    """Names of NVIDIA GPUs as the driver tells them; [] without a driver or a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _operators(torch: ModuleType, device: str, found: str) -> Iterator[Finding]:
    """torchvision's operators, run on a device and compared with what they must give."""
    for name, operator in {"nms": _run_nms, "roi_align": _run_roi_align}.items():
        try:
            right = operator(torch, device)
        except Exception as error:
            yield Finding(f"{name} on {device}", f"{found}; fails: {_describe(error)}", _reinstall())
            continue
        text = "" if right else f"torchvision.ops.{name} computes something else than it must: {_reinstall()}"
        yield Finding(f"{name} on {device}", f"{found}; runs" if right else f"{found}; wrong result", text)


def _run_nms(torch: ModuleType, device: str) -> bool:
    """Of two boxes on top of each other and one apart, the better one and the one apart stay."""
    ops = importlib.import_module("torchvision.ops")
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device=device)
    return ops.nms(boxes, torch.tensor([0.8, 0.9, 0.7], device=device), 0.5).tolist() == [1, 2]


def _run_roi_align(torch: ModuleType, device: str) -> bool:
    """Of a plane whose value is its column, a box pools the columns' means; the gradient comes back in full."""
    ops = importlib.import_module("torchvision.ops")
    plane = torch.arange(8.0, device=device).expand(1, 1, 8, 8).clone().requires_grad_()
    rois = torch.tensor([[0.0, 2, 2, 6, 6]], device=device)
    pooled = ops.roi_align(plane, rois, (1, 2), 1.0, 2, aligned=True)
    pooled.sum().backward()
    expected = torch.tensor([2.5, 4.5], device=device)
    return torch.allclose(pooled.flatten(), expected) and abs(float(plane.grad.sum()) - 2) < 1e-4


def _detectron2() -> Iterator[Finding]:
    """Which build of Detectron2: whose, where from, and whether it has compiled operators (not needed here)."""
    if _import_failure("detectron2"):
        return  # said among the packages
    version = _version("detectron2") or "of unknown version"
    path = _module_path("detectron2")
    try:
        importlib.import_module("detectron2.modeling")
    except Exception as error:
        yield Finding("detectron2 build", f"{version} in {path}, broken: {_describe(error)}", _reinstall("detectron2"))
        return
    binary = importlib.util.find_spec("detectron2._C")
    origin = "" if binary is None else str(binary.origin)
    kind = "pure Python" if binary is None or origin.endswith(".py") else "compiled"
    try:
        if binary is not None:
            importlib.import_module("detectron2._C")
    except Exception as error:
        yield Finding("detectron2 build", f"{version}, {kind}: {_describe(error)}", _reinstall("detectron2"))
        return
    whose = "of third_party/detectron2" if "+pure" in version else "not of third_party/detectron2"
    yield Finding("detectron2 build", f"{version} ({whose}), {kind}, in {path}")


# The machine


def _shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if folder.is_dir():
        total = shutil.disk_usage(folder).total
        small = total < LEAST_SHARED_MEMORY
        fix = "loader workers need more: docker run --shm-size=8g ..., or add data.workers=0 to the command"
        yield Finding("shared memory", f"{total / 2**20:,.0f} MiB in {folder}", fix if small else "")


def _disk() -> Iterator[Finding]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        yield Finding("disk", f"{folder} cannot be written to", "add output_dir=/a/folder/of/yours to the command")
    elif free < LEAST_DISK:
        fix = f"checkpoints need {LEAST_DISK / 2**30:.0f} GiB: free some (du -sh *), or add output_dir=/another/disk"
        yield Finding("disk", found, fix)
    else:
        yield Finding("disk", found)


# Names, versions, commands


def _own_metadata(field: str) -> str | None:
    try:
        return importlib.metadata.metadata(DISTRIBUTION)[field]
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, wanted: str) -> bool:
    """True also where `packaging`, which compares versions, is missing: that has a line of its own."""
    if importlib.util.find_spec("packaging") is None:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _module(distribution: str) -> str:
    return _MODULES.get(distribution, distribution.replace("-", "_"))


def _import(distribution: str) -> ModuleType:
    return importlib.import_module(_module(distribution))


def _module_path(distribution: str) -> str:
    module = _import(distribution)
    return str(Path(module.__file__).parent) if module.__file__ else str(next(iter(module.__path__)))


def _install(name: str, wanted: str = "") -> str:
    if name != "detectron2":
        return f'pip install "{name}{wanted}"'
    folder = _CLONE / "third_party" / "detectron2"
    return f"pip install {folder}" if folder.is_dir() else "pip install ./third_party/detectron2 (in a clone)"


def _reinstall(name: str = "torch") -> str:
    if name in ("torch", "torchvision"):
        return "torch and torchvision must come from one source: pip install --force-reinstall torch torchvision"
    command = _install(name)
    return command.replace("pip install", "pip install --force-reinstall --no-deps")


def _describe(error: BaseException) -> str:
    """The kind of the error and the first line of its text."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}"


if __name__ == "__main__":
    sys.exit(main())
