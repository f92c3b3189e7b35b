"""Metrics as aligned plain text: what a person reads at the end of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mtl_rcnn.evaluation.evaluator import Metric

_Named = dict[str, Metric]
_ABSENT = "-"


def report_text(metrics: Mapping[str, Metric], width: int = 110) -> str:
    """Tables of metrics named "dataset/task/metric" or "dataset/task/metric/class", and the reasons below them.

    One row per dataset and task, then one table per dataset and task with a row per class, set in as many columns as
    `width` characters hold. Tasks that have no metric in common stand in separate tables. A metric of which less is
    better is marked "↓", one that does not exist "-".
    """
    if not metrics:
        return "no metrics"
    groups = _by_task(metrics)
    blocks = [_summary(tasks) for tasks in _alike({key: _whole(named) for key, named in groups.items()})]
    blocks += [_per_class(key, named, width) for key, named in groups.items() if _measured(named)]
    reasons = _reasons(groups)
    return "\n\n".join([*blocks, *([reasons] if reasons else [])])


def align(rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a table: the first columns to the left, the others (numbers) to the right, two blanks between."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _by_task(metrics: Mapping[str, Metric]) -> dict[tuple[str, str], _Named]:
    groups: dict[tuple[str, str], _Named] = {}
    for key, metric in metrics.items():
        dataset, task, name = key.split("/", 2)
        groups.setdefault((dataset, task), {})[name] = metric
    return groups


def _whole(named: _Named) -> _Named:
    return {name: metric for name, metric in named.items() if "/" not in name}


def _measured(named: _Named) -> bool:
    """Whether a class has a number that is a measurement: a table of reasoned zeros says nothing new."""
    return any("/" in name and metric.reason is None for name, metric in named.items())


def _classes(named: _Named) -> dict[str, _Named]:
    """class -> metric -> value, from the names "metric/class"."""
    classes: dict[str, _Named] = {}
    for name, metric in named.items():
        if "/" in name:
            kind, class_name = name.split("/", 1)
            classes.setdefault(class_name, {})[kind] = metric
    return classes


def _alike(groups: Mapping[tuple[str, str], _Named]) -> list[dict[tuple[str, str], _Named]]:
    """Groups that share a metric's name, together."""
    tables: list[dict[tuple[str, str], _Named]] = []
    for key, named in groups.items():
        for table in tables:
            if any(set(named) & set(other) for other in table.values()):
                table[key] = named
                break
        else:
            tables.append({key: named})
    return [table for table in tables if any(table.values())]


def _summary(tasks: Mapping[tuple[str, str], _Named]) -> str:
    columns = _columns(tasks.values())
    rows = [["dataset", "task", *columns]]
    cells = {column: _cells([_of(named, column) for named in tasks.values()]) for column in columns.values()}
    for index, (dataset, task) in enumerate(tasks):
        rows.append([dataset, task, *(cells[column][index] for column in columns.values())])
    return "\n".join(align(rows, text_columns=2))


def _per_class(key: tuple[str, str], named: _Named, width: int) -> str:
    classes = _classes(named)
    columns = _columns(classes.values())
    cells = [_cells([_of(values, column) for values in classes.values()]) for column in columns.values()]
    rows = [["class", *columns]]
    rows += [[class_name, *(column[index] for column in cells)] for index, class_name in enumerate(classes)]
    lines = align(rows)
    return "\n".join([f"{key[0]}/{key[1]} per class", *_side_by_side(lines[0], lines[1:], width)])


def _side_by_side(header: str, lines: Sequence[str], width: int) -> list[str]:
    """The lines in columns, read downwards, each column under its header."""
    cell = max(len(line) for line in (header, *lines))
    columns = min(max(1, (width + 3) // (cell + 3)), len(lines))
    height = -(-len(lines) // columns)
    parts = [[header, *lines[start : start + height]] for start in range(0, len(lines), height)]
    return [
        " | ".join((part[row] if row < len(part) else "").ljust(cell) for part in parts).rstrip()
        for row in range(height + 1)
    ]


def _columns(groups: Iterable[_Named]) -> dict[str, tuple[str, bool]]:
    """Header -> metric name and whether higher is better, in the order of first appearance."""
    headers: dict[str, tuple[str, bool]] = {}
    for named in groups:
        for name, metric in named.items():
            column = name, metric.higher_is_better
            headers.setdefault(name if metric.higher_is_better else f"{name} ↓", column)
    return headers


def _of(named: _Named, column: tuple[str, bool]) -> Metric | None:
    """The metric of a column, None if the group has none of this name and direction."""
    metric = named.get(column[0])
    return metric if metric is not None and metric.higher_is_better == column[1] else None


def _cells(column: Sequence[Metric | None]) -> list[str]:
    """Two decimals where the column goes to 10 and above (percent), else three."""
    digits = 2 if any(metric is not None and abs(metric.value) >= 10 for metric in column) else 3
    return [_ABSENT if metric is None else f"{metric.value:.{digits}f}" for metric in column]


def _reasons(groups: Mapping[tuple[str, str], _Named]) -> str:
    """One line per dataset, task and reason; classes are counted, since a reason often holds for many."""
    lines = []
    for (dataset, task), named in groups.items():
        by_reason: dict[str, list[str]] = {}
        for name, metric in named.items():
            if metric.reason is not None:
                by_reason.setdefault(metric.reason, []).append(name)
        lines += [f"{dataset}/{task}: {reason} ({_subjects(names)})" for reason, names in by_reason.items()]
    return "\n".join(lines)


def _subjects(names: Sequence[str]) -> str:
    whole = [name for name in names if "/" not in name]
    classes = list(dict.fromkeys(name.split("/", 1)[1] for name in names if "/" in name))
    shown = ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")
    return "; ".join(part for part in (", ".join(whole), shown) if part)
