"""`open_checkpoint`, and the steps every layout goes through: detect, read the facts, infer dimensions, check
tensors and statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..config import PolicyConfig, PolicyName
from ..errors import CheckpointError, NotSupportedYetError, OptionError
from .architecture import EMBEDDING_KEY, LM_HEAD_KEY, check_shapes, detect_policy, infer_config
from .base import Checkpoint, FeatureStats, Layout, NormStats
from .facts import Facts, Hints
from .hub import local_directory
from .layout import detect_layout
from .rules import override_rules
from .safetensors_store import SafetensorsStore, find_non_finite
from .stats import check_mode, padded_width

LOG = logging.getLogger(__name__)

CONFIG_NAMES = ("auto", *get_args(PolicyName))
LATER_CONFIGS = ("groot", "groot_n17", "motus", "wan22_ti2v_5b")


def open_checkpoint(
    path: str | Path,
    framework: str = "torch",
    config: str = "auto",
    *,
    rules: Mapping[str, object] | None = None,
    action_horizon: int | None = None,
    asset_id: str | None = None,
    state_dim: int | None = None,
    action_dim: int | None = None,
    delta_actions: Sequence[bool] | None = None,
    verify_weights: bool = True,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint directory: find its layout, read its configuration and statistics, check every
    tensor.

    path: an openpi PyTorch directory (model.safetensors, assets/), a LeRobot policy directory (config.json
    with a `type`), an openpi Orbax directory (params/), or, as a str, a hub id "owner/name" where
    `huggingface_hub` is installed and there is no such directory. ./owner/name is a path and no id.
    framework: "torch" reads safetensors, "jax" reads Orbax.
    config: "pi05", "pi0" or "pi0fast" insists on that policy; "auto" takes what the tensors say.
    rules: overrides of single `FamilyRules` fields, e.g. {"state_in_prompt": False}.
    action_horizon, state_dim, action_dim, delta_actions: facts that openpi's layout does not record; each
    overrides what the files say.
    asset_id: which folder of assets/ holds the statistics, when there are several.
    verify_weights: read every tensor once and refuse non-finite ones (memory bandwidth of the mapped file,
    about 0.05 s/GB from a warm page cache); without it only names, shapes and statistics are checked.
    cache_dir: where converted Orbax weights are kept; default $FLASHRT_CACHE_DIR or ~/.cache/flash_rt.

    Nothing is allocated on any device. Raises CheckpointNotFoundError, CheckpointError, OptionError or
    NotSupportedYetError; messages name the file and the key.
    """
    hints = Hints(
        config="pi0fast" if config == "pi0_fast" else config,
        rules=dict(rules or {}),
        action_horizon=action_horizon,
        asset_id=asset_id,
        state_dim=state_dim,
        action_dim=action_dim,
        delta_actions=None if delta_actions is None else tuple(bool(flag) for flag in delta_actions),
        verify_weights=verify_weights,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    return _read(path, framework, hints)


def _read(name: str | Path, framework: str, hints: Hints) -> Checkpoint:
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
