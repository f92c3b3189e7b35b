"""What must hold of the shares that training sets have in a batch."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.keys import nearest
from mtl_rcnn.errors import ConfigError

_METHODS = ("proportional", "sqrt", "temperature", "uniform", "ratios")
_WITHOUT_SIZE = ("uniform", "ratios")
"""Methods by which a share does not depend on how many images there are."""


def check_mixing(cfg: DictConfig) -> None:
    """Refuses settings of `data.mixing` that do not fit each other or the training sets; configurations without it
    pass.

    Raises:
        ConfigError: names the key.
    """
    node = OmegaConf.select(cfg, "data.mixing")
    if not isinstance(node, DictConfig):
        return
    mixing: dict[str, Any] = OmegaConf.to_container(node, resolve=True)
    method = mixing.get("method")
    if method is not None and method not in _METHODS:
        raise ConfigError(f"data.mixing.method={method}: expected null, {', '.join(_METHODS[:-1])} or {_METHODS[-1]}")
    _check_temperature(method, mixing.get("temperature"))
    ratios = mixing.get("ratios") or {}
    if ratios and method != "ratios":
        raise ConfigError(
            f"data.mixing.ratios={ratios}: they count with data.mixing.method=ratios alone, and the method is "
            f"{_shown(method)}; choose that method, or drop the ratios"
        )
    datasets = OmegaConf.to_container(cfg.data.get("train", OmegaConf.create([])), resolve=True)
    if method == "ratios":
        _check_ratios(ratios, [entry.get("name") for entry in datasets])
    if method in _WITHOUT_SIZE:
        _check_repeats(method, datasets)


def _check_temperature(method: str | None, temperature: Any) -> None:
    if method == "temperature":
        if not _is_number(temperature) or temperature <= 0:
            raise ConfigError(f"data.mixing.temperature={_shown(temperature)}: expected a number above 0, such as 2")
    elif temperature is not None:
        raise ConfigError(
            f"data.mixing.temperature={temperature}: it counts with data.mixing.method=temperature alone, and the "
            f"method is {_shown(method)}; choose that method, or drop the temperature"
        )


def _check_ratios(ratios: dict[str, Any], names: list[str]) -> None:
    for name, value in ratios.items():
        if name not in names:
            close = nearest(str(name), names)
            hint = f"did you mean '{close}'?" if close else f"training sets are {', '.join(map(str, names)) or 'none'}"
            raise ConfigError(f"data.mixing.ratios.{name}={value}: there is no training set '{name}'; {hint}")
        if not _is_number(value) or value < 0:
            raise ConfigError(f"data.mixing.ratios.{name}={_shown(value)}: expected a number of at least 0")
    missing = [name for name in names if name not in ratios]
    if missing:
        raise ConfigError(
            f"data.mixing.ratios={ratios}: no number for the training set '{missing[0]}'; every training set needs one "
            f"(data.mixing.ratios.{missing[0]}=1; 0 leaves it out)"
        )
    if ratios and sum(ratios.values()) == 0:
        raise ConfigError(f"data.mixing.ratios={ratios}: all are 0; at least one training set needs a share")


def _check_repeats(method: str, datasets: list[dict[str, Any]]) -> None:
    for index, entry in enumerate(datasets):
        if entry.get("repeat", 1) != 1:
            raise ConfigError(
                f"data.train[{index}].repeat={entry['repeat']}: with data.mixing.method={method} the share of a "
                "training set does not depend on how many images it has; remove it, or use data.mixing.ratios"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
