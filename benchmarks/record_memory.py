"""What the records of a large data set weigh in all processes of a machine, beside Detectron2's own loader.

    python benchmarks/record_memory.py --images 118000 --ranks 4 --workers 4

Writes a COCO file as large as instances_train2017.json (7.3 objects per image with polygons; three small pictures stand
for all images), and starts ranks (gloo) that go through everything in a training's start that reads records, and take
some batches from their loader workers. Then the proportional set sizes (PSS: a page that n processes map counts as 1/n
in each) of all ranks and workers are added up. Less the same with 100 images, this is what the records hold. One copy
is the size of the records pickled, as this loader serialises them.

Detectron2's ranks each read the file, one after the other to spare the machine; what they hold then does not depend on
it. Its loader pickles the records once per rank, and forked workers share them with their rank; nothing in it shares
between ranks. What reading needed on the way it frees, and glibc keeps: "Detectron2, trimmed" gives that back to the
system as this project does (`malloc_trim`), and so says how much of the difference is the records' own. The column
"peak" is the largest resident size that a single rank ever had.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

SIZES = ((72, 96), (96, 72), (96, 96))
"""Height and width of the pictures."""
CLASSES = 80
BATCHES = 50
TINY = 100
"""Images of the data set whose memory is not the records'."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4, help="of each rank's loader")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rank-of", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        hold(LOADERS[arguments.rank_of], arguments.folder, arguments.workers)
        return
    rows = list(measure(arguments.loaders, arguments.images, arguments.ranks, arguments.workers))
    print(tabulate(rows, headers="keys", floatfmt=".2f", intfmt=",", tablefmt="github"))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def measure(loaders: Iterable[str], images: int, ranks: int, workers: int) -> Iterator[dict[str, Any]]:
    """A row of the table per loader; sizes in 10^6 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tiny, full = Path(folder, "tiny"), Path(folder, "full")
        write_coco(tiny, TINY)
        written = write_coco(full, images)
        size = Path(full, "coco.json").stat().st_size
        print(f"{images} images, {written} annotations, a file of {size / 1e6:.0f} MB", file=sys.stderr, flush=True)
        one_copy = None
        for loader in loaders:
            base, _ = run(loader, tiny, ranks, workers)
            total, told = run(loader, full, ranks, workers)
            one_copy = one_copy or told[0]["serialised"]
            yield {
                "loader": loader,
                "ranks x workers": f"{ranks} x {workers}",
                "one copy, MB": round(one_copy / 1e6),
                "all processes, MB": round(total / 1e6),
                "with 100 images, MB": round(base / 1e6),
                "records, MB": round((total - base) / 1e6),
                "copies": (total - base) / one_copy,
                "peak of a rank, MB": round(max(rank["peak"] for rank in told) / 1e6),
                "until first batch, s": round(max(rank["seconds"] for rank in told)),
            }


def write_coco(folder: Path, images: int) -> int:
    """A COCO file of seeded random objects, and its pictures. Returns the number of annotations.

    Objects per image and numbers per polygon are such that the file of 118,000 images is as large as COCO's. There are
    a thousand different outlines, each read anew wherever it occurs.
    """
    folder.mkdir()
    for number, size in enumerate(SIZES):
        Image.fromarray(np.full((*size, 3), 127, np.uint8)).save(folder / f"{number}.png")
    rng = np.random.default_rng(0)
    outlines = [json.dumps(_outline(rng))[1:-1] for _ in range(1000)]
    owners = np.repeat(np.arange(1, images + 1), 1 + rng.poisson(6.27, images)).tolist()
    chosen = rng.integers(len(outlines), size=len(owners)).tolist()
    entries = [
        {"id": image, "file_name": f"{image % 3}.png", "height": SIZES[image % 3][0], "width": SIZES[image % 3][1]}
        for image in range(1, images + 1)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    with open(folder / "coco.json", "w", encoding="utf-8") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number, (image, outline) in enumerate(zip(owners, chosen), start=1):
            comma = "," if number > 1 else ""
            file.write(f'{comma}{{"id": {number}, "image_id": {image}, "iscrowd": 0, {outlines[outline]}}}')
        file.write("]}")
    return len(owners)


def _outline(rng: np.random.Generator) -> dict[str, Any]:
    points = np.round(rng.uniform(1, 70, (4 + rng.geometric(1 / 18), 2)), 2)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": [points.ravel().tolist()],
        "area": round(float((right - left) * (bottom - top)) / 2, 4),
        "bbox": np.round([left, top, right - left, bottom - top], 2).tolist(),
        "category_id": int(rng.integers(1, CLASSES + 1)),
    }


def run(loader: str, folder: Path, ranks: int, workers: int) -> tuple[int, list[dict[str, Any]]]:
    """Bytes in all ranks and workers while each rank holds its loader, and what the ranks tell."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank-of", loader, "--folder", str(folder), "--workers", str(workers)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        told = [_told(process) for process in processes]
        found = [pid for process in processes for pid in _family(process.pid)]
        if len(found) != ranks * (1 + workers):
            raise RuntimeError(f"{len(found)} processes found, expected {ranks} x (1 + {workers})")
        total = sum(map(proportional_set_size, found))
        for process in processes:
            process.stdin.close()  # ends it
        for process in processes:
            process.wait(timeout=120)
    finally:
        for process in processes:
            process.kill()
    print(f"{loader}, {folder.name}: {total / 1e6:.0f} MB in {len(found)} processes", file=sys.stderr, flush=True)
    return total, told


def proportional_set_size(process: int) -> int:
    """Bytes of a process, pages shared with others by their part."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _told(process: subprocess.Popen) -> dict[str, Any]:
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"a rank ended with status {process.wait()}")


def _family(process: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{process}/task").glob("*/children")
    return [process, *(int(child) for path in children for child in path.read_text().split())]


# One rank


def hold(make: Callable[[Path, int, Any], tuple[Iterable[Any], int]], folder: Path, workers: int) -> None:
    """Takes some batches, says what there is to say, and keeps everything until it is told to end."""
    from mtl_rcnn.engine.distributed import distributed
    from mtl_rcnn.engine.failures import fail_together

    start = time.perf_counter()
    with distributed("cpu", timeout_s=1800) as ranks, fail_together(ranks):
        loader, serialised = make(folder, workers, ranks)
        batches = iter(loader)
        next(batches)
        seconds = time.perf_counter() - start
        for _ in islice(batches, BATCHES):
            pass
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"serialised": serialised, "peak": peak, "seconds": seconds}), flush=True)
        sys.stdin.read()


def _ours(folder: Path, workers: int, ranks: Any) -> tuple[Iterable[Any], int]:
    """What `train` does with records before its first step."""
    from omegaconf import open_dict

    from mtl_rcnn import config
    from mtl_rcnn.data.coverage import label_table
    from mtl_rcnn.engine.build import build_targets
    from mtl_rcnn.engine.data import epoch_length, train_datasets, train_loader

    overrides = ["tasks=[detection,mask]", "data.train_augment.resize=null", f"data.workers={workers}"]
    cfg = config.compose("train", [*overrides, f"solver.batch_size={2 * ranks.world}"])
    with open_dict(cfg):
        cfg.data.train = [{"name": "large", "images": str(folder), "annotations": [str(folder / "coco.json")]}]
        cfg.data.val = []
    datasets, label_space = train_datasets(cfg, ranks)
    epoch_length(cfg, datasets)
    targets = build_targets(cfg, label_space)
    label_table(datasets, targets)
    return train_loader(cfg, datasets, targets, 0, ranks), datasets[0].records.nbytes


def _detectron2(folder: Path, workers: int, ranks: Any) -> tuple[Iterable[Any], int]:
    """`build_detection_train_loader` as its configuration sets it up, but that the ranks read in turns."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
    from detectron2.data.common import DatasetFromList
    from detectron2.data.datasets import register_coco_instances

    from mtl_rcnn.engine.distributed import barrier

    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN = (72,)
    register_coco_instances("large", {}, str(folder / "coco.json"), str(folder))
    for turn in range(ranks.world):
        if turn == ranks.rank:
            records = DatasetFromList(get_detection_dataset_dicts("large"), copy=False)
        barrier()
    mapper = DatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(records, mapper=mapper, total_batch_size=2 * ranks.world, num_workers=workers)
    return loader, records._lst.nbytes


def _trimmed(folder: Path, workers: int, ranks: Any) -> tuple[Iterable[Any], int]:
    """Detectron2's, in ranks that give freed memory back before their workers start."""
    loader, serialised = _detectron2(folder, workers, ranks)
    ctypes.CDLL(None).malloc_trim(0)
    return loader, serialised


LOADERS = {"mtl-rcnn": _ours, "Detectron2": _detectron2, "Detectron2, trimmed": _trimmed}


if __name__ == "__main__":
    main()
