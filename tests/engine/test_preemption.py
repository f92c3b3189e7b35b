"""A run that is told to stop ends after a whole iteration and goes on as if nothing had been; SLURM is asked to start
it again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import fork_ranks
from runs import assert_equal_runs
from test_train import toy_config
from toy import Toy

from mtl_rcnn.engine import on_the_way
from mtl_rcnn.engine.checkpoint import Checkpointer, load
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.preemption import SIGNALS, Preempted, StopRequest, requeue, slurm_job, stop_requests
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def fake_scontrol(
    folder: Path, monkeypatch: pytest.MonkeyPatch, state: str = "RUNNING", status: int = 0, seconds: int = 0
) -> Path:
    """Puts a `scontrol` first on the PATH that notes its arguments, `seconds` later, in the file that is returned."""
    notes = folder / "arguments.txt"
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nsleep {seconds}; echo "$@" >> {notes}\n'
        f'[ "$1" = show ] && echo "JobId=77 JobState={state} Reason=None"\n'
        f'[ "$1" = requeue ] && echo "Job has already finished" >&2 && exit {status}\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return notes


def killing(number: signal.Signals, function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """`function` that sends this process a signal first, where `when` says so of its arguments."""

    def kill(*args: Any, **options: Any) -> Any:
        if when(*args, **options):
            os.kill(os.getpid(), number)
        return function(*args, **options)

    return kill


def test_a_run_that_is_told_to_stop_again_and_again_equals_the_uninterrupted_one(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["solver.eval_period=2", "solver.checkpoint_period=0", "solver.early_stop.metric=toy/detection/AP"]

    def run(name: str) -> Path:
        return train(toy_config(toy, tmp_path / name, *options, tasks=("detection",))).folder

    whole = run("whole")
    notes = fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    step, evaluate = Trainer.run_step, on_the_way.evaluate
    # In a step, in the evaluations on the way and at the end.
    for number, where in ((signal.SIGTERM, 1), (signal.SIGUSR1, 2), (signal.SIGUSR2, 4)):
        with monkeypatch.context() as patch:
            if where == 1:
                patch.setattr(Trainer, "run_step", killing(number, step, lambda self: self.iter == 0))
            else:
                is_there = lambda *_, iteration, **__: iteration == where  # noqa: B023, E731
                patch.setattr(on_the_way, "evaluate", killing(number, evaluate, is_there))
            with pytest.raises(Preempted) as end:
                run("stopped")
        assert end.value.code == 128 + number
        state = load(Checkpointer(tmp_path / "stopped", keep=1).latest())
        assert (state["iteration"], state["evaluation_due"]) == (where, where != 1)
    assert notes.read_text().splitlines() == ["show job -o 77", "requeue 77"] * 3
    assert "stopped by SIGTERM; the same command with output_dir=" in caplog.text
    assert caplog.text.count("job 77 is requeued") == 3
    assert_equal_runs(whole, run("stopped"))


def test_handlers_that_were_there_before_are_there_again() -> None:
    ours = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}  # as submitit's
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with stop_requests(repeat_s=60) as told:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert told.signal is signal.SIGUSR2
        assert [signal.getsignal(number) for number in SIGNALS] == before
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def test_a_copy_of_the_signal_is_no_second_one() -> None:
    with stop_requests(repeat_s=60) as told:
        assert not told()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.signal is signal.SIGUSR1
    assert told.end(Path("run"), ALONE, requeued=True).code == 128 + signal.SIGUSR1


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with stop_requests(repeat_s=0):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_no_signal_ends_the_process_while_slurm_is_asked_to_start_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = fake_scontrol(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    child = os.fork()
    if child == 0:
        with stop_requests(repeat_s=0) as told:
            os.kill(os.getpid(), signal.SIGUSR2)
            end = told.end(Path("run"), ALONE, requeued=True)
            os.kill(os.getpid(), signal.SIGTERM)  # SLURM's, to a job that is requeued
            os._exit(end.code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGUSR2
    assert notes.read_text().splitlines()[-1] == "requeue 77"


@pytest.mark.slow
def test_no_rank_ends_before_slurm_was_asked_to_start_it_again(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that sees one end (srun --kill-on-bad-exit, torchrun) kills the others, rank 0 too."""
    notes = fake_scontrol(tmp_path, monkeypatch, seconds=3)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    cfg = toy_config(toy, tmp_path / "run", "data.val=[]", tasks=("detection",))
    step = Trainer.run_step
    monkeypatch.setattr(Trainer, "run_step", killing(signal.SIGUSR2, step, lambda self: True))

    def rank() -> None:
        try:
            train(cfg)
        except Preempted:
            assert "requeue 77" in notes.read_text()
            raise

    assert fork_ranks(rank, 2) == [128 + signal.SIGUSR2] * 2


def test_a_process_of_the_loader_takes_no_notice() -> None:
    told = StopRequest(repeat_s=0)
    child = os.fork()
    if child == 0:
        told.handle(signal.SIGTERM)
        told.handle(signal.SIGTERM)
        os._exit(int(told()))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("state", "status", "said", "calls"),
    [
        ("RUNNING", 0, "job 77 is requeued", 2),
        ("CANCELLED", 0, "job 77 is CANCELLED and not requeued", 1),
        ("RUNNING", 1, "job 77 could not be requeued (Job has already finished): start it again by hand", 2),
    ],
)
def test_a_job_goes_back_into_the_queue_unless_it_was_cancelled(
    state: str, status: int, said: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = fake_scontrol(tmp_path, monkeypatch, state, status)
    assert requeue("77") == said
    assert len(notes.read_text().splitlines()) == calls


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "77"}, "77"),
        ({"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, "77_3"),
    ],
)
def test_a_job_of_an_array_is_requeued_alone(environ: dict[str, str], job: str | None) -> None:
    assert slurm_job(environ) == job


def test_without_scontrol_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be requeued" in requeue("77")
