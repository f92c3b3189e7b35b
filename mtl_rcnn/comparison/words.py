"""A comparison in sentences, as a Markdown table, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from mtl_rcnn.comparison.table import Row, Spread, apart, is_noise, own_scores
from mtl_rcnn.visualize.page import Table


def verdicts(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[str]:
    """What the table says, a sentence each. A difference within one standard deviation is called noise.

    Args:
        rows: with deltas.
        metrics: task -> name of its metric.
    """
    found = [*_joint(rows), *_company(rows, metrics), *_methods(rows)]
    if all(len(row.seeds) == 1 for row in rows):
        found.append("Every network was trained with one seed: what of this is noise cannot be told.")
    return found


def table(rows: Sequence[Row], metrics: Mapping[str, str], higher_is_better: Mapping[str, bool]) -> Table:
    """A line per network and one for a network per task; cells are means and standard deviations over the seeds."""
    head = [f"{task} {metrics[task]}{'' if higher_is_better[task] else ' ↓'}" for task in metrics]
    header = ["network", *head, "delta_m (%)", "parameters (M)", "ms / training step", "ms / image"]
    cells = [_cells(row, metrics) for row in rows]
    return Table(header, [_apart(rows, metrics), *cells])


def terms_table(rows: Sequence[Row], metrics: Mapping[str, str]) -> Table:
    """The terms of delta_m: how much better each task is than its own network, in percent."""
    lines = [
        [row.network.title, *(_signed(row.terms.get(task)) for task in metrics), _signed(row.delta_m)]
        for row in rows
        if row.network.own_of is None or row.network.method is not None
    ]
    return Table(["network", *metrics, "delta_m (%)"], lines)


def markdown(table: Table) -> str:
    """A Markdown table; all but the first column to the right."""
    lines = [_line(table.header), _line(["---", *["---:"] * (len(table.header) - 1)]), *map(_line, table.rows)]
    return "\n".join(lines)


def csv_text(rows: Sequence[Row], metrics: Mapping[str, str]) -> str:
    """A line per training: network, seed, metrics, terms, delta_m, costs."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = [f"{task}/{metric}" for task, metric in metrics.items()]
    terms = [f"term/{task}" for task in metrics]
    writer.writerow(
        ["network", "seed", *header, *terms, "delta_m", "parameters", "seconds_per_step", "inference_ms_per_image"]
    )
    for row in rows:
        for index, seed in enumerate(row.seeds):
            scores = [_at(row.scores.get(task), index) for task in metrics]
            shares = [_at(row.terms.get(task), index) for task in metrics]
            costs = [_plain(row.parameters), _at(row.step_seconds, index), _plain(row.inference_ms)]
            writer.writerow([row.network.title, seed, *scores, *shares, _at(row.delta_m, index), *costs])
    return buffer.getvalue()


def spread_text(spread: Spread | None, digits: int = 1) -> str:
    """Such as "36.1 ± 0.4"; "-" where there is nothing."""
    if spread is None:
        return "-"
    text = f"{round(spread.mean, digits) + 0.0:.{digits}f}"  # never -0.0
    return text if spread.deviation is None else f"{text} ± {spread.deviation:.{digits}f}"


def _joint(rows: Sequence[Row]) -> list[str]:
    """The network of all tasks, and one network per task."""
    joint, own = next((row for row in rows if row.network.method is not None), None), apart(rows)
    if joint is None or joint.delta_m is None or own is None:
        return []
    what = _judged(joint.delta_m, own, "better than", "worse than", "as good as, within noise,")
    terms = ", ".join(f"{task} {_signed(term)}" for task, term in joint.terms.items())
    return [
        f"One network of all tasks ({joint.network.title}) is {what} one network per task: delta_m "
        f"{_signed(joint.delta_m)} % ({terms})."
    ]


def _company(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[str]:
    """What other tasks in the network do to a task, under the plain sum."""
    own, sentences, quiet = own_scores(rows), [], 0
    first = next((row.network.method for row in rows if row.network.method is not None), None)
    for row in rows:
        if row.network.method not in (None, first):
            continue
        for task, score in row.scores.items():
            if task not in own or row.network.own_of == task or task not in row.terms:
                continue
            if is_noise(score, own[task]):
                quiet += 1
                continue
            verb = "gains" if row.terms[task].mean > 0 else "loses"
            values = [spread_text(spread, _digits(spread)) for spread in (score, own[task])]
            sentences.append(
                f"In the network {row.network.title}, {task} {verb}: {metrics[task]} {values[0]}, in its own network "
                f"{values[1]}."
            )
    if quiet:
        sentences.append(
            f"{quiet} other difference{'s' if quiet > 1 else ''} between a task in company and in its own network "
            f"{'are' if quiet > 1 else 'is'} within one standard deviation: noise."
        )
    return sentences


def _methods(rows: Sequence[Row]) -> list[str]:
    """The methods and variants against the first of them."""
    all_tasks = [row for row in rows if row.network.method is not None and row.delta_m is not None]
    if len(all_tasks) < 2:
        return []
    reference, *others = all_tasks
    name = "the plain sum" if reference.network.method == "sum" else str(reference.network.method)
    sentences, better = [], []
    for row in others:
        noise = is_noise(row.delta_m, reference.delta_m)
        gap = row.delta_m.mean - reference.delta_m.mean
        judged = "noise" if noise else "better" if gap > 0 else "worse"
        if noise is None:
            judged += " (one seed)"
        sentences.append(f"{row.network.method}: delta_m {gap:+.1f} against {name}, {judged}")
        if gap > 0 and not noise:
            better.append(str(row.network.method))
    summary = f"{', '.join(better)} beat{'s' if len(better) == 1 else ''} {name}" if better else f"Nothing beats {name}"
    return ["; ".join(sentences) + ".", f"{summary}."]


def _judged(first: Spread, second: Spread, better: str, worse: str, noise: str) -> str:
    if is_noise(first, second):
        return noise
    return better if first.mean > second.mean else worse


def _cells(row: Row, metrics: Mapping[str, str]) -> list[str]:
    scores = [spread_text(row.scores.get(task), _digits(row.scores.get(task))) for task in metrics]
    return [row.network.title, *scores, _signed(row.delta_m), *_costs(row)]


def _apart(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[str]:
    """The line of a network per task: its costs are sums."""
    own = [row for row in rows if row.network.own_of is not None]
    scores = own_scores(rows)
    cells = [spread_text(scores.get(task), _digits(scores.get(task))) for task in metrics]
    steps = sum(row.step_seconds.mean for row in own)
    times = [row.inference_ms for row in own]
    parameters = [row.parameters for row in own]
    return [
        f"one network per task ({len(own)})",
        *cells,
        spread_text(apart(rows)),
        _millions(None if None in parameters else sum(parameters)),
        f"{1000 * steps:.0f}",
        "-" if None in times else f"{sum(times):.1f}",
    ]


def _costs(row: Row) -> list[str]:
    inference = "-" if row.inference_ms is None else f"{row.inference_ms:.1f}"
    return [_millions(row.parameters), f"{1000 * row.step_seconds.mean:.0f}", inference]


def _millions(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.2f}"


def _signed(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    text = f"{round(spread.mean, 1) + 0.0:+.1f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:.1f}"


def _digits(spread: Spread | None) -> int:
    """Percentages with one, metres and their like with three."""
    return 1 if spread is None or abs(spread.mean) >= 10 else 3 if abs(spread.mean) < 2 else 2


def _at(spread: Spread | None, index: int) -> str:
    return "" if spread is None else f"{spread.values[index]:.6g}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
