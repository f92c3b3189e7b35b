"""From the source release to the files of the installed package."""

from __future__ import annotations

from pathlib import Path

from .errors import BuildError
from .substitutions import SUBSTITUTIONS, substitute
from .wheel import DIST_INFO, PROJECT, WHEEL, metadata

PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
"""Folder in the release -> folder in the package: the three projects that Detectron2 installs with itself."""

CHANGED = f"# Changed from Detectron2 0.5; the file CHANGES of {DIST_INFO} says what and why.\n".encode()


def package_files(release: dict[str, bytes]) -> dict[str, bytes]:
    """{path in site-packages: content} made of the release's files, edited as substitutions.py says.

    Raises:
        BuildError: a file of the release that we rely on is missing, or a substitution does not fit.
    """
    files = {_installed(path): content for path, content in release.items() if _installed(path)}
    for path in ("LICENSE", "detectron2/__init__.py"):
        if path not in release:
            raise BuildError(f"the source release has no {path}")
    substitute(files)
    for path in {edit.path for edit in SUBSTITUTIONS}:
        files[path] = CHANGED + files[path]
    files["detectron2/_C.py"] = Path(__file__).with_name("compiled_stub.py").read_bytes()
    return files | {f"{DIST_INFO}/{name}": content for name, content in _dist_info(release["LICENSE"]).items()}


def change_notice() -> str:
    """What Apache-2.0 section 4(b) asks for: every changed file, with the reason."""
    lines = [
        f"{PROJECT['name']} {PROJECT['version']} is Detectron2 0.5 (Apache-2.0, see LICENSE) with these changes.",
        "Added: detectron2/_C.py, which replaces the compiled module. Changed:",
        "",
        *(f"{edit.path}: {edit.reason} ({edit.count} x)" for edit in SUBSTITUTIONS),
    ]
    return "\n".join(lines) + "\n"


def _installed(path: str) -> str | None:
    """Where a file of the release belongs in site-packages; None for files that are not installed."""
    if not path.endswith((".py", ".yaml")):
        return None
    for source, target in PROJECTS.items():
        if path.startswith(source):
            return target + path[len(source) :]
    return path if path.startswith("detectron2/") else None


def _dist_info(license_text: bytes) -> dict[str, bytes]:
    return {
        "METADATA": metadata().encode(),
        "WHEEL": WHEEL.encode(),
        "licenses/LICENSE": license_text,
        "licenses/CHANGES": change_notice().encode(),
    }
