"""What a drift report measures and when it fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashrt_runtime.parity.drift import Gates, compare, default_gates, measure
from flashrt_runtime.parity.stages import Stages


def stages(views: int = 2, steps: int = 2) -> Stages:
    """Random stages of a model with 4 tokens a view and 3 text positions, the last one padding."""
    generator = np.random.default_rng(0)
    draw = generator.standard_normal
    positions = views * 4 + 3
    valid = np.ones(positions, dtype=bool)
    valid[-1] = False
    return Stages(
        vision=draw((views, 4, 5)),
        valid=valid,
        prefix_embeddings=draw((positions, 6)),
        keys=draw((2, positions, 1, 4)),
        values=draw((2, positions, 1, 4)),
        velocities=draw((steps, 7, 3)),
        actions=draw((7, 3)),
    )


def test_measures_by_hand():
    theirs = np.array([[3.0, 4.0], [0.0, -0.04]])
    ours = np.array([[3.0, 4.5], [0.0, 0.04]])
    drift = measure("x", "actions", ours, theirs)
    assert drift.max_abs == 0.5
    assert drift.worst_dimension == 1
    assert drift.relative_l2 == pytest.approx(np.sqrt(0.25 + 0.08**2) / np.sqrt(25 + 0.04**2))
    assert drift.sign_flips == 0  # -0.04 is below the floor
    assert measure("x", "actions", -theirs, theirs).sign_flips == 2


def test_every_stage_is_named_once_and_in_order():
    drifts = compare(stages(), stages())
    assert [drift.stage for drift in drifts] == [
        "vision",
        "prefix embeddings",
        *(f"{name}, layer {layer}" for layer in (0, 1) for name in "KV"),
        "v at t = 1",
        "v at t = 0.5",
        "actions",
    ]
    assert all(drift.max_abs == 0 and drift.cosine == pytest.approx(1) for drift in drifts)


@pytest.mark.parametrize("name", ["vision", "prefix_embeddings", "keys", "values", "velocities", "actions"])
def test_the_stage_that_differs_is_the_one_that_fails(name):
    theirs = stages()
    changed = getattr(theirs, name).copy()
    changed[0] += 1e-3
    gates = Gates(actions_max_abs=5e-5, relative_l2=1e-5)
    failures = gates.failures(compare(replace(theirs, **{name: changed}), theirs))
    expected = {
        "vision": "vision",
        "prefix_embeddings": "prefix embeddings",
        "keys": "K, layer 0",
        "values": "V, layer 0",
        "velocities": "v at t = 1",
        "actions": "actions",
    }
    assert {failure.split(":")[0] for failure in failures} == {expected[name]}


def test_positions_that_nothing_attends_to_do_not_count():
    theirs = stages()
    theirs.valid[:4] = False  # the first view is absent
    ours = {name: getattr(theirs, name).copy() for name in ("vision", "prefix_embeddings", "keys", "values")}
    ours["vision"][0] = np.nan
    ours["prefix_embeddings"][~theirs.valid] = np.nan
    ours["keys"][:, ~theirs.valid] = np.nan
    ours["values"][:, ~theirs.valid] = np.nan
    assert Gates(0.0, 0.0, 0, 0.0).failures(compare(replace(theirs, **ours), theirs)) == []


def test_nan_exceeds_every_bound():
    theirs = stages()
    broken = theirs.actions.copy()
    broken[3, 1] = np.nan
    failures = Gates(actions_max_abs=1e9).failures(compare(replace(theirs, actions=broken), theirs))
    assert any(failure.startswith("actions: max-abs nan") for failure in failures)


def test_different_inputs_are_refused():
    theirs = stages()
    other = theirs.valid.copy()
    other[0] = False
    with pytest.raises(ValueError, match="different prefix positions"):
        compare(replace(theirs, valid=other), theirs)
    with pytest.raises(ValueError, match="actions: shapes differ"):
        compare(replace(theirs, actions=theirs.actions[1:]), theirs)


def test_bounds_by_policy_precision_and_yardstick():
    assert default_gates("pi05", "fp32", "lerobot").actions_max_abs == 5e-5
    assert default_gates("pi0", "fp32", "lerobot").actions_max_abs == 5e-4
    assert default_gates("pi0", "fp32", "reference").actions_relative_l2 == 2e-6
    assert default_gates("pi05", "bf16", "reference").actions_relative_l2 == 1e-2
    assert default_gates("pi05", "bf16", "reference").actions_sign_flips == 0
