"""One rank of `tests/data/test_record_store.py`: reads a data set with the others, and tells what it holds of it.

python record_worker.py CONFIG OUT [dies|apart]: "dies" ends by SIGKILL; "apart" gives out references that no other
process can open.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from omegaconf import OmegaConf

from mtl_rcnn.data import catalog, record_store
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.engine.distributed import barrier, distributed
from mtl_rcnn.engine.failures import fail_together


def main(config: str, out: str, kind: str = "") -> None:
    """Writes OUT/<rank>.json: names of the data sets it read from files, its records, its mappings of record stores
    as [device, inode, name]."""
    read: list[str] = []
    original = catalog.read_dataset

    def read_dataset(spec):
        read.append(spec.name)
        return original(spec)

    catalog.read_dataset = read_dataset
    if kind == "apart":
        record_store._open = _not_found
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        datasets, _ = train_datasets(OmegaConf.load(config), ranks)
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "mtl_rcnn" in line]
        told = {
            "read": read,
            "records": [record for dataset in datasets for record in dataset.records],
            "mapped": [line[3:] for line in lines if "records" in line[5]],
        }
        Path(out, f"{ranks.rank}.json").write_text(json.dumps(told))
        barrier()
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)


def _not_found(*reference: object) -> None:
    raise FileNotFoundError("as in another namespace of processes")


if __name__ == "__main__":
    main(*sys.argv[1:])
