"""Runs on a real SLURM cluster of two nodes on this machine: by srun, by submitit, and as torchrun runs them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ranks import ROOT
from runs import assert_equal_runs
from slurm_cluster import NODES, slurm_cluster, why_not
from tiny import NETWORK, TASKS, need_tasks

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.cluster import expand_hosts
from mtl_rcnn.engine.progress import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}")]

TRAINED = ("detection", "mask", "keypoint")
SUBMITIT = [
    *("hydra/launcher=submitit_slurm", "cluster=slurm", "cluster.gpus_per_node=null"),
    *("cluster.tasks_per_node=1", "cluster.timeout_min=5"),
]
SRUN = ["srun", "--nodes=2", "--ntasks=2"]
LONG = ["solver.max_iter=18", "solver.log_period=1", "solver.eval_period=9"]
"""Time enough to stop a run."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of commands on the cluster, with a secret in it."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": "do not tell"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shape Scenes, a few and small."""
    folder = tmp_path_factory.mktemp("scenes")
    command = ["datasets/shape_scenes.py", "--out", str(folder), "--train", "8", "--val", "6", "--size", "96x64"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=100)
    return folder


def train_command(scenes: Path, folder: Path | None, *more: str) -> list[str]:
    """Trains a tiny network for three iterations, four images each, into a folder or where it goes by default."""
    return [
        *(sys.executable, "-W", "ignore", str(ROOT / "tools" / "train_net.py")),
        *("data=shapes", f"data.root={scenes}", "data.workers=0"),
        *(*NETWORK, *TASKS["detection"], "tasks.detection.score_thresh=0", "device=cpu", "threads=1"),
        *("solver.batch_size=4", "solver.max_iter=3", "solver.steps=[0.9]", "solver.warmup_iters=0", "solver.lr=0.01"),
        *("solver.eval_period=0", "solver.checkpoint_period=0", "report.enabled=false", "evaluation.samples=0"),
        *("data.train_augment.resize.short_edge_length=[64]", "data.test_augment.resize.short_edge_length=64"),
        *([f"output_dir={folder}", f"hydra.sweep.dir={folder}_jobs"] if folder else []),
        *more,
    ]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def succeed(command: list[str], environment: dict[str, str]) -> str:
    done = run(command, environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(cluster: dict[str, str], scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of one training on two ranks, started in each way."""
    need_tasks(*TRAINED)
    folder = tmp_path_factory.mktemp("runs")
    knobs = [f"tasks=[{','.join(TRAINED)}]", *TASKS["mask"], *TASKS["keypoint"]]
    commands = {name: train_command(scenes, folder / name, *knobs) for name in ("srun", "torchrun", "submitit")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    succeed([*SRUN, *commands["srun"], "cluster=slurm"], cluster)
    succeed([*torchrun, *commands["torchrun"][3:]], cluster)
    succeed([*commands["submitit"], *SUBMITIT, "cluster.nodes=2", "-m"], cluster)
    return {"srun": folder / "srun", "torchrun": folder / "torchrun", "submitit": folder / "submitit" / "0"}


def test_srun_submitit_and_torchrun_give_the_same_weights_and_metrics(runs: dict[str, Path]) -> None:
    weights = {way: checkpoints.load(folder / "model_0000003.pth")["model"] for way, folder in runs.items()}
    metrics = {way: json.loads((folder / "metrics.json").read_text()) for way, folder in runs.items()}
    assert {f"shapes_val/{task}/AP" for task in TRAINED} <= set(metrics["srun"])
    for way in ("submitit", "torchrun"):
        assert weights[way].keys() == weights["srun"].keys()
        assert all(torch.equal(tensor, weights[way][name]) for name, tensor in weights["srun"].items()), way
        assert metrics[way] == metrics["srun"]


def test_metrics_are_of_the_images_of_both_nodes(runs: dict[str, Path], scenes: Path) -> None:
    truth = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    for task in TRAINED:
        rows = json.loads((runs["srun"] / "predictions" / f"shapes_val_{task}.json").read_text())
        assert {row["image_id"] for row in rows} == {image["id"] for image in truth["images"]}


@pytest.mark.parametrize("way", ["srun", "submitit"])
def test_one_folder_holds_the_run_of_all_ranks(way: str, runs: dict[str, Path]) -> None:
    folder = runs[way]
    hosts = json.loads((folder / "hosts.json").read_text())
    assert [(host["rank"], host["node"], host["local_rank"]) for host in hosts] == [(0, NODES[0], 0), (1, NODES[1], 0)]
    assert "batch 2 ranks x 2 images = 4" in (folder / "log.txt").read_text()
    assert "shapes_train" in (folder / "log_rank_1.txt").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["SLURM_STEP_NUM_TASKS"] == "2"
    assert environment["WANDB_API_KEY"] == "<redacted>"
    assert not [path for path in folder.rglob("*") if path.is_file() and b"do not tell" in path.read_bytes()]


def test_a_run_of_srun_is_exported_by_srun(runs: dict[str, Path], cluster: dict[str, str], tmp_path: Path) -> None:
    state = checkpoints.load(runs["srun"] / "model_0000003.pth")
    state["config"]["tasks"]["detection"]["score_thresh"] = 0.3  # a certificate needs an input without detections
    torch.save(state, tmp_path / "model.pth")
    export = [sys.executable, "-W", "ignore", "tools/export_model.py", f"run={tmp_path / 'model.pth'}"]
    succeed(["srun", "--ntasks=1", *export, "certificate.min_detections=0"], cluster)
    assert (tmp_path / "model.ts").is_file()


def test_a_sweep_over_tasks_and_balancing_is_four_jobs(cluster: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    need_tasks("mask")
    command = train_command(scenes, tmp_path / "sweep", "data.val=[]", "solver.max_iter=1", "solver.steps=[]")
    swept = ["tasks=[detection],[detection,mask]", "balancing=sum,uncertainty"]
    succeed([*command, *SUBMITIT, *swept, "-m"], cluster)
    states = [checkpoints.load(tmp_path / "sweep" / job / "model_0000001.pth") for job in "0123"]
    found = [(sorted(state["config"]["tasks"]), state["config"]["balancing"]["_target_"]) for state in states]
    assert [tasks for tasks, _ in found] == [["detection"]] * 2 + [["detection", "mask"]] * 2
    assert len({str(choice) for choice in found}) == 4


@pytest.fixture(scope="module")
def whole(cluster: dict[str, str], scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeed([*SRUN, *train_command(scenes, folder, *LONG, "cluster=slurm")], cluster)
    return folder


def test_a_job_that_is_preempted_three_times_equals_the_uninterrupted_one(
    whole: Path, cluster: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    """By `scancel --signal`, as SLURM itself does before it takes the nodes away; the job requeues itself, and finds
    its run, of the second step of its script, in the default folder."""
    script = tmp_path / "job.sh"
    training = shlex.join([*SRUN, *train_command(scenes, None, *LONG, "cluster=slurm")])
    script.write_text(f"#!/bin/bash\nsrun true\n{training}\n")
    submit = ["sbatch", "--parsable", "--requeue", "--nodes=2", "--ntasks=2", "--open-mode=append"]
    job = succeed([*submit, f"--chdir={tmp_path}", f"--output={tmp_path}/out", str(script)], cluster).strip()
    folder = tmp_path / "outputs" / f"slurm_{job}_1"
    for stop in range(1, 4):
        _wait(lambda: _iterations(folder / "metrics.jsonl") >= 4 * stop, tmp_path / "out")  # noqa: B023
        succeed(["scancel", "--signal=USR1", job], cluster)
        _wait(lambda: f"Restarts={stop} " in succeed(["scontrol", "show", "job", job], cluster), tmp_path / "out")  # noqa: B023
    _wait(lambda: "JobState=COMPLETED" in succeed(["scontrol", "show", "job", job], cluster), tmp_path / "out")
    said = (tmp_path / "out").read_text()
    assert said.count("stopped by SIGUSR1; the same command") == said.count(f"job {job} is requeued") == 3
    assert said.count("resuming from") == 3
    assert_equal_runs(whole, folder)
    assert list((tmp_path / "outputs").iterdir()) == [folder]


def test_a_job_of_submitit_goes_on_after_the_signal_that_submitit_asks_for(
    whole: Path, cluster: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    """The requeued job runs the same call, and whoever handed it in waits for that one's end."""
    folder, output = tmp_path / "run" / "0", tmp_path / "out"
    command = train_command(scenes, tmp_path / "run", *LONG, *SUBMITIT, "cluster.nodes=2", "-m")
    with output.open("w") as file:
        waiting = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=file, stderr=file)
    try:
        _wait(lambda: _iterations(folder / "metrics.jsonl") >= 4, output)
        job = succeed(["squeue", "--noheader", "--states=RUNNING", "--format=%i"], cluster).strip()
        succeed(["scancel", "--signal=USR2", job], cluster)
        assert waiting.wait(timeout=120) == 0, output.read_text()[-4000:]
    finally:
        waiting.kill()
    said = (folder / "log.txt").read_text()
    assert said.count("stopped by SIGUSR2; the same command") == said.count(f"job {job} is requeued") == 1
    assert said.count("resuming from") == 1
    assert_equal_runs(whole, folder)


def _iterations(log: Path) -> int:
    return read_metrics(log)[-1]["iteration"] if log.is_file() and log.stat().st_size else 0


def _wait(ready: Callable[[], bool], output: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, output.read_text()[-4000:] if output.exists() else "nothing was printed"
        time.sleep(0.2)


def test_two_tasks_without_their_cluster_are_refused(cluster: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    done = run([*SRUN, *train_command(scenes, tmp_path / "run")], cluster)
    assert done.returncode == 2
    assert "error: cluster=local: srun started 2 tasks (SLURM_STEP_NUM_TASKS=2), each of which" in done.stderr
    assert done.stderr.count("error: cluster=local") == 1, "a fault of all ranks is told by one"
    assert not (tmp_path / "run").exists()


def test_a_failure_on_one_node_ends_both(cluster: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    done = run([*SRUN, *train_command(scenes, tmp_path / "run", "solver.lr=1e12", "cluster=slurm")], cluster)
    assert done.returncode != 0
    ((rank, host),) = re.findall(r"^error on rank (\d) \((.*?)\): ", done.stderr, re.MULTILINE)
    assert host == NODES[int(rank)], done.stderr


def test_a_batch_script_may_run_one_process_or_torchrun(cluster: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    read = (
        "from mtl_rcnn.engine.cluster import find_place; import os; p = find_place('local', os.environ); print(p.world)"
    )
    script.write_text(
        f'#!/bin/bash\n{sys.executable} -c "{read}"\n'
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 --no-python "
        f'{sys.executable} -c "{read}"\n'
    )
    succeed(["sbatch", "--wait", "--nodes=2", "--ntasks=2", f"--output={tmp_path}/out", str(script)], cluster)
    assert (tmp_path / "out").read_text().split() == ["1", "2", "2"]


@pytest.mark.parametrize("text", ["n1", "n[08-11]", "a[1-2,7],b,c[3]", "rack[0-1]node[2-3]", "127.0.0.[1-2]"])
def test_node_lists_are_read_as_slurm_reads_them(text: str, cluster: dict[str, str]) -> None:
    assert expand_hosts(text) == succeed(["scontrol", "show", "hostnames", text], cluster).split()
