"""The parity gates catch every planted fault: what `test_goldens.py` and `test_physical.py` are worth."""

from __future__ import annotations

import pytest
from faults import MODEL, PHYSICAL
from parity_cases import CASES
from parity_support import check_actions, check_golden_stages, golden_of, loaded, model_of
from physical_support import check_physical, observation, predict, write_robot_checkpoint

from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.stages import Inputs

# Three golden cases of each policy: ten steps, padding, absent views.
NAMES = ("tiny-v2-m1-t13+1-h10-n10-s1", "tiny-v3-m01-t20+12g-h10-n10-s4", "tiny-v1-t40+8-h10-n10-s1")
EYES = {
    policy: [case for case in CASES if case.name in {f"{policy}-{name}" for name in NAMES}]
    for policy in ("pi05", "pi0")
}


def model_gates(name, folder):
    """The gates of test_goldens.py on a few cases. Raises AssertionError."""
    for case in EYES[name]:
        inputs, stored = case.inputs(), golden_of(case)
        with loaded(case, folder) as policy:
            check_actions(case, policy.sample_actions(**inputs), stored["actions"])
            check_golden_stages(case, capture(model_of(policy), Inputs(**inputs)), stored)


def physical_gates(policy, folder):
    """The gate of test_physical.py. Raises AssertionError."""
    write_robot_checkpoint(policy, folder)
    check_physical(policy, predict(policy, folder, observation()))


def planted(faults):
    """Parameters: every fault with every policy it concerns."""
    return [
        pytest.param(entry, policy, id=f"{policy}: {entry.name}")
        for entry in faults
        for policy in entry.policies
    ]


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_the_gates_hold_without_a_fault(policy, tmp_path):
    assert len(EYES[policy]) == len(NAMES)
    model_gates(policy, tmp_path)
    physical_gates(policy, tmp_path)


@pytest.mark.parametrize(("fault", "policy"), planted(MODEL))
def test_a_fault_in_the_model_is_caught(fault, policy, tmp_path, monkeypatch):
    fault.plant(monkeypatch)
    with pytest.raises(AssertionError):
        model_gates(policy, tmp_path)


@pytest.mark.parametrize(("fault", "policy"), planted(PHYSICAL))
def test_a_fault_in_the_processing_is_caught(fault, policy, tmp_path, monkeypatch):
    fault.plant(monkeypatch)
    with pytest.raises(AssertionError):
        physical_gates(policy, tmp_path)


def test_the_list_is_long_enough():
    assert len({entry.name for entry in (*MODEL, *PHYSICAL)}) >= 14
