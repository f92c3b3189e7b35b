"""Turns the errors of Hydra, OmegaConf and YAML into one line that names the key and what was probably meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from mtl_rcnn.config.checks import absent_task
from mtl_rcnn.config.keys import flatten, nearest, unknown_key
from mtl_rcnn.config.origins import override_key
from mtl_rcnn.errors import ConfigError

if TYPE_CHECKING:
    from mtl_rcnn.config.compose import Composition

_NO_KEY = ("ConfigAttributeError", "ConfigKeyError")


def explain(error: Exception, composition: Composition) -> ConfigError:
    """One line for an error of composition.

    Args:
        error: what was raised.
        composition: what was being composed; composed again, without the faulty overrides, to find the keys that exist.
    """
    return ConfigError(_explain(error, composition))


def _explain(error: Exception, composition: Composition) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, UserWarning):
        return f"hydra.searchpath: no folder or package {str(error).split('path=')[-1].split()[0]}"
    if isinstance(error, MissingConfigException):
        return _missing_file(error, composition)
    if isinstance(error, OverrideParseException):
        reason = _first_line(error.message, skip="Error parsing")
        return f"cannot read the argument '{error.override}' as key=value ({reason})"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML ({error.problem})"
    text = str(error)
    if text.startswith("Ambiguous value for argument"):
        return _ambiguous(text.split("'")[1])
    override = _guilty_override(error, composition)
    return _unknown_key(override, error, composition) if override else _joined(error)


def _missing_file(error: MissingConfigException, composition: Composition) -> str:
    group, _, name = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
    options = [option for option in composition.options(group) if option != name]
    text = str(error)
    parent = text.split("'")[1] if text.startswith("In '") else None
    # The root and Hydra's own root only pass on what the command line chose.
    where = f"{parent}.yaml: " if parent and "/" in parent and not parent.startswith("hydra/") else ""
    close = nearest(name, options)
    hint = f" did you mean '{close}'?" if close else ""
    return f"{where}no {group or 'configuration'} '{name}';{hint} available: {', '.join(options) or 'none'}"


def _ambiguous(override: str) -> str:
    key, _, values = override.partition("=")
    return f"{override}: write a list as {key}=[{values}], or add -m to run once with each value"


def _guilty_override(error: Exception, composition: Composition) -> str | None:
    """The override that Hydra could not apply."""
    for override in composition.overrides:
        key = override_key(override)
        if f"'{key}'" in str(error) or str(error).endswith(f"override {override}"):
            return override
    return None


def _unknown_key(override: str, error: Exception, composition: Composition) -> str:
    cause = error.__cause__
    wanted = override_key(override)
    known = _known_keys(composition)
    if isinstance(cause, OmegaConfBaseException) and type(cause).__name__ not in _NO_KEY:
        return f"{override}: {_first_line(str(cause))}"
    failed = getattr(cause, "full_key", None) or wanted
    parts = wanted.split(".")
    selected = [key.split(".")[1] for key in known if key.startswith("tasks.") and key.count(".") == 1]
    if parts[0] == "tasks" and len(parts) > 1 and parts[1] not in selected:
        return f"{override}: {absent_task(parts[1], selected, composition.options('tasks'))}, or drop this override"
    if override.startswith("+") and wanted in known:
        return f"{override}: the key exists; write it without +"
    if wanted in known and failed in known:
        return f"{override}: {_first_line(str(error))}"
    missing = failed if failed.startswith(f"{wanted}.") else wanted
    parent = missing.rpartition(".")[0]
    if parent in known and not any(key.startswith(f"{parent}.") for key in known):
        value = f"={override.partition('=')[2]}" if missing == wanted else "=..."
        return f"{parent} has no entry '{missing.rpartition('.')[2]}' yet; add it with +{missing}{value}"
    return unknown_key(missing, [*known, *composition.options(None)])


def _known_keys(composition: Composition) -> list[str]:
    """Keys of the configuration with the command line's choices of files, but none of its values."""
    groups = [o for o in composition.overrides if composition.options(override_key(o).split("@")[0])]
    searchpath = [o for o in composition.overrides if override_key(o) == "hydra.searchpath"]
    from mtl_rcnn.config.compose import COMPOSITION_ERRORS, job_part

    for overrides in ([*searchpath, *groups], searchpath):  # the choices themselves may be what is wrong
        try:
            cfg = job_part(composition.with_overrides(overrides).compose())
        except COMPOSITION_ERRORS:
            continue
        return list(flatten(OmegaConf.to_container(cfg, resolve=False)))
    return []


def _joined(error: Exception) -> str:
    texts = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    return "; ".join(" ".join(text.split()) for text in texts if text.strip()) or type(error).__name__


def _first_line(text: str, skip: str = "See http") -> str:
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line and not line.startswith((skip, "See http"))), text)
