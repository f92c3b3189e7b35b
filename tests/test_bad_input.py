"""Each fault of the corpus of bad input gives its named error, or is left out and counted; docs/errors.md says so."""

from __future__ import annotations

import json
import re

import pytest
from bad_input_cases import CASES, CHECKPOINT, CONFIG, ERRORS, JSON, MASKS, NO_IMAGE, POINTS, Case, page
from bad_input_plants import Excluded
from tiny import NETWORK, need_tasks
from toy import Toy
from whole_load import ALL, load_everything

from mtl_rcnn.config import compose


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", f"{case.area}-{case.fault}"))
def test_a_fault_gives_its_named_error(case: Case, toy: Toy) -> None:
    need_tasks(*ALL)
    case.spoil(toy)
    with pytest.raises(case.error or Excluded) as raised:
        case.run(toy)
    assert type(raised.value) is (case.error or Excluded)
    assert case.said in str(raised.value)
    assert "\n" not in str(raised.value) or case.area == CONFIG
    assert not (toy.root / "was_run").exists()


def test_good_input_gives_none(toy: Toy) -> None:
    need_tasks(*ALL)
    images = json.loads(toy.boxes.read_text())["images"]
    assert sorted(sample["image_id"] for sample in load_everything(toy)) == sorted(image["id"] for image in images)
    assert compose("train", ["data.root=unused", *NETWORK]).data.root == "unused"


def test_the_corpus_is_large_and_each_fault_stands_once() -> None:
    assert len(CASES) >= 40
    assert len({(case.area, case.fault) for case in CASES}) == len(CASES)
    assert {case.area for case in CASES} >= {NO_IMAGE, JSON, MASKS, POINTS, CONFIG, CHECKPOINT}


def test_the_page_of_errors_is_this_table() -> None:
    assert ERRORS.read_text(encoding="utf-8") == page(), "stale: run python tests/bad_input_cases.py"
