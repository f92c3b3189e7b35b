"""What is frozen stays as it is, to the bit, through every way in which training could change it; the rest learns."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulate_worker import make_trainer
from frozen_runs import TASKS, frozen_config, weights_of
from frozen_worker import FROZEN
from ranks import ROOT, run_ranks
from test_schedule import SOLVER
from tiny import LABEL_SPACE, make_sample, need_tasks, tiny_config, tiny_model
from torch import nn
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.freeze import freeze
from mtl_rcnn.engine.schedule import build_optimizer
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
DECAYING = {**SOLVER, "weight_decay": 0.1, "weight_decay_norm": None, "warmup_iters": 0}
WITH_DROPOUT = ("tasks=[image_label]", "tasks.image_label.levels=[dense]", "model=small_vgg", "model.backbone.dense=8")


def steps(model: MultiTaskRCNN, number: int = 2) -> None:
    """Trains with everything that could touch what is frozen: weight decay, momentum, evaluation in between, and calls
    of `train()` on the network and on its parts."""
    batches = [[make_sample(2 * step + i, (96, 128), 3) for i in range(2)] for step in range(number)]
    trainer = make_trainer(model, batches, ALONE, 1, lr=0.02)
    trainer.optimizer = build_optimizer(model, DECAYING)
    for trainer.iter in range(number):
        trainer.run_step()
        with evaluation_mode(model):
            model([make_sample(9, (96, 128), 3)])
        model.eval()
        model.train()
        for module in model.modules():
            module.train()


def changed(model: MultiTaskRCNN, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not what they were."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def snapshot(model: MultiTaskRCNN) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["trunk"], ["backbone.*"]),
        (["detection"], ["roi_heads.detector.*"]),
        (["backbone.bottom_up.*", "mask"], ["backbone.bottom_up.*", "roi_heads.tasks.mask.*"]),
        (["backbone.bottom_up.res[34].*"], ["backbone.bottom_up.res3.*", "backbone.bottom_up.res4.*"]),
        (["backbone.bottom_up.stem.conv1.norm.*"], ["backbone.bottom_up.stem.conv1.norm.*"]),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(names: list[str], patterns: list[str]) -> None:
    model = tiny_model(["detection", "mask"])
    freeze(model, names)
    before = snapshot(model)
    still = {name for name in before if any(fnmatchcase(name, pattern) for pattern in patterns)}
    assert still < set(before)
    trained = {name for group in build_optimizer(model, SOLVER).param_groups for name in group["param_names"]}
    assert trained == {name for name, _ in model.named_parameters()} - still
    steps(model)
    assert changed(model, before) == set(before) - still


def test_without_it_all_of_that_would_change() -> None:
    model = tiny_model(["detection", "mask"])
    before = snapshot(model)
    steps(model)
    assert changed(model, before) == set(before)


def test_a_norm_of_which_a_part_learns_goes_on_counting() -> None:
    model = tiny_model(["detection"])
    freeze(model, ["*.conv1.norm.weight"])
    before = snapshot(model)
    steps(model, 1)
    assert changed(model, before) == {name for name in before if not name.endswith(".conv1.norm.weight")}


def test_a_norm_without_parameters_belongs_to_what_holds_it() -> None:
    model = tiny_model(["detection"])
    stem = model.backbone.bottom_up.stem
    stem.conv1.norm = nn.BatchNorm2d(8, affine=False)
    freeze(model, ["backbone.bottom_up.stem.*"])
    before = snapshot(model)
    steps(model, 1)
    assert not any(name.startswith("backbone.bottom_up.stem.") for name in changed(model, before))
    assert int(stem.conv1.norm.num_batches_tracked) == 0


def test_a_frozen_trunk_draws_nothing_and_keeps_no_activations() -> None:
    need_tasks("image_label")
    cfg, kept = compose("train", ["data.root=unused", *WITH_DROPOUT]), {}
    for names in ([], ["trunk"]):
        model = build_model(cfg, LABEL_SPACE)
        freeze(model, names)
        model.train()
        image, saved = torch.rand(2, 3, 96, 96), []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
            first, second = (model.backbone(image)["dense"] for _ in range(2))
        kept[tuple(names)] = (len(saved) > 0, torch.equal(first, second), first.requires_grad)
    assert kept == {(): (True, False, True), ("trunk",): (False, True, False)}


def test_a_copy_of_a_frozen_network_is_frozen_for_itself() -> None:
    model = tiny_model(["detection"])
    freeze(model, ["trunk"])
    twin = copy.deepcopy(model).train()
    assert not any(module.training for module in twin.backbone.modules())
    assert twin.backbone.train() is twin.backbone
    assert twin.roi_heads.training


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "backbone.botom_up.*",
            r"solver\.freeze: .* matches 'backbone\.botom_up\.\*'; did you mean 'backbone\.bottom_up",
        ),
        ("trnk", r"solver\.freeze: the network has no part 'trnk'; did you mean 'trunk'\?"),
        ("*.running_mean", r"solver\.freeze: the network has no parameter that matches '\*\.running_mean'"),
        ("pixel_mean", r"solver\.freeze: the network has no part 'pixel_mean'; there are trunk, detection"),
    ],
)
def test_a_name_of_nothing_is_told(name: str, said: str) -> None:
    model = tiny_model(["detection"])
    with pytest.raises(ConfigError, match=said):
        freeze(model, [name])
    with pytest.raises(ConfigError, match=said.replace("freeze", "lr_factors")):
        build_optimizer(model, {**SOLVER, "lr_factors": {name: 0.5}})


def test_nothing_to_train_is_told() -> None:
    model = tiny_model(["detection"])
    freeze(model, ["trunk", "detection"])
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(model, SOLVER)


def test_gradients_cannot_be_balanced_in_a_frozen_trunk() -> None:
    need_tasks(*TASKS)
    cfg = tiny_config(TASKS, "balancing=pcgrad")
    model = tiny_model(TASKS)
    freeze(model, ["trunk"])
    with pytest.raises(ConfigError, match=r"PCGrad combines .* the whole trunk is frozen; choose .*\(solver\.freeze,"):
        share_gradients(build_balancer(cfg, model, None), model, ALONE, cfg.solver)


def test_a_run_with_frozen_parts_resumes_exactly_and_knows_which_they_were(toy: Toy, tmp_path: Path) -> None:
    need_tasks(*TASKS)
    frozen = ("solver.freeze=[backbone.bottom_up.*]", "solver.ema=0.9")
    for folder, parts in (("whole", [6]), ("parts", [3, 6])):
        for length in parts:
            cfg = frozen_config(toy, tmp_path / folder, *frozen)
            cfg.solver.max_iter, cfg.solver.steps = length, [5] if length > 5 else []
            train(cfg)
    whole, resumed = (weights_of(tmp_path / folder) for folder in ("whole", "parts"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    early = weights_of(tmp_path / "whole", 3)
    same = {name for name, tensor in whole.items() if torch.equal(tensor, early[name])}
    assert same == {name for name in whole if name.startswith("backbone.bottom_up.")}
    for other in ("[]", "[trunk]"):
        with pytest.raises(CheckpointError, match=r"trains 53 parameters.*not in both: backbone\..*checkpoint's conf"):
            train(frozen_config(toy, tmp_path / "whole", f"solver.freeze={other}", "solver.ema=0.9"))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has, see frozen_worker.py."""
    need_tasks("detection")
    folder = tmp_path_factory.mktemp("ranks")
    for status, output in run_ranks([str(ROOT / "tests" / "engine" / "frozen_worker.py"), str(folder)], 2):
        assert status == 0, output
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", FROZEN)
def test_ranks_leave_what_is_frozen_alone(case: str, on_ranks: list[dict[str, Any]]) -> None:
    start = tiny_model(["detection"]).state_dict()
    still = {name for name in start if name.startswith(FROZEN[case])}
    for found in on_ranks:
        weights = found[case]["model"]
        assert {name for name, tensor in weights.items() if torch.equal(tensor, start[name])} == still
        assert all(torch.equal(tensor, on_ranks[0][case]["model"][name]) for name, tensor in weights.items())


def test_ranks_share_a_folder_of_features(on_ranks: list[dict[str, Any]]) -> None:
    kept = [found["features kept"] for found in on_ranks]
    assert [entry["runs"][1:] for entry in kept] == [[1, 0], [1, 0]]
    assert 2 <= sum(entry["runs"][0] for entry in kept) <= 4  # both put the same two there at the same time
    assert [entry["files"] for entry in kept] == [4, 4]
    for name, tensor in on_ranks[0]["trunk"]["model"].items():
        torch.testing.assert_close(kept[0]["model"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
