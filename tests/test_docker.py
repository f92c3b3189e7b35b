"""What of docker/ can be checked without a container engine: the recipe's form and install steps, the entry
point's signals, the compose file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
TARGETS = ("cpu", "cuda")
INSTALL = "make setup"
VOLUMES = ["/opt/mtl-rcnn/outputs", "/data"]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of each stage -> what it is made from, its instructions (keyword, rest)."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for keyword, rest in (line.split(maxsplit=1) for line in joined.splitlines() if line.strip()):
        if keyword == "FROM":
            base, name = rest.split(" AS ")
            found[name] = (base, [])
        else:
            found[name][1].append((keyword, rest))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """Instructions of a stage after those of the stages it is made from."""
    base, own = stages()[name]
    return [*(lineage(base) if base in stages() else []), *own]


def of(name: str, keyword: str) -> list[str]:
    return [rest for word, rest in lineage(name) if word == keyword]


def test_bases_are_pinned() -> None:
    bases = {base for base, _ in stages().values()} - stages().keys()
    assert bases
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base), f"{base} is not one version of one image"


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_user_of_any_number(target: str) -> None:
    assert of(target, "USER") == ["$UID:$GID"]
    assert {"UID=1000", "GID=1000"} <= {*of(target, "ARG")}
    assert [word for word, _ in lineage(target)].index("ARG") < [word for word, _ in lineage(target)].index("USER")


@pytest.mark.parametrize("target", TARGETS)
def test_install_steps_are_the_readmes(target: str) -> None:
    (copied,) = (rest for rest in of(target, "COPY") if rest.startswith("--from="))
    build = copied.split()[0].removeprefix("--from=")
    assert of(build, "COPY") == [". ."]
    assert of(build, "RUN") == [INSTALL]
    assert f"`{INSTALL}`" in (ROOT / "README.md").read_text()
    assert all("pip" not in step for step in of(target, "RUN")), "nothing is installed beside it"


def test_python_is_the_same_where_it_is_installed_and_where_it_runs() -> None:
    assert stages()["runtime"][0] == stages()["clone"][0].replace("-bookworm", "-slim-bookworm")


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_image_starts_is_in_the_clone(target: str) -> None:
    (entry,) = (yaml.safe_load(text) for text in of(target, "ENTRYPOINT"))
    assert entry[:2] == ["/usr/bin/tini", "--"]
    script = ROOT / Path(entry[2]).relative_to("/opt/mtl-rcnn")
    assert os.access(script, os.X_OK)
    assert yaml.safe_load(of(target, "VOLUME")[0]) == VOLUMES
    for folder in VOLUMES:
        assert any(folder in step for step in of(target, "RUN")), f"{folder} is not made for the user"


def test_cuda_image_asks_for_the_driver_that_its_wheels_need() -> None:
    (settings,) = (rest for rest in of("cuda", "ENV") if "NVIDIA" in rest)
    values = dict(pair.split("=", 1) for pair in settings.split())
    assert values["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= {*values["NVIDIA_DRIVER_CAPABILITIES"].split(",")}
    assert re.fullmatch(r"cuda>=\d+\.\d+", values["NVIDIA_REQUIRE_CUDA"])


CHILD = """
import os, signal, time
def end(number, frame):
    os.write(1, b"got %d\\n" % number)
    os._exit(7)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), os.environ["HOME"], os.environ["USER"], flush=True)
time.sleep(60)
"""


def _start(folder: Path, **environment: str) -> subprocess.Popen:
    command = [str(ROOT / "docker" / "entrypoint.sh"), sys.executable, "-c", CHILD]
    variables = {"PATH": os.environ["PATH"], **environment}
    return subprocess.Popen(command, cwd=folder, env=variables, text=True, stdout=-1, stderr=-1)


def test_entry_point_passes_signals_on(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    with _start(tmp_path, HOME="/nowhere") as process:
        number, home, user = process.stdout.readline().split()
        assert int(number) == process.pid, "the command takes the script's place"
        assert (home, user) == ("/tmp", "trainer")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == f"got {signal.SIGTERM.value}\n"
    assert process.returncode == 7


def test_entry_point_says_what_it_may_not_write_to(tmp_path: Path) -> None:
    with _start(tmp_path, HOME=str(tmp_path)) as process:
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert said.startswith(f"error: user {os.getuid()} may not write to {tmp_path}/outputs; mount")


def test_compose_file_names_what_there_is() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert services.keys() == {"train", "train-cpu", "tensorboard"}
    for service in services.values():
        build = service["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
        assert service["image"] == f"mtl-rcnn:{build['target']}"
        assert build["target"] in TARGETS
        assert service["user"] == "${USER_ID:-1000}:${GROUP_ID:-1000}"
        assert [volume.removesuffix(":ro").split(":")[-1] for volume in service["volumes"]] == VOLUMES
        for script in re.findall(r"tools/\w+\.py", str(service["command"])):
            assert (ROOT / script).is_file()
    assert all("shm_size" in services[name] for name in ("train", "train-cpu"))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
