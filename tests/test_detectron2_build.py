"""third_party/detectron2: the build backend on a synthetic release (no network), on the real one; what is installed."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib
import importlib.util
import io
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

FOLDER = Path(__file__).resolve().parents[1] / "third_party" / "detectron2"
SOURCES = ("DETECTRON2_SDIST", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")


def _load_backend() -> ModuleType:
    name = "detectron2_backend"
    spec = importlib.util.spec_from_file_location(name, FOLDER / name / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


backend = _load_backend()
from detectron2_backend import package, sdist, substitutions, wheel  # noqa: E402
from detectron2_backend.errors import BuildError  # noqa: E402


@pytest.fixture(autouse=True)
def _no_sources(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test but the slow one of the real release sees the indexes and the local copy of this machine."""
    if "slow" not in request.keywords:
        for name in SOURCES:
            monkeypatch.delenv(name, raising=False)


def synthetic_release() -> dict[str, bytes]:
    """The smallest release that every substitution fits, with a project, a config and files that are not installed."""
    files = defaultdict(str)
    for edit in substitutions.SUBSTITUTIONS:
        path = next(
            (s + edit.path[len(t) :] for s, t in package.PROJECTS.items() if edit.path.startswith(t)), edit.path
        )
        files[path] += f"# {edit.reason}\n" + f"{edit.old}\n" * edit.count
    files["detectron2/__init__.py"] = '__version__ = "0.5"\n'
    files["detectron2/model_zoo/configs/a.yaml"] = "VERSION: 2\n"
    files["projects/PointRend/point_rend/__init__.py"] = "# point rend\n"
    files |= {"LICENSE": "Apache License\n", "setup.py": "raise SystemExit('executed')\n", "tools/train_net.py": "\n"}
    return {path: text.encode() for path, text in files.items()}


def archive_of(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"detectron2_cdo-0.5/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return buffer.getvalue()


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Archive of the synthetic release, which the backend takes for the real one."""
    archive = archive_of(synthetic_release())
    monkeypatch.setattr(sdist, "SHA256", hashlib.sha256(archive).hexdigest())
    return archive


@pytest.fixture
def local_copy(release: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "release.tar.gz"
    path.write_bytes(release)
    monkeypatch.setenv("DETECTRON2_SDIST", str(path))
    return path


@pytest.fixture
def index_with(tmp_path: Path) -> Callable[[bytes], str]:
    """Function that makes a package index on disk which offers the given archive; returns its URL."""

    def make(archive: bytes) -> str:
        page = tmp_path / "simple" / "detectron2-cdo"
        page.mkdir(parents=True)
        (page / "detectron2_cdo-0.5.tar.gz").write_bytes(archive)
        (page / "index.html").write_text('<a href="detectron2_cdo-0.5.tar.gz">detectron2_cdo-0.5.tar.gz</a>')
        return page.parent.as_uri()

    return make


@pytest.fixture
def closed_index() -> str:
    """URL of an index on a local port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}/simple"


def assert_one_line(error: pytest.ExceptionInfo[BuildError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# --- the wheel ---


def test_wheel_holds_the_edited_package_and_its_licence(local_copy: Path, tmp_path: Path) -> None:
    name = backend.build_wheel(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as archive:
        files = {path: archive.read(path) for path in archive.namelist()}
    info = wheel.DIST_INFO
    assert name == f"{wheel.STEM}-py3-none-any.whl"
    assert not {"setup.py", "LICENSE", "tools/train_net.py"} & set(files)
    assert files["detectron2/projects/point_rend/__init__.py"] == b"# point rend\n"
    assert files["detectron2/model_zoo/configs/a.yaml"] == b"VERSION: 2\n"
    assert files[f"{info}/licenses/LICENSE"] == b"Apache License\n"
    assert b"has_cuda" in files["detectron2/_C.py"]
    notice = files[f"{info}/licenses/CHANGES"].decode()
    for edit in substitutions.SUBSTITUTIONS:
        content = files[edit.path].decode()
        assert content.startswith("# Changed from Detectron2 0.5")
        assert content.count(edit.new) >= edit.count
        assert edit.path in notice
        assert edit.reason in notice
    assert_record_is_right(files, f"{info}/RECORD")


def assert_record_is_right(files: dict[str, bytes], record: str) -> None:
    rows = {path: (digest, size) for path, digest, size in csv.reader(files[record].decode().splitlines())}
    assert set(rows) == set(files)
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert rows[path] == (("", "") if path == record else (f"sha256={digest}", str(len(content))))


def test_same_release_gives_the_same_bytes(local_copy: Path, tmp_path: Path) -> None:
    wheels = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        wheels.append((folder / backend.build_wheel(str(folder))).read_bytes())
    assert wheels[0] == wheels[1]


def test_metadata_needs_no_release_and_equals_that_of_the_wheel(
    release: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = backend.prepare_metadata_for_build_wheel(str(tmp_path))  # neither an index nor a local copy is set
    prepared = (tmp_path / info / "METADATA").read_bytes()
    (tmp_path / "release.tar.gz").write_bytes(release)
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "release.tar.gz"))
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as archive:
        assert archive.read(f"{info}/METADATA") == prepared
    message = Parser().parsestr(prepared.decode())
    assert Version(message["Version"]).local, "a version without local part could be uploaded by anybody"
    names = {Requirement(text).name.lower() for text in message.get_all("Requires-Dist")}
    assert {"torch", "torchvision", "numpy", "pillow", "pycocotools", "fvcore"} <= names


def test_downloader_is_required_only_without_local_copy(
    release: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [Requirement(text).name for text in backend.get_requires_for_build_wheel()] == ["unearth"]
    (tmp_path / "release.tar.gz").write_bytes(release)
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "release.tar.gz"))
    assert backend.get_requires_for_build_wheel() == []


# --- substitutions ---


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"detectron2/a.py": b"nothing"}, ("detectron2/a.py", "'old'", "0 times", "expected 1")),
        ({"detectron2/a.py": b"old old"}, ("detectron2/a.py", "'old'", "2 times", "expected 1")),
        ({}, ("no detectron2/a.py",)),
    ],
    ids=["text missing", "text twice", "file missing"],
)
def test_substitution_that_does_not_fit_is_an_error(files: dict[str, bytes], words: tuple[str, ...]) -> None:
    edit = substitutions.Substitution("detectron2/a.py", "old", "new", count=1, reason="test")
    with pytest.raises(BuildError) as error:
        substitutions.substitute(files, (edit,))
    assert_one_line(error, *words)


def test_release_without_licence_is_an_error() -> None:
    files = synthetic_release()
    del files["LICENSE"]
    with pytest.raises(BuildError) as error:
        package.package_files(files)
    assert_one_line(error, "no LICENSE")


# --- the release: hash, archive, index ---


def test_local_copy_with_another_hash_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "other.tar.gz"
    path.write_bytes(b"something else")
    monkeypatch.setenv("DETECTRON2_SDIST", str(path))
    for hook in (backend.get_requires_for_build_wheel, lambda: backend.build_wheel(str(tmp_path))):
        with pytest.raises(BuildError) as error:
            hook()
        assert_one_line(error, str(path), hashlib.sha256(b"something else").hexdigest(), sdist.SHA256)


def test_missing_local_copy_is_an_error_with_the_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_SDIST", "absent.tar.gz")
    with pytest.raises(BuildError) as error:
        backend.build_wheel(str(tmp_path))
    assert_one_line(error, "DETECTRON2_SDIST", str(tmp_path / "absent.tar.gz"), "not a file")


def unsafe_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        unsafe_member("top/../../outside.py", tarfile.REGTYPE),
        unsafe_member("/outside.py", tarfile.REGTYPE),
        unsafe_member("top/detectron2/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        unsafe_member("top/detectron2/hard.py", tarfile.LNKTYPE, "top/LICENSE"),
        unsafe_member("top/detectron2/device", tarfile.CHRTYPE),
    ],
    ids=["parent", "absolute", "symlink", "hard link", "device"],
)
def test_unsafe_archive_member_is_refused(member: tarfile.TarInfo) -> None:
    with pytest.raises(BuildError) as error:
        sdist.read_archive(archive_of({"LICENSE": b""}, member))
    assert_one_line(error, member.name)


def test_damaged_archive_is_refused(release: bytes) -> None:
    for damaged in (b"no archive at all", release[: len(release) // 2]):
        with pytest.raises(BuildError) as error:
            sdist.read_archive(damaged)
        assert_one_line(error, "not a readable .tar.gz")


def test_release_is_fetched_from_the_next_index_when_one_is_unreachable(
    release: bytes, index_with: Callable[[bytes], str], closed_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", closed_index)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index_with(release))
    assert sdist.read_release() == synthetic_release()


def test_index_that_offers_another_file_is_an_error(
    release: bytes, index_with: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_with(b"something else")
    monkeypatch.setenv("PIP_INDEX_URL", index)
    with pytest.raises(BuildError) as error:
        sdist.read_release()
    assert_one_line(error, index, sdist.SHA256, "DETECTRON2_SDIST")


def test_unreachable_index_ends_the_build_with_one_line(closed_index: str, tmp_path: Path) -> None:
    """In a process of its own, as pip runs it: what the user reads is what the process prints."""
    code = f"import detectron2_backend; detectron2_backend.build_wheel({str(tmp_path)!r})"
    environment = {name: value for name, value in os.environ.items() if name not in SOURCES}
    environment |= {"PIP_INDEX_URL": closed_index, "PYTHONPATH": str(FOLDER)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert closed_index.replace("user:secret@", "") in result.stderr
    assert "secret" not in result.stderr
    assert "DETECTRON2_SDIST" in result.stderr


# --- the real thing ---


def test_stub_names_the_missing_operator() -> None:
    spec = importlib.util.spec_from_file_location("stub", FOLDER / "detectron2_backend" / "compiled_stub.py")
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    assert stub.has_cuda() is False
    assert "none" in stub.get_compiler_version()
    with pytest.raises(AttributeError, match=r"detectron2\._C\.box_iou_rotated is a compiled operator"):
        stub.box_iou_rotated  # noqa: B018


@pytest.mark.slow
def test_real_release_builds_and_imports(tmp_path: Path) -> None:
    """Needs DETECTRON2_SDIST or a package index; fails without either, with the backend's own message."""
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import detectron2._C, detectron2.model_zoo, detectron2.projects.point_rend, detectron2.projects.deeplab
config = detectron2.model_zoo.get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")
print(detectron2.__file__, config.MODEL.KEYPOINT_ON, detectron2._C.has_cuda())
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "site" / "detectron2" / "__init__.py"), "True", "False"]


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "config", "data", "engine", "evaluation", "export", "layers", "model_zoo", "modeling", "structures"],
)
def test_installed_detectron2_imports(name: str) -> None:
    """Whichever Detectron2 is installed, ours or an official build."""
    module = importlib.import_module(f"detectron2.{name}")
    assert [entry for entry in dir(module) if not entry.startswith("_")]


def test_installed_detectron2_finds_its_configs() -> None:
    from detectron2 import model_zoo

    config = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    assert config.MODEL.MASK_ON
