"""Line charts as SVG text, for pages that open without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#0b6e99", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0f766e", "#be185d", "#475569")
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 10, 26
_MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """A named line: x ascending, y of the same length; dashed lines are for what is measured on other data."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def line_chart(
    series: Sequence[Series], *, log: bool = False, y_range: tuple[float, float] | None = None, legend: bool = True
) -> str:
    """An `<svg>`, readable without scripts; what a script needs to tell values stands in its `data-chart`.

    Series of more than 400 points are shown as the means of equally many neighbours. Not finite values are left out.

    Args:
        log: logarithmic y axis, where all values are positive.
        y_range: of the y axis; None: that of the values.
        legend: name the lines in a `<figcaption>`.
    """
    lines = [_thinned(_finite(entry)) for entry in series]
    lines = [entry for entry in lines if len(entry.x)]
    if not lines:
        return '<p class="absent">nothing recorded</p>'
    scale = _Scale.of(lines, log, y_range)
    body = [*_grid(scale)]
    for index, entry in enumerate(lines):
        body.append(_line(entry, PALETTE[index % len(PALETTE)], scale))
    attributes = escape(json.dumps(_data(lines, scale)), quote=True)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" data-chart="{attributes}">{"".join(body)}</svg>'
    return svg + (f"<figcaption>{_legend(lines)}</figcaption>" if legend else "")


def interval_chart(rows: Sequence[tuple[str, float, float | None]]) -> str:
    """An `<svg>` that stands alone: a dot per row on one axis through 0, and its deviation to both sides.

    Args:
        rows: name, value, deviation (None: unknown).
    """
    width, left, step = 640, 230, 26
    ends = [0.0, *(value + sign * (deviation or 0.0) for _, value, deviation in rows for sign in (-1, 1))]
    low, high = min(ends), max(ends)
    low, high = (low, high) if high > low else (low - 1.0, high + 1.0)
    bottom = step * len(rows) + 12

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 20)

    body = [f'<rect width="{width}" height="{bottom + 22}" fill="#fff"/>']
    for tick in _ticks(low, high, log=False):
        color = "#5b6773" if abs(tick) < 1e-9 else "#dfe4ea"
        body.append(f'<line x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="4" y2="{bottom}" stroke="{color}"/>')
        body.append(f'<text x="{px(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>')
    for index, (name, value, deviation) in enumerate(rows):
        y, color = 18 + step * index, PALETTE[0] if value >= 0 else PALETTE[1]
        body.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        if deviation is not None:
            start, end = px(value - deviation), px(value + deviation)
            body.append(
                f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2.5"/>'
            )
        body.append(f'<circle cx="{px(value):.1f}" cy="{y}" r="5" fill="{color}"/>')
    style = "<style>text { font: 12px system-ui, sans-serif; fill: #1f2933; }</style>"
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 22}" role="img"'
    return f"<svg {box}>{style}{''.join(body)}</svg>"


@dataclass(frozen=True)
class _Scale:
    """From values to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    @classmethod
    def of(cls, lines: Sequence[Series], log: bool, y_range: tuple[float, float] | None) -> _Scale:
        xs, ys = [x for e in lines for x in e.x], [y for e in lines for y in e.y]
        log = log and min(ys) > 0 and max(ys) > 20 * min(ys)
        low, high = y_range or (min(ys) if log else min(0.0, min(ys)), max(ys))
        if high <= low:
            high = low + 1.0
        return cls((min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), (low, high), log)

    def px(self, x: float) -> float:
        return _LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (_WIDTH - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (*self.y, y))
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _grid(scale: _Scale) -> Iterator[str]:
    """Lines and numbers of both axes."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in _ticks(*scale.y, scale.log):
        y = scale.py(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>'
    for value in _ticks(*scale.x, log=False):
        yield f'<text x="{scale.px(value):.1f}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>'


def _line(entry: Series, color: str, scale: _Scale) -> str:
    points = " ".join(f"{scale.px(x):.1f},{scale.py(y):.1f}" for x, y in zip(entry.x, entry.y))
    dash = ' stroke-dasharray="5 3"' if entry.dashed else ""
    line = f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.8"{dash}/>'
    if len(entry.x) > 24:
        return line
    dots = (
        f'<circle cx="{scale.px(x):.1f}" cy="{scale.py(y):.1f}" r="2.6" fill="{color}"/>'
        for x, y in zip(entry.x, entry.y)
    )
    return line + "".join(dots)


def _legend(lines: Sequence[Series]) -> str:
    return "".join(
        f'<span><i style="background:{PALETTE[index % len(PALETTE)]}"></i>{escape(entry.name)}</span>'
        for index, entry in enumerate(lines)
    )


def _data(lines: Sequence[Series], scale: _Scale) -> dict[str, object]:
    """What a script needs to say the values under the pointer: pixels and values."""
    return {
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "width": _WIDTH,
        "series": [
            {
                "name": entry.name,
                "color": PALETTE[index % len(PALETTE)],
                "px": [round(scale.px(x), 1) for x in entry.x],
                "x": [round(x, 3) for x in entry.x],
                "y": [float(f"{y:.5g}") for y in entry.y],
            }
            for index, entry in enumerate(lines)
        ],
    }


def _finite(entry: Series) -> Series:
    kept = [(x, y) for x, y in zip(entry.x, entry.y) if y is not None and math.isfinite(y)]
    return Series(entry.name, [x for x, _ in kept], [y for _, y in kept], entry.dashed)


def _thinned(entry: Series) -> Series:
    """At most `_MOST_POINTS` points, each the mean of equally many neighbours."""
    step = math.ceil(len(entry.x) / _MOST_POINTS)
    if step <= 1:
        return entry
    groups = [(entry.x[start : start + step], entry.y[start : start + step]) for start in range(0, len(entry.x), step)]
    return Series(entry.name, [sum(x) / len(x) for x, _ in groups], [sum(y) / len(y) for _, y in groups], entry.dashed)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within the range."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [10.0**p for p in powers if low <= 10.0**p <= high]
        if len(found) >= 2:
            return found
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    raw = (high - low) / 4
    base = 10 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= raw)
    start = math.ceil(low / step - 1e-9)
    return [step * n for n in range(start, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
