"""The steps every layout goes through: detect, read the facts, infer dimensions, check tensors and
statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..config import NO_DECODING, DecodeConfig, FamilyRules, PolicyConfig, PolicyName
from ..errors import CheckpointError, NotSupportedYetError, OptionError
from .architecture import EMBEDDING_KEY, LM_HEAD_KEY, check_shapes, detect_policy, infer_config
from .base import Checkpoint, FeatureStats, Layout, NormStats
from .hub import local_directory
from .layout import detect_layout
from .rules import override_rules
from .safetensors_store import SafetensorsStore, find_non_finite
from .stats import check_mode, padded_width

LOG = logging.getLogger(__name__)

CONFIG_NAMES = ("auto", *get_args(PolicyName))
LATER_CONFIGS = ("groot", "groot_n17", "motus", "wan22_ti2v_5b")


@dataclass(frozen=True)
class Hints:
    """What the caller of `open_checkpoint` insists on; None leaves it to the files."""

    config: str = "auto"
    rules: Mapping[str, object] = field(default_factory=dict)
    action_horizon: int | None = None
    asset_id: str | None = None
    state_dim: int | None = None
    action_dim: int | None = None
    delta_actions: tuple[bool, ...] | None = None
    verify_weights: bool = True
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What a layout's reader found out besides the tensors."""

    where: Path
    rules: FamilyRules
    horizon: int
    prompt_capacity: int
    num_steps: int
    dims: Mapping[str, object] | None = None
    declared: Mapping[str, int | None] = field(default_factory=dict)
    norm_stats: NormStats | None = None
    norm_stats_file: Path | None = None
    views: tuple[str, ...] | None = None
    empty_cameras: int = 0
    state_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    action_rate_hz: float | None = None
    action_representation: str | None = None
    state_dim: int | None = None
    action_dim: int | None = None
    delta_actions: tuple[bool, ...] | None = None
    rtc_training_max_delay: int | None = None
    tokenizer: Path | None = None
    untrained: bool = False
    notes: tuple[str, ...] = ()
    decode: DecodeConfig = NO_DECODING


def read_checkpoint(name: str | Path, framework: str, hints: Hints) -> Checkpoint:
    """Open the checkpoint of that path or hub id; see `base.open_checkpoint`."""
    _check_hints(hints)
    path = local_directory(name)
    layout = detect_layout(path, framework)
    LOG.info("%s: layout %s", path, layout)
    store = _open_store(path, layout, hints)
    stored = canonical_keys(store.entries)
    policy = detect_policy(stored, str(store.files[0]))
    if hints.config not in ("auto", policy):
        raise CheckpointError(
            f"{store.files[0]}: the tensors are those of {policy}, but config={hints.config!r} was asked for"
        )
    facts = _read_facts(path, layout, policy, hints)
    stored_shapes = store.shapes()
    shapes = {key: stored_shapes[name] for key, name in stored.items()}
    config = infer_config(
        shapes,
        policy=policy,
        horizon=facts.horizon,
        prompt_capacity=facts.prompt_capacity,
        num_steps=facts.num_steps,
        where=str(facts.where),
        dims=facts.dims,
        action_dim=_encoded_width(facts, hints),
        decode=replace(facts.decode, tied_head=policy != "pi0fast" or _is_tied(store, stored)),
    )
    check_shapes(shapes, config, str(store.files[0]))
    _check_declared(facts, config)
    checkpoint = _assemble(path, layout, config, store, stored, facts, hints)
    if hints.verify_weights:
        _refuse_non_finite(store, checkpoint)
    for note in facts.notes:
        LOG.warning("%s: %s", path, note)
    return checkpoint


def canonical_keys(stored: Mapping[str, Any]) -> dict[str, str]:
    """Canonical name to stored name: LeRobot's "model." prefix dropped, the token embedding under its own
    name.

    Gemma ties its embedding and output head. openpi stores the pair as `lm_head`; LeRobot stores both, and
    the model reads `embed_tokens`.
    """
    keys: dict[str, str] = {}
    for name in stored:
        key = name.removeprefix("model.")
        if key in keys:
            raise CheckpointError(f"the checkpoint holds {key!r} twice, with and without the prefix 'model.'")
        keys[key] = name
    if EMBEDDING_KEY not in keys and LM_HEAD_KEY in keys:
        keys[EMBEDDING_KEY] = keys.pop(LM_HEAD_KEY)
    return keys


def _encoded_width(facts: Facts, hints: Hints) -> int | None:
    """Width of the actions that a FAST processor encoded: the robot's, never padded."""
    stats = facts.norm_stats.actions if facts.norm_stats else None
    known = (hints.action_dim, facts.action_dim, facts.declared.get("action_dim"), padded_width(stats))
    return next((width for width in known if width), None)


def _is_tied(store: SafetensorsStore, stored: Mapping[str, str]) -> bool:
    """Whether the output head is the token embedding, by name or by value."""
    head, embedding = stored.get(LM_HEAD_KEY), stored.get(EMBEDDING_KEY)
    if head is None or embedding is None:
        return True
    return torch.equal(store.tensor(head), store.tensor(embedding))


def _check_hints(hints: Hints) -> None:
    if hints.config in LATER_CONFIGS:
        raise NotSupportedYetError(
            f"config={hints.config!r} is not supported yet; this version runs {', '.join(CONFIG_NAMES[1:])}"
        )
    if hints.config not in CONFIG_NAMES:
        raise OptionError(f"config is {hints.config!r}: expected one of {', '.join(CONFIG_NAMES)}")
    for name in ("action_horizon", "state_dim", "action_dim"):
        value = getattr(hints, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} is {value!r}: expected a positive integer")


def _open_store(path: Path, layout: Layout, hints: Hints) -> SafetensorsStore:
    from .safetensors_store import open_store

    if layout == "openpi-orbax":
        from .orbax import converted_store

        return converted_store(path, hints.cache_dir)
    return open_store(path)


def _read_facts(path: Path, layout: Layout, policy: PolicyName, hints: Hints) -> Facts:
    if layout == "lerobot":
        from .lerobot import read_lerobot

        return read_lerobot(path, policy, hints)
    from .openpi import read_openpi

    return read_openpi(path, policy, hints)


def _assemble(
    path: Path,
    layout: Layout,
    config: PolicyConfig,
    store: SafetensorsStore,
    stored: Mapping[str, str],
    facts: Facts,
    hints: Hints,
) -> Checkpoint:
    from .architecture import parameter_shapes

    rules = override_rules(facts.rules, hints.rules)
    stats = facts.norm_stats or NormStats()
    where = str(facts.norm_stats_file or path)
    check_mode(stats.state, rules.state_mode, f"{where}: state")
    check_mode(stats.actions, rules.action_mode, f"{where}: actions")
    # pi0fast writes the state into the prompt and pads it nowhere
    widest = max(config.action_dim, 32) if config.policy == "pi0fast" else config.action_dim
    state_dim = _width("state", hints.state_dim, facts.state_dim, stats.state, widest, where)
    action_dim = _width(
        "actions", hints.action_dim, facts.action_dim, stats.actions, config.action_dim, where
    )
    delta = hints.delta_actions if hints.delta_actions is not None else facts.delta_actions
    if delta is not None and action_dim is not None and len(delta) != action_dim:
        raise CheckpointError(
            f"{facts.where}: delta_actions names {len(delta)} dimensions, the robot has {action_dim}"
        )
    trained_delay = facts.rtc_training_max_delay
    if trained_delay is not None and not 1 <= trained_delay < config.horizon:
        raise CheckpointError(
            f"{facts.where}: rtc_training_max_delay is {trained_delay}, expected 1 to {config.horizon - 1} "
            "actions, fewer than a chunk has"
        )
    for kind, names, width in (
        ("state_names", facts.state_names, state_dim),
        ("action_names", facts.action_names, action_dim),
    ):
        if names is not None and width is not None and len(names) != width:
            raise CheckpointError(f"{facts.where}: {kind} has {len(names)} entries, the robot has {width}")
    return Checkpoint(
        path=path,
        layout=layout,
        config=config,
        rules=rules,
        store=store,
        stored_keys={key: stored[key] for key in parameter_shapes(config)},
        norm_stats=facts.norm_stats,
        norm_stats_file=facts.norm_stats_file,
        views=facts.views,
        empty_cameras=facts.empty_cameras,
        state_names=facts.state_names,
        action_names=facts.action_names,
        action_rate_hz=facts.action_rate_hz,
        action_representation=facts.action_representation,
        state_dim=state_dim,
        action_dim=action_dim,
        delta_actions=delta,
        rtc_training_max_delay=facts.rtc_training_max_delay,
        tokenizer=facts.tokenizer,
        untrained=facts.untrained,
        notes=facts.notes,
    )


def _check_declared(facts: Facts, config: PolicyConfig) -> None:
    """What the configuration says of the model's own sizes must be what the tensors have."""
    found = {
        "image_resolution": config.vision.image_size,
        "action_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "max_state_dim": config.action_dim,
    }
    for name, value in facts.declared.items():
        if value is not None and value != found[name]:
            raise CheckpointError(f"{facts.where}: {name} is {value}, but the tensors have {found[name]}")


def _width(
    name: str,
    hinted: int | None,
    declared: int | None,
    stats: FeatureStats | None,
    model_dim: int,
    where: str,
) -> int | None:
    """The robot's width of one feature: the caller's word, else the features', else the statistics'.

    openpi's older statistics are padded with zeros to the model's width; the padding is not the robot's.
    Raises CheckpointError when it exceeds the model's width or the statistics are those of another robot.
    """
    known = stats.width if stats is not None and stats.width else None
    used = padded_width(stats) if known == model_dim else known
    width = hinted if hinted is not None else declared if declared is not None else used
    if width is None:
        return None
    if width > model_dim:
        raise CheckpointError(f"{where}: {name} has {width} dimensions, the model only {model_dim}")
    if known is not None and known < width:
        raise CheckpointError(f"{where}: statistics of {known} {name} dimensions, but the robot has {width}")
    if declared is not None and hinted is None and known is not None and known not in (declared, model_dim):
        raise CheckpointError(
            f"{where}: statistics of {known} {name} dimensions, but config.json declares {declared}"
        )
    return width


def _refuse_non_finite(store: SafetensorsStore, checkpoint: Checkpoint) -> None:
    bad = find_non_finite(store, checkpoint.stored_keys.values())
    if bad is not None:
        raise CheckpointError(
            f"{store.locations[bad]}: {bad!r} holds NaN or infinity; the file or the training run is damaged"
        )
