"""The parts of a report as a page that opens without a network: tables, embedded pictures, the template."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mtl_rcnn.errors import MtlRcnnError

_WIDEST = 1600


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """An SVG (see `charts.line_chart`) under a title."""

    title: str
    svg: str


@dataclass(frozen=True)
class Picture:
    """An embedded picture under a title."""

    title: str
    source: str


@dataclass(frozen=True)
class Errors:
    """What is known of one task's errors on one dataset; what is unknown is empty or None.

    Attributes:
        matrix: see `heat_table`.
        note, curves_note: what is left out of the matrix and of the curves, as a sentence or its rest.
        worst: the worst images.
        sheet: source of their picture.
    """

    title: str
    matrix: Mapping[str, Any] | None = None
    note: str = ""
    curves: Sequence[Chart] = ()
    curves_note: str = ""
    worst: Table | None = None
    sheet: str | None = None


@dataclass
class Page:
    """Everything that a report shows, in its order; see `report.html`."""

    title: str
    subtitle: str
    cards: list[dict[str, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    summaries: list[Table] = field(default_factory=list)
    per_class: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    gallery: list[Picture] = field(default_factory=list)
    gallery_note: str = ""
    errors: list[Errors] = field(default_factory=list)
    labels: Table | None = None
    labels_note: str = ""
    differences: Table | None = None
    config: str = ""
    command: str = ""

    template = "report.html"
    contents = (
        ("metrics", "Metrics"),
        ("curves", "Training"),
        ("predictions", "Predictions"),
        ("errors", "Errors"),
        ("data", "Data"),
        ("configuration", "Configuration"),
        ("origin", "Origin"),
    )


@dataclass
class ComparisonPage:
    """Everything that the page of a comparison shows, in its order; see `comparison.html`.

    Attributes:
        verdicts: what the numbers say, a sentence each.
        notes: what to know about them.
        deltas: delta_m of the networks, see `charts.interval_chart`.
        numbers, terms: the tables.
    """

    title: str
    subtitle: str
    verdicts: list[str]
    notes: list[str]
    deltas: str
    numbers: Table
    terms: Table
    charts: list[Chart] = field(default_factory=list)
    gallery: list[Picture] = field(default_factory=list)
    config: str = ""
    command: str = ""

    template = "comparison.html"
    contents = (
        ("answer", "Answer"),
        ("numbers", "Numbers"),
        ("curves", "Training"),
        ("predictions", "Predictions"),
        ("origin", "Origin"),
    )


def render(page: Page | ComparisonPage) -> str:
    """The page as HTML, all text escaped; nothing in it is loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader("mtl_rcnn.visualize", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(page.template).render(**vars(page), contents=page.contents)


def embedded(rgb: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB -> a `data:` source: JPEG, made smaller where it is wider than 1600 pixels."""
    if rgb.shape[1] > _WIDEST:
        height = round(rgb.shape[0] * _WIDEST / rgb.shape[1])
        rgb = cv2.resize(rgb, (_WIDEST, height), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 84])
    if not done:
        raise MtlRcnnError(f"a picture of shape {rgb.shape} cannot be encoded as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def heat_table(names: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    """A matrix of counts (C, C) with rows and columns of these names; a cell's colour is its share of its row, blue on
    the diagonal and orange beside it."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        cells = [_cell(int(counts[i, j]), float(share[i, j]), right=i == j) for j in range(len(names))]
        rows.append({"name": name, "cells": cells})
    return {"header": ["", *names], "rows": rows}


def _cell(count: int, share: float, right: bool) -> dict[str, str]:
    color = (11, 110, 153) if right else (194, 65, 12)
    mixed = ",".join(str(round(244 + (c - 244) * share)) for c in color)
    return {
        "label": str(count) if count else "",
        "color": f"rgb({mixed})",
        "ink": "#fff" if share > 0.45 else "#1f2933",
    }
