"""Every rule of a checkpoint's family changes what a policy does: none is listed and read by nobody."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import flashrt_runtime
from flashrt_runtime.config import FamilyRules
from flashrt_runtime.errors import ActionTokenError
from flashrt_runtime.untrained.random import make_checkpoint

STATE = np.array([-0.03, 0.04, 0.77, 2.96, -0.21, -0.12, 0.03, -0.03], np.float32)  # not quite the mean
PROMPT = "Pick_up the red BLOCK"
TOLD = {"state_in_prompt": True}
MEANS = TOLD | {"state_mode": "mean_std", "action_mode": "mean_std"}

# rule -> policy, other rules that it takes to be seen, another value of it
FLIPS: dict[str, tuple[str, dict[str, object], object]] = {
    "family": ("pi05", {}, "lerobot"),
    "state_mode": ("pi05", TOLD, "mean_std"),
    "action_mode": ("pi05", {}, "min_max"),
    "quantile_eps": ("pi05", {}, 0.5),
    "std_eps": ("pi05", MEANS, 0.5),
    "std_eps_inverse": ("pi05", MEANS, 0.5),
    "zero_range_eps": ("pi05", {"quantile_eps": 0.0, "zero_range_eps": 1.0}, 2.0),
    "resize": ("pi05", {}, "bilinear_float"),
    "clean_underscores": ("pi05", {}, False),
    "state_in_prompt": ("pi05", TOLD, False),
    "rope_bf16": ("pi05", {}, True),
    "accumulate_time": ("pi05", {}, False),
    "show_absent_views": ("pi0fast", {}, False),
    "lowercase": ("pi0fast", {}, False),
    "end_with_bos": ("pi0fast", {}, True),
    "skip_position": ("pi0fast", {}, False),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of either policy; the first dimension of state and actions has no range."""
    made = {}
    for policy in ("pi05", "pi0fast"):
        path = make_checkpoint(tmp_path_factory.mktemp("rules") / policy, policy=policy, preset="libero")
        (file,) = path.rglob("norm_stats.json")
        content = json.loads(file.read_text())
        for feature in content["norm_stats"].values():
            feature["q99"][0] = feature["q01"][0]
            feature["min"], feature["max"] = [-2.0] * len(feature["q01"]), [2.0] * len(feature["q01"])
        file.write_text(json.dumps(content))
        made[policy] = path
    return made


def behaviour(checkpoint: Path, policy: str, rules: dict[str, object]) -> list[bytes]:
    """The prompt's tokens, and the actions of a few observations, the second view of which is absent."""
    loaded = flashrt_runtime.load_model(checkpoint, config=policy, hardware="cpu", rules=rules)
    first, second = loaded.spec.views
    seen = []
    for seed in range(6 if policy == "pi0fast" else 1):  # greedy tokens of random weights seldom differ
        rng = np.random.default_rng(seed)
        images = {first: rng.integers(0, 256, (120, 300, 3), dtype=np.uint8), second: None}
        seen.append(loaded._encode(images, PROMPT, STATE).tokens.tobytes())
        try:
            seen.append(loaded.predict(images, PROMPT, STATE, seed=seed).tobytes())
        except ActionTokenError as error:  # a chunk of other tokens need not be one
            seen.append(repr(error.tokens).encode())
    loaded.close()
    return seen


def test_every_rule_is_here() -> None:
    assert set(FLIPS) == {field.name for field in dataclasses.fields(FamilyRules)}


@pytest.mark.parametrize("name", FLIPS)
def test_a_rule_changes_what_the_policy_does(name: str, checkpoints: dict[str, Path]) -> None:
    policy, others, value = FLIPS[name]
    before, again, after = (
        behaviour(checkpoints[policy], policy, rules) for rules in (others, others, others | {name: value})
    )
    assert before == again
    assert before != after
