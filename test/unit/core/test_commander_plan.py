"""What real-time chunking goes on from: the commands that are going to be sent, after the limits."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import PERIOD, Arm, commander_of, constant, published, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.chunk import at_action_rate
from flashrt_ros.core.commander import Commander
from flashrt_ros.core.contract import Representation, RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, CommandKind

Small = Callable[..., RobotContract]


def run(commander: Commander, arm: Arm, ticks: int) -> np.ndarray:
    """What is sent while a chunk plays, at most so many ticks (n, dof); the arm follows."""
    sent = []
    for _ in range(ticks):
        output = commander.tick()
        if output.kind is not CommandKind.RUNNING:
            break
        assert output.positions is not None
        arm.positions = output.positions
        sent.append(published(output))
    return np.array(sent).reshape(-1, 2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), representation=st.sampled_from(["absolute", "delta", "velocity"]),
    ratio=st.integers(1, 3), acceleration=st.sampled_from([None, 1.0, 20.0]), before=st.integers(0, 15),
    trajectory=st.booleans(), spread=st.sampled_from([0.01, 0.3, 3.0]),
)
def test_the_plan_is_what_is_sent(
    small: Small, seed: int, representation: str, ratio: int, acceleration: float | None, before: int,
    trajectory: bool, spread: float,
) -> None:
    limits = ((-1.0, 1.0, 1.0, acceleration), (0.0, 0.5, 2.0, acceleration))
    contract = small(
        representation=representation, limits=limits, control_period=PERIOD // ratio,
        lookahead=0.1 if trajectory and representation != "velocity" else 0.0,
    )
    commander, arm = commander_of(contract)
    submit(commander, np.cumsum(np.random.default_rng(seed).normal(size=(20, 2)) * spread, axis=0))
    run(commander, arm, before)
    mark = commander.mark_observation()
    plan, first = commander.plan(mark), commander.plan(mark, 4)
    sent = at_action_rate(run(commander, arm, 100), ratio, Representation(representation))
    assert len(plan) >= len(sent) > 0
    np.testing.assert_allclose(plan[: len(sent)], sent, atol=1e-9)
    np.testing.assert_allclose(first, plan[:4], atol=1e-9)


def test_it_stays_on_a_position_limit_and_comes_back_as_the_path_does(small: Small) -> None:
    commander, arm = commander_of(small(), 0.97, 0.1)
    submit(commander, np.column_stack([[0.98, 1.01, 1.02, 0.99, *[0.98] * 16], np.full(20, 0.1)]))
    run(commander, arm, 1)
    plan = commander.plan(commander.mark_observation())
    np.testing.assert_allclose(plan[:4, 0], [1.0, 1.0, 0.99, 0.98], atol=1e-6)


def test_a_chunk_frozen_to_it_is_sent_as_it_is(small: Small) -> None:
    """Nothing is clamped any more, where the plan before the limits would be, on and on."""
    commander, arm = commander_of(small())
    submit(commander, constant(0.9, 0.1))
    run(commander, arm, 3)
    mark = commander.mark_observation()
    plan = commander.plan(mark)
    run(commander, arm, 2)
    outcome = commander.submit(plan, mark, frozen=len(plan))
    assert isinstance(outcome, Accepted)
    assert outcome.jump < 1e-9
    outputs = [commander.tick() for _ in range(5)]
    np.testing.assert_allclose([published(output) for output in outputs], plan[2:7], atol=1e-9)
    assert not any(output.violations for output in outputs)


def test_before_the_first_command_it_goes_on_from_the_measured_position(small: Small) -> None:
    commander, arm = commander_of(small(), 0.3, 0.1)
    submit(commander, constant(-0.5, 0.1))
    mark = commander.mark_observation()
    np.testing.assert_allclose(commander.plan(mark)[:3, 0], [0.28, 0.26, 0.24], atol=1e-6)
    arm.error = IngestError(Reason.NO_MESSAGE, "joint_states", "gone")
    assert commander.plan(mark).shape == (0, 2)


@pytest.mark.parametrize("end", ["hold", "stop"])
def test_without_a_chunk_there_is_none(small: Small, end: str) -> None:
    commander, arm = commander_of(small(cap=0.1, hold_deadline=1.0 if end == "hold" else 0.02))
    assert commander.plan(commander.mark_observation()).shape == (0, 2)
    submit(commander, constant(0.1, 0.1))
    run(commander, arm, 5)
    for _ in range(3):
        commander.tick()
    assert commander.plan(commander.mark_observation()).shape == (0, 2)
