"""A training ends when its metric has stopped getting better, stays ended, and can be told to go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_train import toy_config
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import on_the_way
from mtl_rcnn.engine import train as training
from mtl_rcnn.engine.early_stop import EarlyStop
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric

NAME = "toy/detection/AP"


def _ends(values: list[float], patience: int, higher_is_better: bool = True, cut: int = 0) -> int | None:
    """After which evaluation (from 1) a training ends; interrupted and resumed after `cut` of them."""
    stop = EarlyStop(NAME, patience, None)
    for number, value in enumerate(values, 1):
        stop.update({NAME: Metric(value, higher_is_better)}, number)
        if stop.due:
            return number
        if number == cut:
            stop = EarlyStop(NAME, patience, stop.state)
    return None


@pytest.mark.parametrize(
    ("values", "patience", "higher", "end"),
    [
        ([1, 2, 3, 3, 3], 2, True, 5),  # as good is not better
        ([1, 2, 3, 2, 4, 1, 1, 1], 3, True, 8),
        ([3, 2, 2.5, 1, 2], 1, False, 3),
        ([1, 0, 2, 0, 3, 0], 2, True, None),
        ([5, 1], 1, True, 2),
    ],
)
def test_it_ends_after_patience_evaluations_without_a_new_best(
    values: list[float], patience: int, higher: bool, end: int | None
) -> None:
    for cut in range(len(values)):
        assert _ends(values, patience, higher, cut) == end


def test_the_state_of_another_metric_is_not_read_and_an_unknown_one_is_named() -> None:
    assert EarlyStop(NAME, 1, {"metric": "other", "value": 9.0, "iteration": 1, "waited": 5}).state is None
    with pytest.raises(
        ConfigError, match=r"solver\.early_stop\.metric=toy/detection/AP: .*did you mean toy/detection/AP5"
    ):
        EarlyStop(NAME, 1, None).update({"toy/detection/AP50": Metric(1.0)}, 1)


def test_a_run_ends_early_stays_ended_and_goes_on_with_more_patience(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {1: 5.0, 2: 6.0, 3: 6.0, 4: 5.5}
    steps: list[int] = []
    step = Trainer.run_step

    def counted(self: Trainer) -> None:
        step(self)
        steps.append(self.iter + 1)

    monkeypatch.setattr(Trainer, "run_step", counted)
    monkeypatch.setattr(on_the_way, "evaluate", lambda *_, **__: {NAME: Metric(scores.get(steps[-1], 0.0))})

    def run(patience: int) -> training.Outcome:
        options = [f"solver.early_stop.metric={NAME}", f"solver.early_stop.patience={patience}", "solver.eval_period=1"]
        options += ["solver.max_iter=7", "solver.checkpoint_period=0"]
        return training.train(toy_config(toy, tmp_path / "run", *options, tasks=("detection",)))

    outcome = run(2)
    assert steps == [1, 2, 3, 4]
    assert outcome.metrics[NAME].value == 5.5
    state = checkpoints.load(outcome.folder / "model_0000004.pth")
    assert state["early_stop"] == {"metric": NAME, "value": 6.0, "iteration": 2, "waited": 2}
    assert checkpoints.load(outcome.folder / "model_best.pth")["iteration"] == 2
    assert "early stop after iteration 4" in (outcome.folder / "log.txt").read_text()
    assert run(2).metrics[NAME].value == 5.5  # evaluated again, not trained
    assert steps == [1, 2, 3, 4]
    run(3)
    assert steps == [1, 2, 3, 4, 5]


def test_early_stopping_without_evaluations_is_refused() -> None:
    metric = "solver.early_stop.metric=a/b/c"
    with pytest.raises(
        ConfigError, match=r"solver\.early_stop\.metric=a/b/c: needs evaluations.*solver\.eval_period > 0"
    ):
        compose("train", ["data.root=x", metric, "solver.eval_period=0"])
    with pytest.raises(ConfigError, match=r"solver\.early_stop\.metric=a/b/c: there is no evaluation set.*data\.val"):
        compose("train", ["data.root=x", metric, "data.val=[]"])


def test_a_run_in_epochs_at_a_scaled_rate_says_what_it_does(toy: Toy, tmp_path: Path) -> None:
    lengths = ["solver.max_iter=1ep", "solver.steps=[0.5ep]", "solver.checkpoint_period=0.4ep"]  # 3, 2, 2
    folder = training.train(
        toy_config(
            toy, tmp_path / "run", *lengths, "solver.reference_batch_size=4", "data.val=[]", tasks=("detection",)
        )
    ).folder
    log = (folder / "log.txt").read_text()
    assert "lr 0.0025 (0.005 at a batch of 4), 3 iterations = 1.0 epochs of 6 images" in log
    assert {path.name for path in folder.glob("*.pth")} == {"model_0000002.pth", "model_0000003.pth"}
    assert "max_iter: 1ep" in (folder / "config.yaml").read_text()
