"""Parameters and what they replace in a robot contract."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from flashrt_ros.core.contract import OnViolation
from flashrt_ros.core.contract_overrides import contract_of, recontracted
from flashrt_ros.core.errors import ContractError
from flashrt_ros.core.parameters import PARAMETERS, ParameterError, PolicyParameters, markdown_table

ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = {spec.name: spec.default for spec in PARAMETERS}


@pytest.fixture
def values(tmp_path: Path) -> PolicyParameters:
    robot = tmp_path / "robot.yaml"
    shutil.copy(ROOT / "config/robots/demo_arm.yaml", robot)
    return PolicyParameters.from_values({**DEFAULTS, "checkpoint": "somewhere", "robot": str(robot)})


def test_defaults_leave_the_contract_alone(values: PolicyParameters) -> None:
    assert values.contract_overrides == {}
    assert (values.seed, values.num_steps, values.precision) == (None, None, None)


@pytest.mark.parametrize("name", ["checkpoint", "robot"])
def test_what_must_be_given(name: str) -> None:
    with pytest.raises(ParameterError, match=f"parameter {name} is not set"):
        PolicyParameters.from_values({**DEFAULTS, "checkpoint": "x", "robot": "y", name: " "})


@pytest.mark.parametrize(
    ("name", "value"),
    [("framework", "onnx"), ("precision", "int3"), ("expert", "turbo"), ("num_steps", 101),
     ("limits.velocity_scale", 0.0), ("limits.velocity_scale", float("nan")),
     ("limits.on_violation", "ignore"), ("max_policy_failures", 0)],
)
def test_values_out_of_range_are_refused_by_name(values: PolicyParameters, name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"parameter {name}: expected"):
        values.changed({name: value})  # type: ignore[dict-item]


def test_overrides_reach_the_contract(values: PolicyParameters) -> None:
    base = contract_of(values)
    contract = contract_of(values.changed({
        "timeline.open_loop_cap": 0.3, "timeline.blend_steps": 0, "timeline.hold_deadline": 0.5,
        "limits.on_violation": "reject", "rates.inference": 10.0, "limits.velocity_scale": 0.5,
    }))
    assert contract.timeline == dataclasses.replace(
        base.timeline, open_loop_cap=300_000_000, blend_steps=0, hold_deadline=500_000_000
    )
    assert contract.on_violation is OnViolation.REJECT
    assert contract.rates.inference_period == 100_000_000
    speeds = [joint.limits.velocity for joint in contract.action_joints if joint.limits]
    assert speeds == [0.5 * joint.limits.velocity for joint in base.action_joints if joint.limits]


def test_rate_zero_means_back_to_back(values: PolicyParameters) -> None:
    changed = values.changed({"rates.inference": 0.0})
    assert contract_of(changed).rates.inference_period is None
    assert changed.contract_overrides == {("rates", "inference"): "back_to_back"}
    assert values.changed({"rates.inference": -1.0}).contract_overrides == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("timeline.open_loop_cap", 0.05, "lookahead 0.1 s is longer than open_loop_cap"),
        ("timeline.open_loop_cap", -2.0, "expected a duration"),
        ("timeline.blend_steps", -5, "expected a whole number"),
        ("rates.inference", -0.5, "expected back_to_back"),
    ],
)
def test_overrides_are_judged_as_the_file_is(
    values: PolicyParameters, name: str, value: float, words: str
) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        contract_of(values.changed({name: value}))
    assert f"{name}={value}" in str(caught.value)


def test_a_bad_file_is_blamed_itself(values: PolicyParameters) -> None:
    Path(values.robot).write_text("robot: 3\n")
    with pytest.raises(ContractError):
        contract_of(values.changed({"timeline.blend_steps": 2}))


def test_a_file_changed_meanwhile_is_not_taken_in(values: PolicyParameters) -> None:
    contract = contract_of(values)
    robot = Path(values.robot)
    robot.write_text(robot.read_text().replace("topic: joint_states", "topic: other_joint_states"))
    with pytest.raises(ParameterError, match="has changed since configure"):
        recontracted(contract, values.changed({"timeline.blend_steps": 2}))


def test_every_field_is_a_parameter_and_every_parameter_a_row() -> None:
    assert len(PARAMETERS) == len(dataclasses.fields(PolicyParameters))
    table = markdown_table()
    assert all(f"| `{spec.name}` |" in table for spec in PARAMETERS)
