"""The image's install steps, taken out of the recipe and executed in a clean directory: what the image starts runs
there, without git, make or anything else that only the building needs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template

import pytest
import yaml
from test_docker import DOCKERFILE, ROOT, lineage, of

INSIDE = "/opt/mtl-rcnn"
"""Where the clone lies in the image."""

PIPS = re.compile(r"PIP_\w+|\w+_PROXY|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|DETECTRON2_SDIST", re.IGNORECASE)
"""Variables that tell pip, and what third_party/detectron2 fetches with, where packages come from on this machine."""

SCENES = ["python", "datasets/shape_scenes.py", "--out", "outputs/scenes", "--train", "4", "--val", "2"]
TRAIN = [
    *("python", "tools/train_net.py", "experiment=shapes", "data.root=outputs/scenes", "output_dir=outputs/run"),
    *("solver.max_iter=2", "solver.steps=[]", "solver.warmup_iters=0", "solver.batch_size=2", "solver.eval_period=0"),
    *("device=cpu", "threads=1", "data.workers=1", "report.images=1"),
]
"""Generated scenes, and two iterations on them with an evaluation and a report."""


@pytest.mark.slow
def test_the_recipe_s_steps_give_what_the_image_starts(tmp_path: Path) -> None:
    """The image with CUDA's libraries: its packages are PyPI's alone."""
    clone, home, nothing = (tmp_path / name for name in ("clone", "home", "nothing"))
    for folder in (home, nothing):
        folder.mkdir()
    try:
        _copy_context(clone)
        python = Path(sys.base_prefix, "bin")
        given = {"HOME": str(home), "PATH": f"{python}:/usr/bin:/bin"}
        build = {**given, **_settings("build-cuda", clone, given["PATH"]), **_of_pip()}
        for step in of("build-cuda", "RUN"):
            _run(["/bin/sh", "-c", step], clone, build)
        (clone / "outputs").mkdir()  # the last step that the image takes as root

        container = {"HOME": str(home), **_settings("cuda", clone, str(nothing))}
        said = _start(yaml.safe_load(of("cuda", "CMD")[0]), clone, container)
        assert f" in {clone / 'mtl_rcnn'}\n" in said
        assert "everything is in place" in said
        _start(SCENES, clone, container)
        _start(TRAIN, clone, container)
        run = clone / "outputs" / "run"
        assert {"model_0000002.pth", "metrics.json", "report.html"} <= {path.name for path in run.iterdir()}
        assert "\ngit: unknown\n" in (run / "command.txt").read_text()
    finally:
        shutil.rmtree(clone, ignore_errors=True)  # 6 GB


def _copy_context(folder: Path) -> None:
    """`COPY . .` of a fresh clone: what git knows, of which Dockerfile.dockerignore leaves out nothing."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.strip("\0").split("\0"):
        assert not _left_out(name), f"{name} would not come into the image"
        if (ROOT / name).is_file():  # not removed since it was added
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def _left_out(name: str) -> bool:
    """Whether Docker leaves out a path: the last line that fits it says so. A slash at a line's end means nothing to
    Docker, other than to git."""
    said = False
    for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines():
        pattern = re.escape(line.removeprefix("!").rstrip("/")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if not line.startswith("#") and re.fullmatch(f"{pattern}(/.*)?", name):
            said = not line.startswith("!")
    return said


def _settings(stage: str, clone: Path, path: str) -> dict[str, str]:
    """The variables that a stage sets, with the clone where it lies here, and `path` as what was PATH before."""
    pairs = [pair.split("=", 1) for rest in of(stage, "ENV") for pair in shlex.split(rest)]
    return {name: Template(value).substitute(PATH=path).replace(INSIDE, str(clone)) for name, value in pairs}


def _of_pip() -> dict[str, str]:
    """What this machine tells pip. A user's own pip.conf counts, although HOME is another."""
    found = {name: value for name, value in os.environ.items() if PIPS.fullmatch(name)}
    own = [Path.home() / ".config" / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"]
    there = [str(path) for path in own if path.is_file()]
    return {**({"PIP_CONFIG_FILE": there[0]} if there else {}), **found}


def _start(command: list[str], clone: Path, environment: Mapping[str, str]) -> str:
    """Through the image's entry point, but for tini."""
    entry = yaml.safe_load(of("cuda", "ENTRYPOINT")[0])[-1].replace(INSIDE, str(clone))
    return _run([entry, *command], clone, environment)


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def test_the_two_images_are_built_alike_but_for_an_index() -> None:
    cpu, cuda = lineage("build-cpu"), lineage("build-cuda")
    assert [step for step in cpu if step not in cuda] == [
        ("ENV", "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu")
    ]
    assert all(step in cpu for step in cuda)


def test_what_docker_leaves_out() -> None:
    for name in (".git/HEAD", ".venv/bin/python", "a/b/__pycache__/c.pyc", "__pycache__/c.pyc", "mtl_rcnn.egg-info/x"):
        assert _left_out(name), name
    assert _left_out("datasets/shape_scenes_text/train/000000000001.png")
    for name in ("Makefile", "datasets/shape_scenes.py", "docker/entrypoint.sh", "tools/setup_environment.py"):
        assert not _left_out(name), name
