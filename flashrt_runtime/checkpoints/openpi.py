"""openpi's directories: what config.json and assets/ say, for PyTorch and Orbax weights alike.

config.json as openpi's converter writes it holds action_dim, action_horizon, variants and precision. Facts it
has no place for (asset_id, views, names, rate, delta actions, rtc_training_max_delay) are read from an
optional `flashrt` object in the same file.
"""

from __future__ import annotations

from pathlib import Path

from ..config import PROMPT_CAPACITY, DecodeConfig, PolicyName
from ..errors import CheckpointError
from .facts import Facts, Hints
from .json_fields import JsonObject
from .open_facts import how_to_give
from .rules import openpi_rules
from .stats import read_norm_stats
from .tokenizer import tokenizer_in

# The asset folder of openpi's published pi05_libero, which was trained with discrete_state_input=False.
LIBERO_ASSET = "physical-intelligence/libero"
NORM_STATS_FILE = "norm_stats.json"


def read_openpi(path: Path, policy: PolicyName, hints: Hints) -> Facts:
    """Facts of an openpi checkpoint directory.

    The state goes into pi0.5's prompt unless config.json says `discrete_state_input: false`, or the
    statistics are those of openpi's published LIBERO checkpoint, which records it nowhere.
    """
    file = path / "config.json"
    config = JsonObject.read(file) if file.is_file() else JsonObject(file, {})
    extra = JsonObject(file, config.section("flashrt"), "flashrt.")
    asset, stats_file = find_norm_stats(path, hints.asset_id or extra.text("asset_id"))
    notes: list[str] = []
    in_prompt = config.flag("discrete_state_input")
    skip = extra.integer("fast_skip_tokens")
    if in_prompt is None and policy == "pi05" and asset == LIBERO_ASSET:
        in_prompt = False
        notes.append(
            f"statistics of {LIBERO_ASSET}: the state stays out of the prompt, as in openpi's pi05_libero "
            "(rules={'state_in_prompt': True} puts it in)"
        )
    return Facts(
        where=file if file.is_file() else path,
        rules=openpi_rules(policy, in_prompt),
        horizon=_horizon(config, hints),
        prompt_capacity=config.integer("max_token_len") or PROMPT_CAPACITY[policy],
        num_steps=extra.integer("num_steps") or 10,
        dims=config.section("flashrt_dims"),
        declared={"action_dim": config.integer("action_dim")},
        norm_stats=None if stats_file is None else read_norm_stats(stats_file),
        norm_stats_file=stats_file,
        views=extra.names("views"),
        state_names=extra.names("state_names"),
        action_names=extra.names("action_names"),
        action_rate_hz=extra.number("action_rate_hz"),
        action_representation=extra.text("action_representation"),
        delta_actions=extra.flags("delta_actions"),
        rtc_training_max_delay=extra.integer("rtc_training_max_delay"),
        tokenizer=tokenizer_in(path),
        untrained=extra.flag("untrained") or False,
        notes=tuple(notes),
        decode=DecodeConfig(128 if skip is None else skip, extra.number("temperature") or 0.0),
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
            f"{assets}: statistics of several robots, {sorted(found)}: choose one by "
            f"{how_to_give('asset_id')}"
        )
    return next(iter(found.items()), (None, None))


def _horizon(config: JsonObject, hints: Hints) -> int:
    if hints.action_horizon is not None:
        return hints.action_horizon
    if config.values.get("action_horizon") is None:
        raise CheckpointError(
            f"{config.file}: no action_horizon, and tensors do not tell it. Pass "
            f"{how_to_give('action_horizon')}; or write {{\"action_horizon\": N}} there (openpi's published "
            "checkpoints: base 50, LIBERO 10, DROID 15)"
        )
    return config.required_integer("action_horizon")
