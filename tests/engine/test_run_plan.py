"""The tool that says what a run will need: its figures are the run's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from pages import commands_of, read_page
from test_train import toy_config
from tiny import NETWORK, TASKS, need_tasks
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.plan import as_text, plan
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError

pytestmark = pytest.mark.slow  # not run once more for each task that is left out


def config(toy: Toy, folder: Path, *overrides: str) -> DictConfig:
    need_tasks("detection", "mask")
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}]}}"
    knobs = [*NETWORK, *TASKS["detection"], *TASKS["mask"], "tasks=[detection,mask]", f"output_dir={folder}"]
    lengths = ["solver.batch_size=4", "solver.max_iter=30", "solver.steps=[]", "solver.warmup_iters=0"]
    periods = ["solver.eval_period=20", "solver.checkpoint_period=4", "checkpoint.keep=3"]
    sizes = ["data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"]
    rest = ["device=cpu", "threads=1", "data.root=unused", "steps=1", "gpus_per_node=1"]
    sets = [f"data.train=[{data}]", f"data.val=[{data}]"]
    return compose("plan", [*knobs, *lengths, *periods, *sizes, *rest, *sets, *overrides])


def test_sizes_are_those_of_a_checkpoint(toy: Toy, tmp_path: Path) -> None:
    found = plan(config(toy, tmp_path / "plan", "nodes=[1,2]", "solver.ema=0.9"))
    run = toy_config(toy, tmp_path / "run", "solver.ema=0.9", tasks=("detection", "mask"))
    file = train(run).folder / "model_0000004.pth"
    state = checkpoints.load(file)
    assert found.disk.checkpoint_bytes == pytest.approx(file.stat().st_size, rel=0.1)
    assert found.disk.written == 8  # after 4, 8, ..., 28, and 30
    assert found.disk.kept == 4  # three, and the best
    kept = plan(config(toy, tmp_path / "plan", "nodes=[1]", "checkpoint.keep_every=10")).disk
    assert (kept.written, kept.kept) == (9, 7)  # also after 10; this one, 20 and 30 stay
    weights = sum(tensor.nbytes for tensor in state["model"].values())
    moments = [tensor for entry in state["optimizer"]["state"].values() for tensor in entry.values()]
    learning = sum(tensor.nbytes for tensor in moments if isinstance(tensor, torch.Tensor))
    assert found.memory.weights == pytest.approx(weights, rel=1e-3)  # some buffers are not saved
    assert found.memory.gradients == found.memory.buckets == found.costs.gradient_bytes == learning
    assert found.memory.optimizer >= learning
    assert found.memory.measured is None
    assert not (tmp_path / "plan").exists()


def test_nodes_share_the_batch_or_bring_their_own(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(config(toy, tmp_path, "nodes=[1,2,3]"))
    assert [(row.nodes, row.share) for row in found.forecasts] == [(1, 4), (2, 2)]
    assert found.refused == {
        3: "a batch of 4 cannot be shared by 3 GPUs; change solver.batch_size, or let it grow (batch_per_node=true)"
    }
    assert set(found.costs.step_seconds) == {2, 4}
    assert min(found.costs.step_seconds.values()) > 0
    assert found.costs.load_seconds > 0 < found.costs.evaluation_seconds
    assert capsys.readouterr().out.rstrip().endswith(as_text(found))
    grown = plan(config(toy, tmp_path, "nodes=[1,3]", "batch_per_node=true", "seconds_per_image=0.5"))
    assert [(row.nodes, row.share) for row in grown.forecasts] == [(1, 4), (3, 4)]
    assert grown.costs.step_seconds == {4: 2.0}
    one, three = grown.forecasts
    images = len(toy_images(toy))
    assert one.epoch_seconds[0] == pytest.approx(2.0 * images / 4, rel=1e-6)
    assert three.epoch_seconds[0] == pytest.approx(2.0 * images / 12, rel=1e-6)


def toy_images(toy: Toy) -> list[Path]:
    return sorted(Path(toy.images).glob("*"))


def test_micro_batches_need_less_memory(toy: Toy, tmp_path: Path) -> None:
    whole, cut = (plan(config(toy, tmp_path, "nodes=[1]", f"solver.accumulate={n}")) for n in (1, 4))
    assert whole.memory.buckets == 0
    assert cut.memory.activations < 0.5 * whole.memory.activations


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("nodes=[3]", "3 nodes: a batch of 4 cannot be shared by 3 GPUs"),
        ("nodes=[0]", r"nodes=\[0\]: expected a list of whole numbers of at least 1"),
        ("links.between_nodes=0", "links.between_nodes=0: expected a number above 0"),
    ],
)
def test_what_cannot_be_planned_is_told(override: str, text: str, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(config(toy, tmp_path, override))


@pytest.mark.parametrize("command", commands_of(read_page("plan.md")))
def test_a_command_of_the_page_composes(command: str) -> None:
    need_tasks("detection", "mask", "keypoint")
    words = shlex.split(command)
    assert words[:2] == ["python", "tools/plan.py"]
    cfg = compose("plan", words[2:])
    assert cfg.nodes
