"""Colour and garment: one network for both against one each, two ways to score, two trunks, combinations never seen.

    python benchmarks/fashion.py data.root=/path/to/fashion --out outputs/fashion_table threads=4
    python benchmarks/fashion.py data.root=/path/to/fashion --out outputs/fashion_table --what left_out

Every row is a training of its own with the schedule of experiment=fashion; further overrides (threads,
solver.max_iter, data.side) go to all that are trained. Runs lie in --out and are not trained again, so that rows can be
added. Scores are those of the evaluation at the end of the training, on the same fifth of the images. The networks of
one part each are scored together: an image is an exact match if both are right. Inference is the network alone, one
image at a time, a square of the longer side, median of many, networks taking turns; the networks of one part need
both. CPU time is that of all threads, of training and evaluation; on a machine that does other things it tells more
than the time on the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from mtl_rcnn.engine.data import val_datasets
from mtl_rcnn.engine.restore import restore

ROOT = Path(__file__).resolve().parents[1]
COMBINATIONS = ("black_jeans", "black_shoes", "blue_dress", "blue_jeans", "blue_shirt", "red_dress", "red_shirt")
RUNS = {
    "joint": ["experiment=fashion"],
    "softmax": ["experiment=fashion", "tasks.image_label.mode=softmax_per_part"],
    "colour": ["experiment=fashion", "data.only=[colour]"],
    "garment": ["experiment=fashion", "data.only=[garment]"],
    "vgg": ["experiment=fashion_vgg"],
}
ROWS = {
    "joint, ResNet-FPN": ["joint"],
    "joint, softmax per part": ["softmax"],
    "joint, small VGG": ["vgg"],
    "one network per part": ["colour", "garment"],
}


def main() -> None:
    """Trains what is missing, prints the tables, writes `table.json`."""
    arguments, overrides = _arguments()
    out = Path(arguments.out)
    for name in (name for name in arguments.what if name != "left_out"):
        _train(out / name, [*RUNS[name], *overrides])
    if "left_out" in arguments.what:
        for combination in arguments.left_out:
            extra = ["experiment=fashion", "data=fashion_left_out", f"data.leave_out={combination}"]
            _train(out / f"without_{combination}", [*extra, *overrides])
    rows = {title: names for title, names in ROWS.items() if all((out / name / "run.json").is_file() for name in names)}
    times = _inference([name for names in rows.values() for name in names], out, arguments.threads)
    table = [
        _row(title, [out / name for name in names], [times[name] for name in names]) for title, names in rows.items()
    ]
    left = [_left_out(out / f"without_{name}", name) for name in COMBINATIONS if (out / f"without_{name}").is_dir()]
    print(tabulate(table, headers="keys", floatfmt=".2f", tablefmt="github"))
    print(tabulate(left, headers="keys", floatfmt=".2f", tablefmt="github"))
    (out / "table.json").write_text(json.dumps({"table": table, "left_out": left, "overrides": overrides}, indent=1))


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--what", nargs="*", default=[*RUNS, "left_out"], choices=[*RUNS, "left_out"])
    parser.add_argument("--left-out", nargs="*", default=COMBINATIONS, choices=COMBINATIONS)
    parser.add_argument("--threads", type=int, default=4, help="of the timing of inference")
    return parser.parse_known_args()


def _train(folder: Path, overrides: Sequence[str]) -> None:
    """A training in a process of its own, with its times in `run.json`."""
    if _trained(folder):
        return
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *overrides, f"output_dir={folder}"]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "report.enabled=false"], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times = {"minutes": (time.perf_counter() - started) / 60, "cpu_minutes": spent / 60}
    (folder / "run.json").write_text(json.dumps(times))


def _trained(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _row(title: str, folders: Sequence[Path], seconds: Sequence[float]) -> dict[str, Any]:
    times = [json.loads((folder / "run.json").read_text()) for folder in folders]
    binary, exact = _scores(folders)
    return {
        "networks": title,
        "binary accuracy": binary,
        "exact match": exact,
        "parameters (M)": sum(_parameters(folder) for folder in folders) / 1e6,
        "training (min)": sum(entry["minutes"] for entry in times),
        "training (CPU min)": sum(entry["cpu_minutes"] for entry in times),
        "inference (ms)": 1000 * sum(seconds),
    }


def _scores(folders: Sequence[Path]) -> tuple[float, float]:
    """Mean binary accuracy and exact match in percent; of several networks, an image is right if all are."""
    if len(folders) == 1:
        metrics = json.loads((folders[0] / "metrics.json").read_text())
        return tuple(metrics[f"fashion_val/image_label/{name}"] for name in ("binary_accuracy", "exact_match"))
    right: dict[int, list[bool]] = {}
    for folder in folders:
        restored = restore(folder, "cpu")
        (dataset,) = val_datasets(restored.cfg, restored.label_space)
        truth = {record["image_id"]: record["image_labels"] for record in dataset.records}
        for row in json.loads((folder / "predictions" / "fashion_val_image_label.json").read_text()):
            said = right.setdefault(row["image_id"], [])
            said += [(score >= 0.5) == (name in truth[row["image_id"]]) for name, score in row["label_scores"].items()]
    entries = [entry for said in right.values() for entry in said]
    return 100 * sum(entries) / len(entries), 100 * sum(map(all, right.values())) / len(right)


def _parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in restore(folder, "cpu").model.parameters())


@torch.no_grad()
def _inference(names: Sequence[str], out: Path, threads: int, turns: int = 100) -> dict[str, float]:
    """Seconds per image of each network, on random images of its input size."""
    torch.set_num_threads(threads)
    networks = {}
    for name in names:
        restored = restore(out / name, "cpu")
        side = restored.cfg.data.side
        networks[name] = restored.model.eval(), torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 5):
        for name, (model, image) in networks.items():
            started = time.perf_counter()
            model.predict_tensors([image], [torch.tensor([192, 192])])
            if turn >= 5:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _left_out(folder: Path, name: str) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    key = "fashion_left_out/image_label"
    colour, garment = name.split("_")
    return {
        "never seen together": name,
        "exact match": metrics[f"{key}/exact_match"],
        "binary accuracy": metrics[f"{key}/binary_accuracy"],
        "colour found": metrics[f"{key}/accuracy/{colour}"],
        "garment found": metrics[f"{key}/accuracy/{garment}"],
        "exact match on the seen": metrics["fashion_val/image_label/exact_match"],
    }


if __name__ == "__main__":
    main()
