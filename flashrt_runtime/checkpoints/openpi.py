"""openpi's directories: what config.json and assets/ say, for PyTorch and Orbax weights alike.

config.json as openpi's converter writes it holds action_dim, action_horizon, variants and precision. Facts it
has no place for (views, names, rate, delta actions) are read from an optional `flashrt` object in the same
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import PROMPT_CAPACITY, PolicyName
from ..errors import CheckpointError
from .base import Layout, NormStats
from .reader import Facts, Hints
from .rules import openpi_rules
from .stats import read_json_object, read_norm_stats
from .tokenizer import tokenizer_in

# The asset folder of openpi's published pi05_libero, which was trained with discrete_state_input=False.
LIBERO_ASSET = "physical-intelligence/libero"
NORM_STATS_FILE = "norm_stats.json"


def read_openpi(path: Path, layout: Layout, policy: PolicyName, hints: Hints) -> Facts:
    """Facts of an openpi checkpoint directory.

    The state goes into pi0.5's prompt unless config.json says `discrete_state_input: false`, or the
    statistics are those of openpi's published LIBERO checkpoint, which records it nowhere.
    """
    file = path / "config.json"
    config = read_json_object(file) if file.is_file() else {}
    extra = _section(config, "flashrt", file)
    asset, stats_file = find_norm_stats(path, hints.asset_id)
    notes: list[str] = []
    in_prompt = _optional(config, "discrete_state_input", bool, file)
    if in_prompt is None and policy == "pi05" and asset == LIBERO_ASSET:
        in_prompt = False
        notes.append(
            f"statistics of {LIBERO_ASSET}: the state stays out of the prompt, as in openpi's pi05_libero "
            "(rules={'state_in_prompt': True} puts it in)"
        )
    return Facts(
        where=file if config else path,
        rules=openpi_rules(policy, in_prompt),
        horizon=_horizon(config, file, layout, hints),
        prompt_capacity=_optional(config, "max_token_len", int, file) or PROMPT_CAPACITY[policy],
        num_steps=_optional(extra, "num_steps", int, file) or 10,
        dims=_section(config, "flashrt_dims", file),
        norm_stats=_stats(stats_file),
        norm_stats_file=stats_file,
        views=_names(extra, "views", file),
        state_names=_names(extra, "state_names", file),
        action_names=_names(extra, "action_names", file),
        action_rate_hz=_optional(extra, "action_rate_hz", float, file),
        delta_actions=_flags(extra, "delta_actions", file),
        tokenizer=tokenizer_in(path),
        notes=tuple(notes),
    )


def find_norm_stats(path: Path, asset_id: str | None) -> tuple[str | None, Path | None]:
    """The statistics file under assets/ and its asset id; (None, None) where there is none.

    Raises CheckpointError when there are several and none was chosen, or when the chosen one is not there.
    """
    assets = path / "assets"
    if not assets.is_dir() and (path.parent / "assets").is_dir() and path.name == "params":
        assets = path.parent / "assets"
    found = {
        file.parent.relative_to(assets).as_posix(): file for file in sorted(assets.rglob(NORM_STATS_FILE))
    }
    if asset_id is not None:
        if asset_id not in found:
            raise CheckpointError(
                f"{assets}: no {asset_id}/{NORM_STATS_FILE}; found {sorted(found) or 'none'}"
            )
        return asset_id, found[asset_id]
    if len(found) > 1:
        raise CheckpointError(
            f"{assets}: statistics of several robots, choose one with asset_id=: {sorted(found)}"
        )
    return next(iter(found.items()), (None, None))


def _stats(file: Path | None) -> NormStats | None:
    return None if file is None else read_norm_stats(file)


def _horizon(config: Mapping[str, Any], file: Path, layout: Layout, hints: Hints) -> int:
    if hints.action_horizon is not None:
        return hints.action_horizon
    horizon: int | None = _optional(config, "action_horizon", int, file)
    if horizon is None:
        raise CheckpointError(
            f"{file}: no action_horizon, and tensors do not tell it. Pass action_horizon= or write "
            f'{{"action_horizon": N}} there (openpi\'s published checkpoints: base 50, LIBERO 10, DROID 15)'
        )
    if horizon < 1:
        raise CheckpointError(f"{file}: action_horizon is {horizon}, expected a positive integer")
    return horizon


def _section(config: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name} is {value!r}, expected an object")
    return value


def _optional(config: Mapping[str, Any], name: str, kind: type, file: Path) -> Any:
    value = config.get(name)
    if value is None:
        return None
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{file}: {name} is {value!r}, expected {kind.__name__}")
    return kind(value)


def _names(extra: Mapping[str, Any], name: str, file: Path) -> tuple[str, ...] | None:
    value = extra.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise CheckpointError(f"{file}: flashrt.{name} is {value!r}, expected a list of names")
    if len(set(value)) != len(value):
        raise CheckpointError(f"{file}: flashrt.{name} names something twice: {value}")
    return tuple(value)


def _flags(extra: Mapping[str, Any], name: str, file: Path) -> tuple[bool, ...] | None:
    value = extra.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, bool) for item in value):
        raise CheckpointError(f"{file}: flashrt.{name} is {value!r}, expected a list of booleans")
    return tuple(value)
