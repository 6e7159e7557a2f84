"""LeRobot policy directories: config.json, and the processor pipelines that the policy was trained behind.

The pipelines decide: what their normaliser steps say wins over config.json's defaults, because that is what
LeRobot runs. A step that is not known here is refused, since it would change what the model sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import PROMPT_CAPACITY, DecodeConfig, FamilyRules, NormalizationMode, PolicyName
from ..errors import CheckpointError, NotSupportedYetError, OptionError
from .base import FeatureStats, NormStats
from .facts import Facts, Hints
from .json_fields import JsonObject
from .pipelines import Pipeline, read_pipeline
from .rules import lerobot_rules
from .tokenizer import tokenizer_in

IMAGE_PREFIX = "observation.images."
STATE_KEY = "observation.state"
ACTION_KEY = "action"
EMPTY_CAMERA = "empty_camera_"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"

MODES: dict[str, NormalizationMode] = {
    "QUANTILES": "quantile",
    "QUANTILE10": "quantile10",
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "IDENTITY": "identity",
}

PREPROCESSOR_STEPS = frozenset(
    {
        "rename_observations_processor",
        "to_batch_processor",
        "relative_actions_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "pi0_new_line_processor",
        "smolvla_new_line_processor",
        "pi0_fast_prepare_state_tokenizer_processor_step",
        "action_tokenizer_processor",  # of actions: there are none before the policy has run
        "tokenizer_processor",
        "device_processor",
    }
)
POSTPROCESSOR_STEPS = frozenset({"unnormalizer_processor", "absolute_actions_processor", "device_processor"})


@dataclass(frozen=True)
class Normalization:
    """One normaliser step: its mode and statistics for one feature, and its epsilon."""

    mode: NormalizationMode
    stats: FeatureStats
    eps: float


def read_lerobot(path: Path, policy: PolicyName, hints: Hints) -> Facts:
    """Facts of a LeRobot policy directory. Raises CheckpointError naming file and entry, or OptionError."""
    if hints.asset_id is not None:
        raise OptionError(
            f"asset_id is {hints.asset_id!r}, but {path} is a LeRobot policy, which has one set of "
            "statistics: leave it out"
        )
    config = JsonObject.read(path / "config.json")
    _check_type(config, policy)
    before = read_pipeline(path / PREPROCESSOR, PREPROCESSOR_STEPS)
    after = read_pipeline(path / POSTPROCESSOR, POSTPROCESSOR_STEPS)
    if (before is None) != (after is None):
        present, missing = (POSTPROCESSOR, PREPROCESSOR) if before is None else (PREPROCESSOR, POSTPROCESSOR)
        raise CheckpointError(f"{path}: {present} is there, {missing} is missing; fetch the whole policy")
    features = config.section("input_features") | config.section("output_features")
    views, empty = _views(features, config)
    state_dim, action_dim = (_width(features, name, config) for name in (STATE_KEY, ACTION_KEY))
    action_names = _action_names(config, before)
    rules, stats = _normalization(path, config, policy, before, after)
    capacity = config.integer("tokenizer_max_length") or PROMPT_CAPACITY[policy]
    if before is not None and (tokenizer := before.step("tokenizer_processor")) is not None:
        capacity = tokenizer.integer("max_length") or capacity
    skip, temperature = config.integer("fast_skip_tokens"), config.number("temperature")
    return Facts(
        where=path / "config.json",
        rules=rules,
        horizon=hints.action_horizon or config.required_integer("chunk_size"),
        prompt_capacity=capacity + rules.end_with_bos,
        num_steps=config.integer("num_inference_steps") or 10,
        dims=config.section("flashrt_dims"),
        declared=_declared(config, policy),
        norm_stats=stats,
        norm_stats_file=path / PREPROCESSOR if before is not None else None,
        views=views,
        empty_cameras=empty,
        action_names=action_names if action_names and len(action_names) == action_dim else None,
        state_dim=state_dim,
        action_dim=action_dim,
        delta_actions=_delta_mask(config, before, after, action_dim, action_names),
        rtc_training_max_delay=config.integer("rtc_training_max_delay"),
        tokenizer=tokenizer_in(path),
        decode=DecodeConfig(skip_ids=128 if skip is None else skip, temperature=temperature or 0.0),
    )


def _check_type(config: JsonObject, policy: PolicyName) -> None:
    declared = config.text("type")
    known = {"pi0_fast" if name == "pi0fast" else name: name for name in PROMPT_CAPACITY}
    if declared not in known:
        raise CheckpointError(
            f"{config.file}: a policy of type {declared!r}; expected one of {', '.join(known)}"
        )
    if known[declared] != policy:
        raise CheckpointError(f"{config.file}: type is {declared!r}, but the tensors are those of {policy}")


def _declared(config: JsonObject, policy: PolicyName) -> dict[str, int | None]:
    """Sizes of the model that LeRobot's configuration repeats; pi0.5 has no tensor of the state's width,
    pi0-FAST none of the action's either.
    """
    resolution = config.values.get("image_resolution")
    if resolution is not None and not (isinstance(resolution, list) and len(set(resolution)) == 1):
        raise CheckpointError(f"{config.file}: image_resolution is {resolution!r}, expected a square")
    sizes = {
        "image_resolution": resolution[0] if resolution else None,
        "max_action_dim": None if policy == "pi0fast" else config.integer("max_action_dim"),
    }
    return sizes | ({"max_state_dim": config.integer("max_state_dim")} if policy == "pi0" else {})


def _views(features: Mapping[str, Any], config: JsonObject) -> tuple[tuple[str, ...] | None, int]:
    """Camera names in the order the policy takes them, and how many more it pads with masked images."""
    names = []
    for name, feature in features.items():
        if isinstance(feature, dict) and feature.get("type") == "VISUAL":
            names.append(name.removeprefix(IMAGE_PREFIX).removeprefix("observation."))
    real = tuple(name for name in names if not name.startswith(EMPTY_CAMERA))
    declared = config.integer("empty_cameras") or 0
    return real or None, max(declared, len(names) - len(real))


def _width(features: Mapping[str, Any], name: str, config: JsonObject) -> int | None:
    feature = features.get(name)
    if feature is None:
        return None
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int) and shape[0] > 0):
        raise CheckpointError(
            f"{config.file}: feature {name!r} has shape {shape!r}, expected one positive number"
        )
    return shape[0]


def _normalization(
    path: Path, config: JsonObject, policy: PolicyName, before: Pipeline | None, after: Pipeline | None
) -> tuple[FamilyRules, NormStats | None]:
    """The family rules with the modes in force, and the statistics; None when there are no pipelines."""
    defaults = config.section("normalization_mapping")
    rules = lerobot_rules(policy)
    if before is None or after is None:
        modes = {kind: _mode(defaults, kind, config.file) for kind in ("STATE", "ACTION", "VISUAL")}
        _check_images(modes["VISUAL"], config.file)
        return replace(
            rules,
            state_mode=modes["STATE"] or rules.state_mode,
            action_mode=modes["ACTION"] or rules.action_mode,
        ), None
    state = _step_normalization(before, "normalizer_processor", "STATE", STATE_KEY)
    actions = _step_normalization(after, "unnormalizer_processor", "ACTION", ACTION_KEY)
    if state.eps != actions.eps:
        raise CheckpointError(f"{path}: the normaliser uses eps {state.eps}, the unnormaliser {actions.eps}")
    rules = replace(lerobot_rules(policy, state.eps), state_mode=state.mode, action_mode=actions.mode)
    return rules, NormStats(state=state.stats, actions=actions.stats)


def _step_normalization(pipeline: Pipeline, name: str, kind: str, key: str) -> Normalization:
    """How a pipeline normalises one feature; a pipeline without the step leaves it as it is."""
    step = pipeline.step(name)
    if step is None:
        return Normalization("identity", FeatureStats(), 1e-8)
    mapping = step.section("norm_map")
    _check_images(_mode(mapping, "VISUAL", step.file), step.file)
    mode = _mode(mapping, kind, step.file) or "identity"
    only = step.values.get("normalize_observation_keys")
    if isinstance(only, list) and kind != "ACTION" and key not in only:
        mode = "identity"
    eps = step.number("eps")
    return Normalization(mode, pipeline.stats(name, key), 1e-8 if eps is None else eps)


def _mode(mapping: Mapping[str, Any], kind: str, file: Path) -> NormalizationMode | None:
    name = mapping.get(kind)
    if name is None:
        return None
    if name not in MODES:
        raise CheckpointError(f"{file}: normalisation {name!r} of {kind}: expected one of {', '.join(MODES)}")
    return MODES[name]


def _check_images(mode: NormalizationMode | None, file: Path) -> None:
    if mode not in (None, "identity"):
        raise NotSupportedYetError(
            f"{file}: images normalised by {mode} are not supported; expected IDENTITY"
        )


def _action_names(config: JsonObject, before: Pipeline | None) -> tuple[str, ...] | None:
    names = config.values.get("action_feature_names")
    step = before.step("relative_actions_processor") if before is not None else None
    if step is not None and step.values.get("action_names") is not None:
        names = step.values["action_names"]
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{config.file}: action names are {names!r}, expected a list of names")
    return tuple(names)


def _delta_mask(
    config: JsonObject,
    before: Pipeline | None,
    after: Pipeline | None,
    action_dim: int | None,
    names: tuple[str, ...] | None,
) -> tuple[bool, ...] | None:
    """Which actions are differences to the state: all but those whose name contains an excluded joint's.

    Without names LeRobot cannot match the exclusions and takes every dimension; so does this.
    """
    enabled = config.flag("use_relative_actions") or False
    excluded = config.values.get("relative_exclude_joints") or []
    if before is not None and after is not None:
        relative, absolute = (
            before.step("relative_actions_processor"),
            after.step("absolute_actions_processor"),
        )
        enabled = bool(relative and relative.flag("enabled"))
        if enabled != bool(absolute and absolute.flag("enabled")):
            raise CheckpointError(
                f"{before.file}: relative actions are {'on' if enabled else 'off'}, but {after.file.name} "
                "has "
                f"absolute actions {'off' if enabled else 'on'}"
            )
        excluded = relative.values.get("exclude_joints") or [] if relative else []
    if not enabled or action_dim is None:
        return None
    tokens = [str(joint).lower() for joint in excluded if joint]
    if not tokens or names is None:
        return (True,) * action_dim
    mask = [not any(token in name.lower() for token in tokens) for name in names[:action_dim]]
    return tuple(mask + [True] * (action_dim - len(mask)))
