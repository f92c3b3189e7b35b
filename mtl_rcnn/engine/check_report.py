"""What a check of the data found, as text for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_rcnn.data.faults import DROP_ANNOTATION
from mtl_rcnn.engine.startup import label_report
from mtl_rcnn.evaluation.progress import clock_text

if TYPE_CHECKING:
    from mtl_rcnn.data.faults import Fault
    from mtl_rcnn.engine.check import CheckReport, Source
    from mtl_rcnn.engine.dry_run import DryRun

SHOWN = 5
"""Faults of a kind that the text lists; the JSON lists all."""


def as_text(report: CheckReport) -> str:
    """The whole report."""
    parts = [_source_text(source) for source in report.sources]
    if any(fault.repair and fault.repair.drop == DROP_ANNOTATION for s in report.sources for fault in s.faults):
        parts.append(
            "NOTE: an object whose annotation is left out trains as background; real objects want mending by hand"
        )
    if report.general:
        parts.append("\n".join(["the datasets together: FAULT", *(f"  {text}" for text in report.general)]))
    if report.coverage:
        repaired = any(source.faults for source in report.sources)
        parts.append(f"labels{' that repairs leave' if repaired else ''}:\n" + label_report(report.coverage))
        parts += _unlabelled(report)
    if report.probe is not None:
        parts.append(_probe_text(report.probe))
    parts.append("written:\n" + "\n".join(f"  {path}" for path in report.written))
    return "\n\n".join([*parts, _verdict(report)])


def write_json(path: Path, report: CheckReport) -> Path:
    """Writes the machine-readable report: all faults, coverage, repaired files, the dry run."""
    content = {
        "clean": report.clean,
        "datasets": [_source_json(source) for source in report.sources],
        "general": report.general,
        "faults": [_fault_json(source, fault) for source in report.sources for fault in source.faults],
        "coverage": [asdict(row) for row in report.coverage],
        "written": [str(file) for file in report.written],
        "dry_run": None if report.probe is None else _probe_json(report.probe),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return path


def _source_json(source: Source) -> dict[str, Any]:
    kept = source.dataset.report if source.dataset else None
    return {
        "name": source.spec.name,
        "splits": source.splits,
        "annotations": list(source.spec.annotations),
        "images": source.spec.images,
        "images_left": kept.kept if kept else None,
        "removed": dict(kept.removed) if kept else {},
        "faults": len(source.faults),
    }


def _fault_json(source: Source, fault: Fault) -> dict[str, Any]:
    return {
        "dataset": source.spec.name,
        "splits": source.splits,
        "kind": fault.kind,
        "file": fault.file,
        "image_id": fault.image_id,
        "annotation_id": fault.annotation_id,
        "message": fault.message,
        "repair": fault.repair.name if fault.repair else None,
        "refused_by_training": fault.fatal,
    }


def _probe_json(probe: DryRun) -> dict[str, Any]:
    """Losses that are not finite, which JSON cannot say, are null."""
    content = {**asdict(probe), "faults": probe.faults}
    for task in content["tasks"]:
        task |= {key: task[key] if math.isfinite(task[key]) else None for key in ("first", "last")}
    return content


def _source_text(source: Source) -> str:
    head = f"{source.spec.name} ({source.splits})"
    left = f"{source.dataset.report.kept} images" if source.dataset else "not looked at any further"
    if not source.faults:
        return f"{head}: {left}" + (", no fault" if source.dataset else "")
    lines = [f"{head}: {_count(len(source.faults), 'fault')}; {left}" + (" left after repairs" * bool(source.dataset))]
    for kind, faults in _by_kind(source.faults).items():
        stops = "training refuses it" if any(fault.fatal for fault in faults) else "training copes with it"
        lines.append(f"  {kind} ({len(faults)}; {stops}; repair: {_repairs(faults)})")
        for fault in faults[:SHOWN]:
            lines.append(f"    {_located(fault)}")
        if len(faults) > SHOWN:
            lines.append(f"    ... and {len(faults) - SHOWN} more, all in faults.json")
    return "\n".join(lines)


def _located(fault: Fault) -> str:
    """The message, which names the file unless it speaks of a dataset."""
    return fault.message if fault.file in fault.message else f"{fault.file}: {fault.message}"


def _repairs(faults: list[Fault]) -> str:
    names = dict.fromkeys(fault.repair.name if fault.repair else "none, by hand" for fault in faults)
    return ", or ".join(names)


def _by_kind(faults: list[Fault]) -> dict[str, list[Fault]]:
    found: dict[str, list[Fault]] = {}
    for fault in faults:
        found.setdefault(fault.kind, []).append(fault)
    return found


def _unlabelled(report: CheckReport) -> Iterator[str]:
    """Tasks for which no dataset has a label."""
    for task in dict.fromkeys(row.task for row in report.coverage):
        if not any(row.images_labelled for row in report.coverage if row.task == task):
            yield f"NOTE: no image is labelled for the task {task}: it would learn nothing"


def _probe_text(probe: DryRun) -> str:
    lines = [f"dry run on {probe.device}: {_count(probe.steps, 'step')} on one batch of {probe.images} images"]
    for task in probe.tasks:
        arrives = "gradients arrive" if task.learns else "frozen with the trunk"
        fell = f"loss {task.first:.4g} -> {task.last:.4g}, {arrives}" if task.labelled else "not labelled here"
        lines.append(f"  {task.task}: " + (f"FAULT: {task.fault}" if task.fault else fell))
    if probe.steps:
        memory = f", at most {probe.memory_bytes / 2**30:.2f} GiB of memory" if probe.memory_bytes else ""
        lines.append(f"  {probe.step_seconds:.2f} s per step{memory}")
        lines.append(f"  the whole schedule would take {clock_text(probe.schedule_seconds)} in one process like this")
    return "\n".join(lines)


def _verdict(report: CheckReport) -> str:
    number = sum(len(source.faults) for source in report.sources) + len(report.general)
    wrong = len(report.probe.faults) if report.probe else 0
    if report.clean:
        return "no fault found"
    tried = f", {_count(wrong, 'fault')} in the dry run" if wrong else ""
    return f"{_count(number, 'fault')} in the data{tried}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
