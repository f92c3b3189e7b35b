"""Segmentation and depth from all labels, from half of them each, and from half with pseudo labels: joint and alone.

    python benchmarks/dense_labels.py --out outputs/dense_labels
    python benchmarks/dense_labels.py --out outputs/dense_labels --override solver.max_iter=300 --threads 1

Settings, each trained as one network of both tasks and as one network per task, with the same number of iterations:

    full     every training image is labelled for both tasks
    halves   the first half of the images is labelled for segmentation alone, the second half for depth alone
    distilled  as halves; the networks of `halves` with one task each are the teachers, and label the other half

So a network of one task sees half of the images in `halves`, and all of them, half with pseudo labels, in `distilled`.
The networks with one task learn from what is labelled for their task alone; images without such labels would only
pass by. Runs that are there already are not repeated: an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_rcnn.config import compose
from mtl_rcnn.data.shape_scenes import write_shape_scenes
from mtl_rcnn.engine.train import train
from mtl_rcnn.predict.pseudo import pseudo_label

TASKS = {"semantic": ("sem_seg_file_name",), "depth": ("depth_file_name", "depth_scale")}
"""Task -> the fields of an image that hold its labels."""
SHOWN = {"semantic": ("mIoU", "pixel_accuracy"), "depth": ("rmse", "abs_rel")}
SETTINGS = ("full", "halves", "distilled")


def main() -> None:
    """Measures, writes `table.json` and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/dense_labels"))
    parser.add_argument("--data", type=Path, help="folder of the scenes; default: made in --out")
    parser.add_argument("--train", type=int, default=1200, help="training scenes")
    parser.add_argument("--val", type=int, default=200, help="validation scenes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--override", nargs="*", default=[], help="of every training run, such as solver.max_iter=300")
    parser.add_argument("--prepare-only", action="store_true", help="write the scenes and the halves, then stop")
    arguments = parser.parse_args()
    data = (arguments.data or arguments.out / "scenes").resolve()
    prepare(data, arguments.train, arguments.val)
    if arguments.prepare_only:
        return
    bench = Bench(arguments.out.resolve(), data, [f"threads={arguments.threads}", *arguments.override])
    rows = [bench.row(setting, tasks) for setting in SETTINGS for tasks in (list(TASKS), *([task] for task in TASKS))]
    (arguments.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


def prepare(data: Path, scenes: int, val: int) -> None:
    """Makes the scenes and, beside their labels, one file for each half that holds one task's labels only."""
    annotations = data / "annotations"
    if not annotations.is_dir():
        write_shape_scenes(data, train=scenes, val=val, flavour="full")
    content = json.loads((annotations / "instances_train.json").read_text(encoding="utf-8"))
    middle = len(content["images"]) // 2
    halves = {"semantic": content["images"][:middle], "depth": content["images"][middle:]}
    for task, images in halves.items():
        others = {field for other, fields in TASKS.items() if other != task for field in fields}
        kept = [{key: value for key, value in image.items() if key not in others} for image in images]
        ids = {image["id"] for image in kept}
        entries = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        text = json.dumps({**content, "images": kept, "annotations": entries})
        (annotations / f"half_{task}.json").write_text(text, encoding="utf-8")


class Bench:
    """The runs of a measurement.

    Args:
        out: folder of the runs.
        data: folder of the scenes.
        overrides: of every training run.
    """

    def __init__(self, out: Path, data: Path, overrides: Sequence[str]) -> None:
        self.out = out
        self.data = data
        self.overrides = [f"data.root={data}", "device=cpu", "report.enabled=false", "evaluation.samples=0", *overrides]

    def row(self, setting: str, tasks: Sequence[str]) -> dict[str, Any]:
        """What a network of these tasks reaches in a setting."""
        if setting == "full":
            sets = [self._set("shapes_train", self.data / "annotations" / "instances_train.json", list(TASKS))]
        else:
            sets = [self._half(setting, task) for task in TASKS if setting == "distilled" or task in tasks]
        folder = self.trained(f"{setting}_{'_'.join(tasks)}", tasks, sets)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        found = {f"{t}/{name}": metrics[f"shapes_val/{t}/{name}"] for t in tasks for name in SHOWN[t]}
        seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        return {"setting": setting, "tasks": list(tasks), "metrics": found, "seconds": seconds}

    def trained(self, name: str, tasks: Sequence[str], sets: Sequence[dict[str, Any]]) -> Path:
        """A run's folder; trains it unless it is complete."""
        folder = self.out / name
        if not (folder / "seconds.json").is_file():
            start = time.monotonic()
            words = ["experiment=shapes_dense", f"tasks=[{','.join(tasks)}]", f"data.train={_hydra(sets)}"]
            train(compose("train", [*words, f"output_dir={folder}", *self._fitting(tasks)]))
            (folder / "seconds.json").write_text(f"{time.monotonic() - start:.0f}\n", encoding="utf-8")
        return folder

    def _fitting(self, tasks: Sequence[str]) -> list[str]:
        """The overrides, but for those of a task that is left out, which go with the experiment's own."""
        away = [task for task in TASKS if task not in tasks]
        kept = [word for word in self.overrides if not word.startswith(tuple(f"tasks.{task}." for task in away))]
        return [*kept, *(f"~tasks.{task}" for task in away)]

    def _half(self, setting: str, task: str) -> dict[str, Any]:
        """The half that is labelled for a task; in `distilled` with the other's pseudo labels."""
        if setting == "halves":
            return self._set(f"half_{task}", self.data / "annotations" / f"half_{task}.json", [task])
        return self._set(f"half_{task}", self._distil(task) / "annotations.json", list(TASKS))

    def _distil(self, half: str) -> Path:
        """Labels the half that is labelled for one task for the other, by the network that learned this alone."""
        (missing,) = (task for task in TASKS if task != half)
        teacher = self.trained(f"halves_{missing}", [missing], [self._half("halves", missing)])
        folder = self.out / f"pseudo_{missing}"
        if not folder.is_dir():
            given = _hydra(self._half("halves", half))
            words = [f"network={teacher}", f"only_tasks=[{missing}]", f"dataset={given}", "threshold=0"]
            pseudo_label(compose("pseudo_label", [*words, f"output_dir={folder}", "device=cpu", "workers=1"]))
        return folder

    def _set(self, name: str, annotations: Path, tasks: list[str]) -> dict[str, Any]:
        images = str(self.data / "train")
        return {"name": name, "images": images, "annotations": str(annotations), "tasks": tasks}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md: a line per setting, joint and alone."""
    columns = [(task, name) for task, names in SHOWN.items() for name in names]
    lines = ["| labels | networks | " + " | ".join(f"{name}" for _, name in columns) + " |"]
    lines.append("|---|---|" + "---:|" * len(columns))
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting]
        joint = [row for row in mine if len(row["tasks"]) > 1]
        for kind, chosen in (("one, both tasks", joint), ("one per task", [row for row in mine if row not in joint])):
            found = {key: value for row in chosen for key, value in row["metrics"].items()}
            cells = [f"{found[f'{task}/{name}']:.{1 if task == 'semantic' else 3}f}" for task, name in columns]
            lines.append(f"| {setting} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _hydra(value: Any) -> str:
    """Plain values in the command line's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return f"'{value}'"


if __name__ == "__main__":
    main()
