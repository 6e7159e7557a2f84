"""Our policies against LeRobot's stored numbers and against the float64 reference, case by case."""

from __future__ import annotations

import numpy as np
from parity_cases import CASES
from parity_support import (
    GOLDENS,
    REFERENCE_L2,
    check_actions,
    check_golden_stages,
    config_of,
    golden_of,
    goldens,
    relative_l2,
)

from flashrt_runtime.parity.drift import Gates, compare
from flashrt_runtime.parity.reference import ReferencePolicy
from flashrt_runtime.parity.stages import Inputs


def test_actions_equal_lerobots(run):
    check_actions(run.case, run.actions, golden_of(run.case)["actions"])


def test_stages_equal_lerobots(run):
    check_golden_stages(run.case, run.stages, golden_of(run.case))


def test_recording_changes_nothing(run):
    np.testing.assert_array_equal(run.stages.actions, run.actions)


def test_every_stage_equals_the_reference(run):
    reference = ReferencePolicy(config_of(run.case), run.case.weights()).run(Inputs(**run.case.inputs()))
    gates = Gates(actions_relative_l2=REFERENCE_L2, relative_l2=1e-5)
    assert gates.failures(compare(run.stages, reference)) == []
    assert relative_l2(run.actions, reference.actions) <= REFERENCE_L2


def test_the_cases_cover_what_is_promised():
    assert len(CASES) >= 40
    for policy in ("pi05", "pi0"):
        mine = [case for case in CASES if case.policy == policy]
        assert {case.views for case in mine} == {1, 2, 3}
        assert {case.steps for case in mine} == {1, 4, 10}
        assert {10, 50} <= {case.horizon for case in mine}
        assert len({case.text for case in mine}) >= 6
        assert sum(bool(case.masked) for case in mine) >= 5
        assert {name.split("/")[0] for name in goldens(policy)} == {case.name for case in mine}


def test_goldens_are_small_and_not_trivial():
    assert sum(file.stat().st_size for file in GOLDENS.glob("*.npz")) < 3e6
    for case in CASES:
        actions = golden_of(case)["actions"]
        assert 0.5 < np.abs(actions).mean() < 5
        assert actions.std(axis=0).min() > 0.1  # every dimension moves over the chunk
