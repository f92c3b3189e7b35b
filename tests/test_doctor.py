"""The doctor on this machine, and in environments where packages are missing, broken, or of another version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mtl_rcnn import doctor
from mtl_rcnn.doctor import Finding, as_text

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(*path: Path, options: tuple[str, ...] = (), root: Path = ROOT) -> tuple[int, str]:
    """Exit status and table of a doctor who finds packages in `path` first, and this project's in `root`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (*path, root)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "-m", "mtl_rcnn.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout


def lines_of(text: str, status: str) -> dict[str, str]:
    """What was looked at -> what was found, of all lines of a status."""
    rows = [re.split(r"\s{2,}", line.removeprefix(status).strip(), maxsplit=1) for line in text.splitlines()
            if line.startswith(f"{status} ")]  # fmt: skip
    return {row[0]: row[1] for row in rows}


def fake(folder: Path, name: str, code: str) -> Path:
    """A module that stands before the real one; returns the folder to search."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder


def test_this_environment_is_in_order() -> None:
    status, text = run_doctor()
    fine = lines_of(text, "OK")
    assert status == 0, text
    assert text.endswith("everything is in place\n")
    assert "runs" in fine["nms on cpu"]
    assert "runs" in fine["roi_align on cpu"]
    assert re.search(r"pure Python|compiled", fine["detectron2 build"])
    assert {"python", "torch", "torchvision", "pycocotools", "opencv-python", "hydra-core", "fvcore", "numpy", "pillow",
            "disk"} <= fine.keys()  # fmt: skip
    assert "<3" in fine["numpy"], "the range of the project's own metadata"


@pytest.mark.parametrize("metadata", [False, True])
def test_nothing_installed_is_told_not_crashed_on(metadata: bool, tmp_path: Path) -> None:
    """Without the project's metadata, and with those that an editable installation leaves in a clone."""
    (tmp_path / "mtl_rcnn").symlink_to(ROOT / "mtl_rcnn")
    if metadata:
        (tmp_path / "mtl_rcnn.egg-info").mkdir()
        (tmp_path / "mtl_rcnn.egg-info" / "PKG-INFO").write_text(
            "Metadata-Version: 2.1\nName: mtl-rcnn\nVersion: 0.1.0\n"
        )
    status, text = run_doctor(options=("-S",), root=tmp_path)
    wrong = lines_of(text, "FIX")
    assert status == 1
    assert wrong["torch"] == wrong["torchvision"] == wrong["detectron2"] == "missing"
    assert ("packaging" in wrong) == metadata
    assert ("pip install -e" in text) == (not metadata)
    assert "pip install" in text.split("detectron2", 1)[1]


@pytest.mark.parametrize("package", ["torch", "detectron2", "packaging"])
def test_a_missing_package_is_named_with_the_command(package: str, tmp_path: Path) -> None:
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith((package + "-", package + ".")) and entry.name != package:
            (tmp_path / entry.name).symlink_to(entry)
    status, text = run_doctor(tmp_path, options=("-S",))
    assert status == 1
    assert lines_of(text, "FIX")[package] == "missing"
    assert re.search(rf"FIX  {package} .*\n +-> pip install .*{package}", text)


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("torch", "raise OSError('libgomp.so.1: cannot open shared object file')"),
        ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')"),
        ("detectron2", "import a_thing_that_is_not_there"),
        ("detectron2", ""),
        ("cv2", "raise ImportError('libGL.so.1: cannot open shared object file')"),
    ],
    ids=["library", "operator", "dependency", "hollow", "opencv"],
)
def test_a_broken_package_is_a_line_of_the_table(package: str, code: str, tmp_path: Path) -> None:
    status, text = run_doctor(fake(tmp_path, package, code))
    (broken,) = (found for what, found in lines_of(text, "FIX").items() if _is_about(what, package))
    assert status == 1
    assert "broken" in broken
    assert "-> " in text
    assert "disk" in lines_of(text, "OK"), "the checks after it are made all the same"


def _is_about(what: str, package: str) -> bool:
    """Whether a line is the package's own."""
    return what in (package, f"{package} build", {"cv2": "opencv-python"}.get(package))


def test_a_version_outside_its_range_is_told_with_the_range(tmp_path: Path) -> None:
    info = tmp_path / "numpy-1.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.20.0\n")
    status, text = run_doctor(tmp_path)
    assert status == 1
    assert list(lines_of(text, "FIX")) == ["numpy"]
    assert 'pip install "numpy<3,>=1.24"' in text


def test_torch_of_another_release_than_torchvision_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"torch": "2.8.0+cpu", "torchvision": "0.29.1"}.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy", "torch==2.14.1"])
    (finding,) = doctor._torch_pair()
    assert "expects torch ==2.14.1, has 2.8.0+cpu" in finding.found
    assert "pip install" in finding.fix
    monkeypatch.setattr(doctor, "_version", {"torch": "2.14.1+cu130", "torchvision": "0.29.1"}.get)
    assert not next(doctor._torch_pair()).fix


def test_an_operator_that_computes_nonsense_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import torchvision

    monkeypatch.setattr(torchvision.ops, "nms", lambda boxes, scores, threshold: torch.tensor([0, 1, 2]))
    findings = {finding.what: finding.fix for finding in doctor._operators(torch, "cpu", "torch")}
    assert "nms computes something else" in findings["nms on cpu"]
    assert not findings["roi_align on cpu"]


def test_little_disk_and_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**30, "total": 2**40})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert "output_dir=" in next(doctor._disk()).fix
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert "cannot be written" in next(doctor._disk()).found


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        __version__ = "2.14.1+cpu"
        version = type("version", (), {"cuda": None})

    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: ["GPU 0: NVIDIA Something"])
    assert "built without CUDA" in doctor._no_gpu(Torch).found
    Torch.version.cuda = "13.0"
    assert "nvidia-smi" in doctor._no_gpu(Torch).fix
    monkeypatch.setattr(doctor, "_nvidia_gpus", list)
    assert not doctor._no_gpu(Torch).fix


def test_a_check_that_fails_is_a_line() -> None:
    def _odd():
        yield Finding("first", "fine")
        raise KeyError("surprise")

    first, second = doctor._guarded(_odd)
    assert (first.what, second.what, second.found) == ("first", "odd", "fails: KeyError: 'surprise'")


def test_the_table_says_what_to_type_below_the_line() -> None:
    text = as_text([Finding("a", "good"), Finding("long name", "bad", "pip install x")])
    assert text.splitlines() == [
        "OK   a          good",
        "FIX  long name  bad",
        "       -> pip install x",
        "",
        "1 to fix",
    ]
