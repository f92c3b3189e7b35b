"""Two thousand broken COCO files: each loads cleanly or gives an error of this project's, never one of a library's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import need_tasks
from toy import Toy, write_toy
from whole_load import ALL, load_everything

from mtl_rcnn.data.target import Sample
from mtl_rcnn.errors import MtlRcnnError

ODD = (10**400, -(10**400), 2**63, 1e308, -1, 0, 0.5, "", "1", "\0", "\ud800", "/", [], {}, [[]], [[], []], [None] * 6)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.none() | st.booleans() | st.integers(-200, 200) | st.floats() | st.text(max_size=4),
    st.lists(st.floats() | st.integers(-100, 100) | st.none(), max_size=8),
    st.dictionaries(
        st.sampled_from(["size", "counts", "id", "x"]), st.integers(0, 90) | st.text(max_size=6), max_size=3
    ),
)
MUTATION = st.tuples(st.sampled_from(["replace", "replace", "delete", "double", "add"]), st.integers(0, 10**6), VALUES)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Paths to every value inside, parents before children."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inner for found in ((*path, key), *places(value, (*path, key)))]


def mutate(content: Any, kind: str, number: int, value: Any) -> None:
    """Changes one place: `number` chooses it."""
    paths = places(content)
    if not paths:
        return
    *parents, key = paths[number % len(paths)]
    holder = content
    for parent in parents:
        holder = holder[parent]
    if kind == "delete":
        del holder[key]
    elif kind == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif kind == "add" and isinstance(holder, dict):
        holder[str(value)[:8]] = value
    else:
        holder[key] = value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict, dict]:
    need_tasks(*ALL)
    toy = write_toy(tmp_path_factory.mktemp("fuzz") / "toy")
    return toy, json.loads(toy.boxes.read_text()), json.loads(toy.points.read_text())


@pytest.mark.slow
@settings(
    max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip
@given(mutations=st.lists(MUTATION, min_size=1, max_size=3), which=st.sampled_from(["boxes", "points"]))
def test_a_mutated_file_loads_or_is_refused_by_name(whole: tuple[Toy, dict, dict], mutations: list, which: str) -> None:
    toy, boxes, points = whole
    contents = {"boxes": copy.deepcopy(boxes), "points": copy.deepcopy(points)}
    for mutation in mutations:
        mutate(contents[which], *mutation)
    for name, path in (("boxes", toy.boxes), ("points", toy.points)):
        path.write_text(json.dumps(contents[name]))
    found = outcome(toy)
    if isinstance(found, MtlRcnnError):
        assert len(str(found)) > 20, "a refusal says what and where"
    else:
        boxes_found = [s["instances"].gt_boxes.tensor for s in found if s["instances"].has("gt_boxes")]
        assert all(tensor.isfinite().all() for tensor in boxes_found)


def outcome(toy: Toy) -> list[Sample] | MtlRcnnError:
    """The samples of a data set, or its refusal; any other exception passes."""
    try:
        return load_everything(toy, on_error="skip")
    except MtlRcnnError as error:
        return error


def test_the_whole_file_loads(whole: tuple[Toy, dict, dict]) -> None:
    toy, boxes, points = whole
    for path, content in ((toy.boxes, boxes), (toy.points, points)):
        path.write_text(json.dumps(content))
    assert len(load_everything(toy, on_error="skip")) == len(boxes["images"])


def test_mutations_change_the_file(whole: tuple[Toy, dict, dict]) -> None:
    for kind in ("replace", "delete", "double", "add"):
        changed = copy.deepcopy(whole[1])
        mutate(changed, kind, 7, "something")
        assert changed != whole[1]
    assert Path(whole[0].boxes).is_file()
