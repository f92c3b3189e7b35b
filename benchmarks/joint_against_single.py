"""One network of all tasks against a network per task: parameters and inference time.

    python benchmarks/joint_against_single.py experiment=all_tasks data.root=/path/to/shapes --run outputs/all_tasks

Each task's own network has the same trunk and the same layers of that task, and the detector where the task works on
boxes. All have the joint network's weights, so that all find the same boxes and describe the same number of them;
`--run` gives trained weights, without it they are random. Networks take turns on the same batch, and the table tells
medians over the turns: a busy machine slows all of them.

Whoever has no joint network need not run a detector per task on boxes, so there is a second sum: one network of the
detector and all tasks on its boxes, and one for each task on whole images.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mtl_rcnn import config
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.data import build_mapper, train_datasets, val_datasets
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.slots import DetectorTask, ImageTask

JOINT, BOXES = "joint", "all tasks on boxes"
Batch = tuple[list[Tensor], list[Tensor]]
"""Network-frame images (3, H, W), and their original heights and widths (2,)."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the network or of the sum.
        parameters: number.
        seconds: per image, by batch size.
        over_joint: seconds over the joint network's, by batch size.
    """

    name: str
    parameters: int
    seconds: Mapping[int, float]
    over_joint: Mapping[int, float]


def main() -> None:
    """Measures what the command line asks for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="of the training configuration: experiment=all_tasks ...")
    parser.add_argument("--run", type=Path, help="a run of the experiment, for trained weights")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images per pass")
    parser.add_argument("--turns", type=int, default=15, help="passes of each network that count")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cfg = config.compose("train", arguments.overrides)
    joint, label_space = _joint(cfg, arguments.run)
    networks = single_networks(joint, cfg, label_space)
    images = _images(cfg, label_space, max(arguments.batch) * 4)
    seconds = {size: measure(networks, batches(images, size), arguments.turns) for size in arguments.batch}
    found = sum(len(p.get("scores", ())) for p in joint.predict_tensors(*images)) / len(images[0])
    print(f"{arguments.threads} threads, torch {torch.__version__}, {found:.1f} detections per image")
    print(table(rows(networks, seconds)))


def single_networks(joint: MultiTaskRCNN, cfg: DictConfig, label_space: LabelSpace) -> dict[str, MultiTaskRCNN]:
    """The joint network, each task's own by name, and, if several tasks work on boxes, that of all these; all with the
    joint network's weights, for inference. `cfg` is the joint network's."""
    tasks = joint.tasks()
    detector = [task.name for task in tasks if isinstance(task, DetectorTask)]
    on_boxes = [task.name for task in tasks if not isinstance(task, ImageTask)]
    wanted = {task.name: [task.name] for task in tasks}
    wanted |= {name: [*detector, name] for name in on_boxes if name not in detector}
    if len(on_boxes) > 1:
        wanted[BOXES] = on_boxes
    weights = joint.state_dict()
    networks = {JOINT: joint.eval()}
    for name, chosen in wanted.items():
        own = copy.deepcopy(cfg)
        own.tasks = OmegaConf.masked_copy(cfg.tasks, chosen)
        network = build_model(own, label_space)
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
        networks[name] = network.eval()
    return networks


@torch.inference_mode()
def measure(networks: Mapping[str, MultiTaskRCNN], batches: Sequence[Batch], turns: int) -> dict[str, list[float]]:
    """Seconds per image of each network, turn by turn; the first two turns warm up and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(-2, turns):
        batch = batches[turn % len(batches)]
        for name, network in networks.items():
            begin = time.perf_counter()
            network.predict_tensors(*batch)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - begin) / len(batch[0]))
    return seconds


def rows(networks: Mapping[str, MultiTaskRCNN], seconds: Mapping[int, Mapping[str, list[float]]]) -> list[Row]:
    """Each network, and both sums. Sums are taken turn by turn, then the median."""
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    single = [name for name in networks if name not in (JOINT, BOXES)]
    groups = {name: [name] for name in networks} | {f"sum of {len(single)} networks": single}
    if BOXES in networks:
        own = [BOXES, *networks[JOINT].image_tasks]
        groups[f"sum of {len(own)}: {BOXES}, and each other task's own"] = own
    found = []
    for title, members in groups.items():
        taken = {
            size: [sum(turn) for turn in zip(*(by_name[name] for name in members), strict=True)]
            for size, by_name in seconds.items()
        }
        over = {size: _ratio(values, seconds[size][JOINT]) for size, values in taken.items()}
        medians = {size: statistics.median(values) for size, values in taken.items()}
        found.append(Row(title, sum(parameters[name] for name in members), medians, over))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    sizes = list(rows[0].seconds)
    columns = "".join(f" ms/image, batch {size} | over joint |" for size in sizes)
    lines = [f"| network | parameters | over joint |{columns}", "|---|---|---|" + "---|---|" * len(sizes)]
    for row in rows:
        times = "".join(f" {1000 * row.seconds[size]:.1f} | {row.over_joint[size]:.2f} |" for size in sizes)
        lines.append(f"| {row.name} | {row.parameters:,} | {row.parameters / rows[0].parameters:.2f} |{times}")
    return "\n".join(lines)


def batches(images: Batch, size: int) -> list[Batch]:
    """The images in batches of one size."""
    starts = range(0, len(images[0]) - size + 1, size)
    return [(images[0][start : start + size], images[1][start : start + size]) for start in starts]


def _ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(value / joint for value, joint in zip(values, reference, strict=True))


def _joint(cfg: DictConfig, run: Path | None) -> tuple[MultiTaskRCNN, LabelSpace]:
    if run is not None:
        restored = restore(run)
        return restored.model, restored.label_space
    label_space = train_datasets(cfg)[1]
    return build_model(cfg, label_space), label_space


def _images(cfg: DictConfig, label_space: LabelSpace, number: int) -> Batch:
    """Of the first evaluation set, as in evaluation, read once."""
    records = val_datasets(cfg, label_space)[0].records
    mapper = build_mapper(cfg, {}, training=False)
    samples = [mapper(records[index % len(records)], index) for index in range(number)]
    return [s["image"] for s in samples], [torch.tensor([s["height"], s["width"]]) for s in samples]


if __name__ == "__main__":
    main()
