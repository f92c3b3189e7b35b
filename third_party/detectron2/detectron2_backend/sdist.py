"""The source release: fetched by hash, or read from a local copy; never unpacked to disk, never executed."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import ModuleType
from urllib.parse import urlsplit

from .errors import BuildError

REQUIREMENT = "detectron2-cdo==0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
DOWNLOADER = "unearth>=0.19,<1"
LOCAL_COPY = "DETECTRON2_SDIST"
"""Environment variable: path of a local copy of the release, for machines without a package index."""


def read_release() -> dict[str, bytes]:
    """The files of the source release as {path below its top folder: content}.

    Raises:
        BuildError: the release cannot be read or fetched, or is not the one that this project was written for.
    """
    return read_archive(read_local_copy() or download())


def read_local_copy() -> bytes | None:
    """The verified archive that DETECTRON2_SDIST names; None where the variable is not set.

    Raises:
        BuildError: there is no such file, or its sha256 is not that of the release.
    """
    name = os.environ.get(LOCAL_COPY)
    if not name:
        return None
    path = Path(name).expanduser().absolute()  # installers run us in another folder than the user's: show which
    if not path.is_file():
        raise BuildError(f"{LOCAL_COPY} names {path}, which is not a file; give the full path of the source release")
    return verified(path.read_bytes(), f"{LOCAL_COPY}={path}")


def verified(archive: bytes, source: str) -> bytes:
    """`archive` itself; BuildError if its sha256 is not that of the release."""
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        raise BuildError(f"{source} has sha256 {found}, but the source release of {REQUIREMENT} has {SHA256}")
    return archive


def read_archive(archive: bytes) -> dict[str, bytes]:
    """Regular files of a .tar.gz, read in memory, as {path below its top folder: content}.

    Raises:
        BuildError: it is no .tar.gz, or a member is a link or a device, or leads out of the archive's folder.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            return {_path_below_top(member): tar.extractfile(member).read() for member in tar if not member.isdir()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuildError(f"the source release is not a readable .tar.gz: {error}") from error


def _path_below_top(member: tarfile.TarInfo) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not member.isfile():
        raise BuildError(f"the source release holds {member.name!r}, which is not a plain file inside its folder")
    return "/".join(path.parts[1:])


def download() -> bytes:
    """The verified archive, from the first package index that has it.

    Raises:
        BuildError: no index has it (each is named with its reason), or an index serves another file under its hash.
    """
    unearth, problems = _downloader(), []
    for index in index_urls():
        shown = _without_credentials(index)
        try:
            archive = _fetch(unearth, index)
        except Exception as error:  # whatever the network or the index does: try the next one, then name them all
            problems.append(f"{shown}: {error or type(error).__name__}")
        else:
            return verified(archive, f"the file from {shown}")
    raise BuildError(
        f"no package index gave {REQUIREMENT} ({'; '.join(problems)}). Set PIP_INDEX_URL to an index that has it, "
        f"or {LOCAL_COPY} to the path of a local copy of its source release"
    )


def index_urls() -> list[str | None]:
    """Where to look, in this order: PIP_INDEX_URL (None: the downloader's default), each of PIP_EXTRA_INDEX_URL."""
    return [os.environ.get("PIP_INDEX_URL") or None, *os.environ.get("PIP_EXTRA_INDEX_URL", "").split()]


def _downloader() -> ModuleType:
    """The package unearth, told to trust the certificates that pip is told to trust."""
    try:
        import unearth
    except ModuleNotFoundError as error:
        raise BuildError(
            f"the Python package {error.name} is missing; without build isolation, run: pip install '{DOWNLOADER}'"
        ) from error
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if os.environ.get(name):
            os.environ.setdefault("SSL_CERT_FILE", os.environ[name])
    return unearth


def _fetch(unearth: ModuleType, index: str | None) -> bytes:
    finder = unearth.PackageFinder(
        index_urls=[index] if index else [],
        trusted_hosts=os.environ.get("PIP_TRUSTED_HOST", "").split(),
        no_binary=[":all:"],
    )
    best = finder.find_best_match(REQUIREMENT, hashes={"sha256": [SHA256]}).best
    if best is None:
        raise LookupError(f"no file of {REQUIREMENT} with sha256 {SHA256}")
    with tempfile.TemporaryDirectory() as folder:
        return finder.download(best.link, folder, hashes={}).read_bytes()


def _without_credentials(index: str | None) -> str:
    if index is None:
        return "the default index"
    url = urlsplit(index)
    return url._replace(netloc=url.netloc.rpartition("@")[2]).geturl()
