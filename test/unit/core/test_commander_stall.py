"""Control stood still for a while: whatever comes next, the arm is not led back to where it was."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import Arm, Clock, commander_of, constant, published, submit

from flashrt_ros.core.commander import Commander
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind

Small = Callable[..., RobotContract]


@pytest.mark.parametrize("representation", ["absolute", "delta", "velocity"])
def test_after_a_stall_of_the_control_thread_it_holds_where_the_arm_is(
    small: Small, representation: str
) -> None:
    clock = Clock()
    lookahead = 0.0 if representation == "velocity" else 0.1
    commander, arm = commander_of(small(representation=representation, lookahead=lookahead), clock=clock)
    submit(commander, constant(0.01, 0.1))
    assert commander.tick().kind is CommandKind.RUNNING
    arm.positions = np.array([0.4, 0.3])  # it went on along its lookahead
    clock.advance(0.15)
    held = [commander.tick() for _ in range(2)]
    for output in held:
        assert (output.kind, output.reason) == (CommandKind.HOLDING, Reason.CONTROL_STALLED)
        expected = [0.4, 0.3] if representation == "absolute" else [0.0, 0.0]
        np.testing.assert_allclose(published(output), expected)
        if output.trajectory is not None:
            np.testing.assert_allclose(output.trajectory.positions[0], [0.4, 0.3])


def test_after_a_stall_without_a_measured_position_it_stops(small: Small) -> None:
    clock = Clock()
    commander, arm = commander_of(small(), clock=clock)
    submit(commander, constant(0.01, 0.1))
    commander.tick()
    arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "gone")
    clock.advance(0.15)
    for _ in range(2):
        output = commander.tick()
        assert (output.kind, output.reason, output.values) == (
            CommandKind.STOPPED, Reason.STALE_RECEIPT, None
        )


def stalled(small: Small, representation: str) -> tuple[Commander, Arm]:
    """After a command, with the arm carried on along its lookahead while no tick came."""
    clock = Clock()
    lookahead = 0.0 if representation == "velocity" else 0.1
    commander, arm = commander_of(small(representation=representation, lookahead=lookahead), clock=clock)
    submit(commander, constant(0.01, 0.1))
    commander.tick()
    arm.positions = np.array([0.4, 0.3])
    clock.advance(0.6)
    return commander, arm


LAST = {
    "farewell": lambda commander: commander.farewell(),
    "pause": lambda commander: (commander.pause(Reason.HELD, "wait", bounded=False), commander.tick())[1],
    "fault": lambda commander: (commander.pause(Reason.HELD, "wait", bounded=True), commander.tick())[1],
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("representation", ["absolute", "delta", "velocity"])
def test_after_a_stall_nothing_leads_back_to_where_the_arm_was(
    small: Small, representation: str, last: str
) -> None:
    commander, _ = stalled(small, representation)
    output = LAST[last](commander)
    assert output.kind is CommandKind.HOLDING
    np.testing.assert_allclose(published(output), [0.4, 0.3] if representation == "absolute" else [0.0, 0.0])
    if output.trajectory is not None:
        np.testing.assert_allclose(output.trajectory.positions[0], [0.4, 0.3])


@pytest.mark.parametrize("last", LAST)
def test_after_a_stall_without_a_measured_position_nothing_is_sent_but_a_velocity_of_zero(
    small: Small, last: str
) -> None:
    for representation in ("absolute", "delta", "velocity"):
        commander, arm = stalled(small, representation)
        arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "gone")
        output = LAST[last](commander)
        if representation == "velocity":
            np.testing.assert_array_equal(published(output), [0.0, 0.0])
        else:
            assert output is None or output.values is None


def test_a_pause_whose_bound_went_by_in_a_stall_holds_where_the_arm_is_before_the_silence(
    small: Small,
) -> None:
    clock = Clock()
    commander, arm = commander_of(small(), clock=clock)
    submit(commander, constant(0.01, 0.1))
    commander.tick()
    commander.pause(Reason.INFERENCE_ERROR, "broken", bounded=True)
    arm.positions = np.array([0.4, 0.3])
    clock.advance(0.6)
    np.testing.assert_allclose(published(commander.tick()), [0.4, 0.3])
    clock.advance(0.02)
    assert commander.tick().kind is CommandKind.STOPPED


def test_the_farewell_of_velocities_is_zero_whatever_the_acceleration_limit(small: Small) -> None:
    limits = ((-1.0, 1.0, 1.0, 0.5), (0.0, 0.5, 2.0))
    commander, _ = commander_of(small(representation="velocity", lookahead=0.0, limits=limits))
    submit(commander, constant(0.5, 0.0))
    for _ in range(5):
        assert published(commander.tick())[0] > 0.0
    farewell = commander.farewell()
    assert farewell is not None
    np.testing.assert_array_equal(published(farewell), [0.0, 0.0])
