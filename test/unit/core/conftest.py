"""Contracts for the tests, all variations of the shipped demo arm.

Messages here are stand-ins with the attributes of the ROS types: core is duck-typed and runs without ROS; the
real ones are in test/ros.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from flashrt_ros.core.contract import (
    JointLimits,
    OnViolation,
    OutputSpec,
    OutputType,
    Representation,
    RobotContract,
    load_contract,
)
from flashrt_ros.core.timing import to_ns

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests
ROBOTS = Path(__file__).resolve().parents[3] / "config" / "robots"


@pytest.fixture(scope="session")
def demo_text() -> str:
    """YAML of the shipped demo arm."""
    return (ROBOTS / "demo_arm.yaml").read_text()


@pytest.fixture(scope="session")
def demo() -> RobotContract:
    return load_contract("demo_arm", [ROBOTS])


def small_contract(
    demo: RobotContract,
    *,
    representation: str = "absolute",
    limits: tuple[tuple[float, float, float], ...] = ((-1.0, 1.0, 1.0), (0.0, 0.5, 2.0)),
    on_violation: str = "clamp",
    control_period: int = 20_000_000,
    action_period: int = 20_000_000,
    lookahead: float = 0.1,
    cap: float = 0.5,
    blend_steps: int = 4,
    hold_deadline: float = 0.2,
) -> RobotContract:
    """The demo arm's contract cut down to its first joints, with these limits (lower, upper, velocity)."""
    names = demo.action.joints[: len(limits)]
    joints = {
        name: replace(demo.joints[name], limits=JointLimits(*bounds))
        for name, bounds in zip(names, limits, strict=True)
    }
    output = (
        OutputSpec("command", OutputType.JOINT_TRAJECTORY, to_ns(lookahead))
        if lookahead
        else OutputSpec("command", OutputType.FLOAT64_MULTI_ARRAY, 0)
    )
    return replace(
        demo,
        joints=MappingProxyType(joints),
        state=replace(demo.state, sources=(replace(demo.state.sources[0], joints=names),)),
        action=replace(
            demo.action, joints=names, representation=Representation(representation), period=action_period
        ),
        outputs=(output,),
        on_violation=OnViolation(on_violation),
        rates=replace(demo.rates, control_period=control_period),
        timeline=replace(
            demo.timeline,
            open_loop_cap=to_ns(cap),
            blend_steps=blend_steps,
            hold_deadline=to_ns(hold_deadline),
        ),
    )


@pytest.fixture(scope="session")
def small(demo: RobotContract) -> Callable[..., RobotContract]:
    """Factory of two-joint contracts; keywords of small_contract."""

    def build(**keywords: Any) -> RobotContract:
        return small_contract(demo, **keywords)

    return build


@pytest.fixture(scope="session")
def joint_message() -> Callable[..., SimpleNamespace]:
    """Factory of messages with JointState's attributes."""

    def build(names: list[str], position: Any, velocity: Any = ()) -> SimpleNamespace:
        return SimpleNamespace(name=list(names), position=position, velocity=velocity, effort=[])

    return build
