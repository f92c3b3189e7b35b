"""Loaders: the same samples whatever the workers, ranks and starting point; faults come out as one clear error."""

from __future__ import annotations

import gc
import itertools
import logging
import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from detectron2.data import transforms as T
from standin_targets import DeadlyTarget, FaultyTarget, HeavyTarget, standin_targets
from toy import Toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.loader import Loader, build_eval_loader, build_train_loader
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.planner import BatchPlanner
from mtl_rcnn.errors import ConfigError, DataError, LoaderError, UnreadableImageError


class _Setup:
    def __init__(self, toy: Toy, batch_size: int = 4, targets: dict | None = None, **mapper) -> None:
        (dataset,), self.space = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {})
        self.records = dataset.records
        augmentations = [T.RandomFlip(0.5), T.ResizeShortestEdge((30, 60), 100), T.RandomContrast(0.5, 1.5)]
        self.mapper = Mapper(
            standin_targets(self.space) if targets is None else targets, augmentations, seed=3, **mapper
        )
        self.planner = BatchPlanner([(r["height"], r["width"]) for r in self.records], batch_size, 2, seed=3)

    def train(self, **options) -> Loader:
        return build_train_loader(self.records, self.mapper, self.planner, **options)


def _take(loader: Loader, number: int) -> list[list[dict]]:
    return list(itertools.islice(loader, number))


def _print(batches: list[list[dict]]) -> list[list[tuple]]:
    """Batches in a form that compares: ids, and sums that any other augmentation changes."""
    return [
        [
            (
                s["sample_index"],
                s["image_id"],
                tuple(s["image"].shape),
                int(s["image"].long().sum()),
                s["instances"].gt_boxes.tensor.tolist(),
                s["labelled"],
            )
            for s in batch
        ]
        for batch in batches
    ]


@pytest.fixture(params=[0, 2])
def workers(request: pytest.FixtureRequest) -> int:
    """In the main process, and with worker processes."""
    return request.param


def test_batches_are_the_planners(toy: Toy, workers: int):
    setup = _Setup(toy)
    batches = _take(setup.train(workers=workers), 6)
    planned = [[(n, setup.records[r]["image_id"]) for n, r in setup.planner.batch(i)] for i in range(6)]
    assert [[(s["sample_index"], s["image_id"]) for s in batch] for batch in batches] == planned


def test_workers_start_and_ranks_change_nothing(toy: Toy):
    setup = _Setup(toy)
    whole = _print(_take(setup.train(), 8))
    assert _print(_take(setup.train(workers=2), 8)) == whole
    assert _print(_take(setup.train(workers=1, start_iteration=5), 3)) == whole[5:]
    parts = [_print(_take(setup.train(rank=rank, world=2), 8)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*parts)] == whole


def test_global_random_state_is_not_touched(toy: Toy):
    loader = _Setup(toy).train(workers=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    _take(loader, 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_uneven_share_is_refused_at_once(toy: Toy):
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        _Setup(toy).train(world=3)


def test_label_fault_comes_out_as_its_own_one_line(toy: Toy, workers: int):
    space = LabelSpace(({"name": "x"},))
    setup = _Setup(toy, targets={"faulty": FaultyTarget("faulty", space, image_id=13)})
    with pytest.raises(DataError) as raised:
        _take(setup.train(workers=workers), 6)
    assert type(raised.value) is DataError
    assert str(raised.value) == f"{toy.images / '13.png'}, image 13: a fault"


def test_bug_in_a_target_names_the_image(toy: Toy, workers: int):
    space = LabelSpace(({"name": "x"},))
    setup = _Setup(toy, targets={"faulty": FaultyTarget("faulty", space, image_id=13, bug=True)})
    with pytest.raises(RuntimeError, match=r"13\.png \(dataset 'toy', image id 13\): KeyError: 'forgotten'") as raised:
        _take(setup.train(workers=workers), 6)
    assert "standin_targets.py" in str(raised.value)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed by SIGKILL while it loaded .*; where memory runs out"),
        (signal.SIGBUS, "was killed by SIGBUS while it loaded .*; where shared memory runs out: a larger /dev/shm"),
        (signal.SIGSEGV, "was killed by SIGSEGV while it loaded .*; data.workers=0 loads in the main process"),
    ],
)
def test_a_worker_that_dies_names_its_image(toy: Toy, number: int, said: str):
    """And only when a batch is waited for: not in the middle of an update or of writing a file."""
    space = LabelSpace(({"name": "x"},))
    setup = _Setup(toy, batch_size=1, targets={"deadly": DeadlyTarget("deadly", space, image_id=13, signal=number)})
    batches = iter(setup.train(workers=2))
    assert next(batches)[0]["image_id"] != 13
    time.sleep(2)
    with pytest.raises(LoaderError, match=said) as raised:
        list(itertools.islice(batches, 10))
    assert f"{toy.images}/13.png (dataset 'toy', image id 13)" in str(raised.value)


def test_a_worker_that_dies_while_it_hands_over_a_batch_is_noticed(toy: Toy):
    """The main process reads half a message, whose end never comes."""
    setup = _Setup(toy, batch_size=1, targets={"heavy": HeavyTarget("heavy", LabelSpace(({"name": "x"},)))})
    others = multiprocessing.active_children()
    batches = iter(setup.train(workers=2))
    next(batches)
    time.sleep(2)  # one of them waits for the pipe to be read
    for worker in multiprocessing.active_children():
        if worker not in others:
            worker.kill()
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(20)
    try:
        with pytest.raises(LoaderError, match=r"a worker was killed by SIGKILL; where memory runs out"):
            list(itertools.islice(batches, 20))
    finally:
        signal.alarm(0)


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError("the loader waits for ever")


def test_workers_end_by_themselves_after_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """Torch waits five seconds for each, and then terminates it."""
    space = LabelSpace(({"name": "x"},))
    setup = _Setup(toy, targets={"faulty": FaultyTarget("faulty", space, image_id=13, bug=True)})
    terminated: list[BaseProcess] = []
    monkeypatch.setattr(BaseProcess, "terminate", lambda self: (terminated.append(self), self.kill()))
    with pytest.raises(RuntimeError):
        _take(setup.train(workers=2), 6)
    gc.collect()
    assert not multiprocessing.active_children()
    assert not terminated


def test_unreadable_image_raises_by_default(toy: Toy, workers: int):
    setup = _Setup(toy)
    (toy.images / "15.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"15\.png \(dataset 'toy', image id 15\)"):
        _take(setup.train(workers=workers), 6)


def test_unreadable_image_is_replaced_the_same_way_everywhere(toy: Toy, caplog: pytest.LogCaptureFixture):
    setup = _Setup(toy, on_error="skip")
    healthy = _take(setup.train(), 12)
    (toy.images / "15.png").write_bytes(b"broken")
    loaders = [setup.train(), setup.train(workers=2)]
    runs = [_take(loader, 12) for loader in loaders]
    assert _print(runs[0]) == _print(runs[1])
    for before, after in zip(itertools.chain(*healthy), itertools.chain(*runs[0])):
        assert after["sample_index"] == before["sample_index"]
        if before["image_id"] == 15:
            assert after["image_id"] != 15
        else:
            assert _print([[after]]) == _print([[before]])
    for loader in loaders:
        (exclusion,) = loader.excluded.values()
        assert (exclusion.image_id, exclusion.dataset) == (15, "toy")
    named = [r for r in caplog.records if r.levelno == logging.WARNING and "15.png" in r.getMessage()]
    assert len(named) == len(loaders)


def test_replacement_goes_on_until_an_image_can_be_read(toy: Toy):
    setup = _Setup(toy, on_error="skip")
    for file in list(toy.images.iterdir())[:4]:
        file.write_bytes(b"broken")
    batches = _take(setup.train(), 6)
    assert all(len(batch) == 4 for batch in batches)


def test_too_many_unreadable_images_end_training(toy: Toy):
    setup = _Setup(toy, on_error="skip")
    for file in toy.images.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"sample \d+: 10 images in a row cannot be read, the last: .*\.png"):
        _take(setup.train(), 1)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_evaluation_sees_every_record_once(toy: Toy, world: int, batch_size: int):
    setup = _Setup(toy, training=False)
    loaders = [build_eval_loader(setup.records, setup.mapper, rank, world, 0, batch_size) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(part) for part in batches]
    seen = [(s["sample_index"], s["image_id"]) for part in batches for batch in part for s in batch]
    assert seen == [(index, record["image_id"]) for index, record in enumerate(setup.records)]


def test_evaluation_with_workers_and_an_unreadable_image(toy: Toy, workers: int):
    setup = _Setup(toy, training=False, on_error="skip")
    (toy.images / "12.png").write_bytes(b"broken")
    loader = build_eval_loader(setup.records, setup.mapper, workers=workers)
    assert [s["image_id"] for batch in loader for s in batch] == [11, 13, 14, 15, 16]
    assert list(loader.excluded) == [str(toy.images / "12.png")]


def test_real_images_load_with_workers(coco_mini: Path):
    files = [f"annotations/{kind}_train2017.json" for kind in ("instances", "person_keypoints")]
    node = {"name": "coco", "images": "train2017", "annotations": files, "limit": 12}
    (dataset,), space = build_datasets([DatasetSpec.from_config(node, str(coco_mini))], {})
    mapper = Mapper(standin_targets(space), [T.ResizeShortestEdge(128, 200), T.RandomFlip()], crowd="ignore")
    planner = BatchPlanner([(r["height"], r["width"]) for r in dataset.records], 4, 32, seed=0)
    batches = _take(build_train_loader(dataset.records, mapper, planner, workers=2), 3)
    assert {s["image_id"] for batch in batches for s in batch} == {r["image_id"] for r in dataset.records}
    assert all(len(s["instances"]) > 0 for batch in batches for s in batch)
