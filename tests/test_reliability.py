"""Whole runs that end in the middle: killed, told to stop, on other numbers of ranks, on disks that take no more."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fail_run import FAULTS, fail
from kill_run import kill_until
from omegaconf import DictConfig, OmegaConf, open_dict
from ranks import ROOT, fork_ranks, run_ranks, start_forks
from runs import assert_equal_runs
from test_train import toy_config
from tiny import NETWORK, TASKS, need_tasks
from toy import Toy

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.checkpoint import Checkpointer, load
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.replay import replay
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.errors import ConfigError

STOPPED = 128 + signal.SIGUSR1


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(toy: Toy, tmp_path: Path) -> None:
    counts = kill_until(toy, tmp_path, kills=4, seed=3)
    assert counts["kills"] == 4
    assert counts["in writing"] >= 1


@pytest.mark.slow
def test_other_numbers_of_ranks_go_on_with_the_same_samples(toy: Toy, tmp_path: Path) -> None:
    options = ["solver.batch_size=4", "solver.max_iter=6", "solver.lr=0.0005", "solver.checkpoint_period=0"]
    # Not batch norm, whose statistics are those of a rank's share.
    options += ["data.val=[]", "model.backbone.norm=GN", "model.backbone.width=32"]

    def run(name: str, world: int, told: int = -1, when: int = -1) -> list[int]:
        cfg = of_one_size(toy_config(toy, tmp_path / name, *options, tasks=("detection",)))
        return fork_ranks(partial(train_noting, cfg, tmp_path / f"{name}.jsonl", told, when), world)

    assert run("whole", 1) == [0]
    # Only rank 1 is told: both end after the same iteration, 128 + the signal that came or, on the other, SIGTERM.
    assert run("parts", 2, told=1, when=1) == [128 + signal.SIGTERM, STOPPED]
    assert load(Checkpointer(tmp_path / "parts", keep=1).latest())["iteration"] == 2
    assert run("parts", 1, told=0, when=3) == [STOPPED]
    assert load(Checkpointer(tmp_path / "parts", keep=1).latest())["iteration"] == 4
    assert run("parts", 4) == [0] * 4
    whole, parts = (seen(tmp_path / f"{name}.jsonl") for name in ("whole", "parts"))
    assert parts == whole
    assert [len(batch) for batch in whole] == [4] * 6
    curves = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [row["iteration"] for row in curves[1]] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(*curves):
        common = one.keys() & other.keys()  # several ranks log less than one
        assert {"total", "lr", "grad_norm", "detection/rpn_cls"} <= common
        assert [other[name] for name in common] == pytest.approx([one[name] for name in common], rel=1e-4)
    weights = [load(tmp_path / name / "model_0000006.pth")["model"] for name in ("whole", "parts")]
    assert all(torch.allclose(value, weights[1][name], atol=1e-4) for name, value in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_both_with_one_message(fault: str, tmp_path: Path) -> None:
    end = fail(tmp_path, fault, "cluster.heartbeat_s=3")
    statuses, message = {
        "an exception in a task's code": (
            [1, 1],
            r"StepError: iteration 2, rank 1: ValueError: surprise \(in mask\); ",
        ),
        "an image deleted while training": (None, r".*13\.png \(dataset 'toy', image id 13\): no such image file"),
        "a loader's worker killed": ([1, 2], r"data.workers: a worker was killed by SIGKILL.*; where memory runs out"),
        "the rank killed": ([1, -signal.SIGKILL], r"its process was killed \(by SIGKILL where memory runs out\)"),
        "the rank stopped": ([1, -signal.SIGKILL], r"its process has been stopped \(SIGSTOP\) for 3 s"),
    }[fault]
    assert end.statuses == statuses or (statuses is None and sorted(end.statuses) == [1, 2]), end.said
    assert max(end.seconds) < 30
    (said,) = end.errors
    assert re.match(rf"error on rank [01] \({socket.gethostname()}\): {message}", said)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert said in log
    assert "Thread 0x" in log, "where each thread of rank 0 was"


def test_a_step_that_nobody_foresaw_to_fail_can_be_seen_again(tmp_path: Path) -> None:
    end = fail(tmp_path, "an exception in a task's code")
    (said,) = end.errors
    images, file = re.search(r"; images: (.*); lr 0\.005; see the step again with: .*replay (\S+)$", said).groups()
    model, samples = replay(Path(file))
    assert ", ".join(f"{sample['dataset']}/{sample['image_id']}" for sample in samples) == images
    losses, _ = model(samples)
    assert all(torch.isfinite(value) for value, _ in losses.values()), "the fault was the code's"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_from_the_last_checkpoint(nodes: int, toy: Toy, tmp_path: Path) -> None:
    """With several nodes each has its own torchrun, which counts its own failures."""
    options = ["data.val=[]", "solver.max_iter=6", "solver.checkpoint_period=2"]
    whole, restarted = (toy_config(toy, tmp_path / name, *options, tasks=("detection",)) for name in ("whole", "again"))
    OmegaConf.save(restarted, tmp_path / "config.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = f"--rdzv-endpoint=127.0.0.1:{probe.getsockname()[1]}"
    torchrun = [
        *("-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", "--max-restarts=2"),
        *("--rdzv-backend=c10d", meet, "--rdzv-id=test", "--local-addr=127.0.0.1"),
    ]
    command = [*torchrun, str(ROOT / "tests/restart_worker.py"), str(tmp_path / "config.yaml")]
    statuses, outputs = zip(*run_ranks(command, nodes))
    assert set(statuses) == {0}, outputs
    assert "".join(outputs).count(f"resuming from {tmp_path / 'again' / 'model_0000002.pth'} after iteration 2") == 1
    assert fork_ranks(partial(train, whole), 2) == [0, 0]
    assert_equal_runs(tmp_path / "whole", tmp_path / "again")


@pytest.mark.slow
def test_a_full_disk_ends_both_ranks_and_with_room_the_run_goes_on(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--mount", "--map-root-user"]
    tried = subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no disk of 8 MB can be made here: {tried.stderr.decode()}")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    script = [*own_mounts, sys.executable, "-W", "ignore", str(ROOT / "tests" / "full_disk.py"), str(tmp_path)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    statuses, said = ends["full"]
    assert statuses == [2, 1]
    assert re.search(r"error on rank 0 \(.*pth: cannot be written \(No space left on device; it takes about \d+", said)
    assert re.fullmatch(r"model_000000[1-7]\.pth", ends["left"])
    assert ends["with room"][0] == [0, 0]
    assert ends["read-only"][0] == [2, 1]
    assert "output_dir=" in ends["read-only"][1]
    assert "cannot be written (Read-only file system); mend it, or choose another" in ends["read-only"][1]


@pytest.mark.slow
def test_torchrun_passes_on_the_signals_that_it_is_told_to(tmp_path: Path) -> None:
    need_tasks("detection")
    make = ["datasets/shape_scenes.py", "--out", str(tmp_path), "--train", "4", "--val", "1", "--size", "96x64"]
    subprocess.run([sys.executable, *make], cwd=ROOT, check=True, capture_output=True, timeout=100)
    rows, output = tmp_path / "run" / "metrics.jsonl", tmp_path / "output"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        *("tools/train_net.py", "data=shapes", f"data.root={tmp_path}", "data.val=[]", "data.workers=0", *NETWORK),
        *(*TASKS["detection"], "device=cpu", "threads=1", f"output_dir={tmp_path / 'run'}", "report.enabled=false"),
        *("solver.batch_size=2", "solver.max_iter=40", "solver.steps=[]", "solver.log_period=1"),
        *("data.train_augment.resize.short_edge_length=[64]", "data.test_augment.resize.short_edge_length=64"),
    ]
    with output.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        torchrun = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
    try:
        while not (rows.exists() and rows.stat().st_size):
            assert torchrun.poll() is None, output.read_text()[-4000:]
            time.sleep(0.1)
        torchrun.send_signal(signal.SIGUSR1)
        assert torchrun.wait(timeout=100) == 1, output.read_text()[-4000:]
    finally:
        torchrun.kill()
    assert "stopped by SIGUSR1; the same command with output_dir=" in output.read_text()
    assert 1 <= load(Checkpointer(tmp_path / "run", keep=1).latest())["iteration"] < 40


def test_a_signal_to_all_processes_of_a_run_leaves_its_workers_their_batches(toy: Toy, tmp_path: Path) -> None:
    """As SLURM and torchrun send it: to the loader's workers too."""
    options = ["data.val=[]", "data.workers=2", "solver.checkpoint_period=0", "solver.max_iter=50", "solver.steps=[]"]
    cfg = toy_config(toy, tmp_path / "run", *options, tasks=("detection",))
    ((rank,)) = start_forks(partial(train_told_as_a_group, cfg), 1, said=tmp_path)
    rank.join(100)
    assert rank.exitcode == 128 + signal.SIGTERM, (tmp_path / "0.txt").read_text()
    assert load(Checkpointer(tmp_path / "run", keep=1).latest())["iteration"] == 3


def train_told_as_a_group(cfg: DictConfig) -> None:
    """A run whose process group gets SIGTERM in the third step, which then takes its time."""
    os.setsid()
    backward = Trainer._backward

    def told(self: Trainer, samples: list[Sample]) -> Any:
        if self.iter == 2:
            os.killpg(0, signal.SIGTERM)
            time.sleep(2)
        return backward(self, samples)

    Trainer._backward = told  # of this process, a fork
    train(cfg)


def train_noting(cfg: DictConfig, notes: Path, told: int, when: int) -> None:
    """One rank of a run that notes which samples it trains on. Rank `told` gets SIGUSR1 in the step after `when`."""
    backward = Trainer._backward

    def noting(self: Trainer, samples: list[Sample]) -> Any:
        rank = self.ranks.rank
        with open(notes, "a") as file:  # short lines, which no other rank can tear
            file.write(json.dumps([self.iter, rank, [sample["sample_index"] for sample in samples]]) + "\n")
        if (rank, self.iter) == (told, when):
            os.kill(os.getpid(), signal.SIGUSR1)
        return backward(self, samples)

    Trainer._backward = noting  # of this process, a fork
    train(cfg)


def of_one_size(cfg: DictConfig) -> DictConfig:
    """Images that need no padding, which depends on what else is in a rank's share of the batch."""
    with open_dict(cfg):
        cfg.data.train_augment.resize = {"_target_": "detectron2.data.transforms.Resize", "shape": [64, 96]}
    return cfg


def seen(notes: Path) -> list[list[int]]:
    """Samples of every iteration, in the ranks' order."""
    lines = sorted(json.loads(line) for line in notes.read_text().splitlines())
    batches: dict[int, list[int]] = {}
    for iteration, _, samples in lines:
        batches.setdefault(iteration, []).extend(samples)
    return [batches[iteration] for iteration in range(len(batches))]


def test_a_schedule_that_contradicts_the_past_is_taken_only_on_request(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*options: str) -> Path:
        return train(toy_config(toy, tmp_path / "run", "data.val=[]", *options, tasks=("detection",))).folder

    run("solver.max_iter=3", "solver.steps=[2]")
    with pytest.raises(ConfigError, match=r"solver\.max_iter=2: .*model_0000003\.pth has done 3 iterations"):
        run("solver.max_iter=2", "solver.steps=[]")
    longer = ["solver.max_iter=5", "solver.steps=[4]"]  # the rate of the third iteration would not have fallen
    with pytest.raises(ConfigError, match=r"checkpoint\.extend=true, .* \(old: 3 iterations, .* \| new: 5 iterations"):
        run(*longer)
    folder = run(*longer, "checkpoint.extend=true")
    assert (
        "old: 3 iterations, multistep, lr 0.005, x 0.1 at 2, warm-up of 2 from x 0.001; after iteration 3"
        in caplog.text
    )
    assert (
        "new: 5 iterations, multistep, lr 0.005, x 0.1 at 4, warm-up of 2 from x 0.001; after iteration 3"
        in caplog.text
    )
    rates = [row["lr"] for row in read_metrics(folder / "metrics.jsonl")]
    assert rates[2:] == pytest.approx([0.0005, 0.005, 0.0005])


def test_a_directory_that_cannot_be_written_is_told_in_one_line(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output_dir=.*file/run: cannot be written \(Not a directory\); mend it"):
        train(toy_config(toy, tmp_path / "file" / "run", tasks=("detection",)))
