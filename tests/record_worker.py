"""One rank of `tests/data/test_record_store.py`: reads a data set with the others, and tells what it holds of it.

    python record_worker.py CONFIG OUT [then]

CONFIG is a YAML file of a training configuration. `then`: "wait" ends only when it is killed; "elsewhere" gives out
references that no other process can open.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from mtl_rcnn.data import catalog, record_store
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.engine.distributed import distributed, fail_together


def main(config: str, out: str, then: str = "") -> None:
    """Writes OUT/<rank>.json."""
    built: list[str] = []
    original = catalog.read_dataset

    def read_dataset(spec):
        built.append(spec.name)
        return original(spec)

    catalog.read_dataset = read_dataset
    if then == "elsewhere":
        record_store.os.getpid = lambda: 1
    with distributed("cpu") as ranks, fail_together(ranks):
        datasets, space = train_datasets(OmegaConf.load(config), ranks)
        told = {
            "read": built,
            "records": [record for dataset in datasets for record in dataset.records],
            "classes": space.classes,
            "mapped": [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "records" in line],
        }
        path = Path(out, f"{ranks.rank}.json")
        path.with_suffix(".part").write_text(json.dumps(told))
        path.with_suffix(".part").rename(path)
        while then == "wait":
            time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
