"""Dotted keys of nested mappings, and which of them was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All dotted keys, inner nodes too, each before what it holds."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")


def nearest(word: str, candidates: Sequence[str]) -> str | None:
    """The candidate most like `word`, if any is alike."""
    return next(iter(difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)), None)


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The message about a key that is none of the known ones: what was meant, or what there is."""
    meant = _meant(key, known)
    if meant is not None:
        return f"no key '{key}'; did you mean '{meant}'?"
    parent = _parent(key, known)
    children = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    holder = f"'{parent}' has" if parent else "there are"
    return f"no key '{key}'; {holder} {', '.join(children) or 'no keys'}"


def _meant(key: str, known: Sequence[str]) -> str | None:
    """A sibling written alike, else a key elsewhere with the same last part."""
    parent = _parent(key, known)
    depth = len(parent.split(".")) if parent else 0
    parts = key.split(".")
    wrong, rest = parts[depth], parts[depth + 1 :]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if not siblings:  # the parent holds a value, no keys
        return parent
    sibling = nearest(wrong, siblings)
    if sibling is not None:
        start = f"{parent}.{sibling}" if parent else sibling
        whole = ".".join([start, *rest])
        return whole if whole in known else _meant(whole, known) or start
    same = [k for k in known if k.rpartition(".")[2] == parts[-1]]
    return min(same, key=len) if same else None


def _parent(key: str, known: Sequence[str]) -> str:
    """The longest known start of a key; "" if not even its first part is known."""
    parts = key.split(".")
    starts = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((start for start in starts if start in known), "")
