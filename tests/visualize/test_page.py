"""The report's page: one file, nothing loaded from elsewhere, text escaped; charts with values where they belong."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from mtl_rcnn.visualize.charts import Series, line_chart
from mtl_rcnn.visualize.page import Chart, Errors, Page, Picture, Table, embedded, heat_table, render


def svg_of(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart[: chart.index("</svg>") + 6])


def points_of(svg: ElementTree.Element) -> np.ndarray:
    line = svg.find("polyline")
    return np.array([[float(v) for v in pair.split(",")] for pair in line.attrib["points"].split()])


def test_a_chart_is_linear_and_upside_up():
    points = points_of(svg_of(line_chart([Series("loss", [0, 50, 100], [0.0, 1.0, 4.0])])))
    assert np.diff(points[:, 0]) == pytest.approx([points[1, 0] - points[0, 0]] * 2, abs=0.15)
    fall = points[0, 1] - points[:, 1]
    assert fall[2] == pytest.approx(4 * fall[1], abs=0.5)
    assert fall[2] > 100


def test_a_logarithmic_chart_has_equal_steps_per_factor():
    points = points_of(svg_of(line_chart([Series("loss", [1, 2, 3], [100.0, 10.0, 1.0])], log=True)))
    steps = np.diff(points[:, 1])
    assert steps[0] == pytest.approx(steps[1], abs=0.15)
    assert steps[0] > 50


def test_long_series_are_thinned_to_means_and_not_finite_values_left_out():
    values = [1.0 if n % 2 else 3.0 for n in range(4000)]
    values[10] = float("nan")
    data = json.loads(unescape(svg_of(line_chart([Series("loss", list(range(4000)), values)])).attrib["data-chart"]))
    (series,) = data["series"]
    assert len(series["y"]) == 400
    assert np.mean(series["y"]) == pytest.approx(2.0, abs=0.01)


def test_one_point_and_none():
    assert "<circle" in line_chart([Series("AP", [5], [3.0])])
    assert "nothing recorded" in line_chart([Series("AP", [], [])])
    assert "nothing recorded" in line_chart([Series("AP", [1], [float("inf")])])


def test_a_page_is_whole_and_escaped():
    picture = Picture("<b>title</b>", embedded(np.full((8, 8, 3), 200, dtype=np.uint8)))
    chart = Chart("loss", line_chart([Series("<i>", [1, 2], [3.0, 2.0])]))
    matrix = heat_table(["cat", "background"], np.array([[3, 1], [0, 0]]))
    page = Page("run <script>alert(1)</script>", "a & b", charts=[chart], gallery=[picture])
    page.errors = [Errors("task", matrix, curves=[chart], worst=Table(["image_id"], [["7"]]))]
    page.summaries, page.command, page.reasons = [Table(["dataset"], [["toy"]])], "python train", ["because"]
    text = render(page)

    assert "<script>alert" not in text
    assert "run &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;title" in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text), "something is loaded from elsewhere"
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)
    for name, _ in page.contents:
        assert f'<section id="{name}">' in text


def test_an_empty_page_says_what_is_missing():
    text = render(Page("run", "nothing", gallery_note="no checkpoint", labels_note="no data"))
    for said in ("This run was not evaluated", "No metrics.jsonl", "no checkpoint", "No tables", "no data"):
        assert said in text


def test_pictures_survive_embedding_and_large_ones_shrink():
    image = np.zeros((100, 3200, 3), dtype=np.uint8)
    image[:, :, 0] = 220
    source = embedded(image)
    data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    back = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert back.shape == (50, 1600, 3)
    assert abs(int(back[25, 800, 0]) - 220) < 6
    assert back[:, :, 1:].max() < 12


def test_the_colour_of_a_cell_is_its_share_of_the_row():
    rows = heat_table(["a", "background"], np.array([[3, 1], [0, 0]]))["rows"]
    assert [cell["label"] for cell in rows[0]["cells"]] == ["3", "1"]
    assert [cell["label"] for cell in rows[1]["cells"]] == ["", ""]
    assert rows[0]["cells"][0]["ink"] == "#fff"
    assert rows[1]["cells"][0]["color"] == "rgb(244,244,244)"
