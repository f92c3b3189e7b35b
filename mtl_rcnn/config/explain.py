"""Turns the errors of Hydra and OmegaConf into one line that names the key and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.compose import COMPOSITION_ERRORS, compose_unchecked, config_root


def explain(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """One line for an error of composition.

    Args:
        error: what Hydra or OmegaConf raised.
        config_name: the root configuration.
        arguments: the command line's overrides.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error, arguments)
    override = _guilty_override(error, arguments)
    if override is not None:
        return _unknown_key(override, config_name, arguments)
    causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    return "; ".join(" ".join(cause.split()) for cause in causes)


def _missing_option(error: MissingConfigException, arguments: Sequence[str]) -> str:
    # Hydra names the file as "group/name", or as "name" alone where the group stands in `options`.
    named = re.search(r"Could not (?:load|find) '([^']+)'", str(error))
    group, _, name = (named[1] if named else error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    if not group:
        group = next((_key(argument) for argument in arguments if name and name in argument), "")
    options = sorted(error.options or (path.stem for path in (config_root() / group).glob("*.yaml")))
    return f"no {group or 'configuration'} '{name}'; {_hint(name, options)}available: {', '.join(options)}"


def _guilty_override(error: Exception, arguments: Sequence[str]) -> str | None:
    """The override that the error speaks of."""
    text = f"{error} {error.__cause__ or ''}"
    for argument in arguments:
        key = _key(argument)
        if key and (f"'{key}'" in text or f"full_key: {key}" in text):
            return argument
    return None


def _unknown_key(override: str, config_name: str, arguments: Sequence[str]) -> str:
    folder = config_root()
    key = _key(override)
    parts = key.split(".")
    known = _known_keys(config_name, arguments)
    if len(parts) > 1 and (folder / parts[0] / f"{parts[1]}.yaml").is_file() and f"{parts[0]}.{parts[1]}" not in known:
        return (
            f"{override}: '{parts[1]}' is not selected in {parts[0]}, so the key has no use; select it "
            f"({parts[0]}=[..., {parts[1]}]) or drop the override"
        )
    groups = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    if key in known:
        return f"{override}: the value does not fit the key '{key}'"
    return f"no key '{key}'; {_hint(key, [*known, *groups], 'see all keys with --cfg job')}".rstrip("; ")


def _known_keys(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Keys of the configuration with the command line's choices of groups, but none of its values."""
    choices = [argument for argument in arguments if _key(argument) and (config_root() / _key(argument)).is_dir()]
    try:
        cfg = compose_unchecked(config_name, choices)
    except COMPOSITION_ERRORS:  # the choices themselves may be what is wrong; the bare root still tells the common keys
        cfg = compose_unchecked(config_name)
    return list(_flatten(cfg))


def _flatten(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in cfg:
        yield f"{prefix}{key}"
        node = cfg._get_node(key)
        if OmegaConf.is_dict(node) and not node._is_none() and not node._is_interpolation() and not node._is_missing():
            yield from _flatten(node, f"{prefix}{key}.")


def _key(argument: str) -> str:
    return argument.split("=", 1)[0].lstrip("+~").split("@", 1)[0]


def _hint(word: str, candidates: Sequence[str], otherwise: str = "") -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    if not close and "." in word:  # right leaf, wrong branch
        leaf = word.rsplit(".", 1)[1]
        close = [candidate for candidate in candidates if candidate.rsplit(".", 1)[-1] == leaf][:1]
    return f"did you mean '{close[0]}'? " if close else otherwise
