"""Velocities, and increments that leave as such: judged from where the arm is."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import commander_of, constant, published, submit

from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason

Small = Callable[..., RobotContract]


def test_velocity_commands_follow_the_measured_position(small: Small) -> None:
    commander, arm = commander_of(small(representation="velocity", lookahead=0, cap=1.0))
    submit(commander, constant(0.5, 0.0, count=50))
    assert published(commander.tick())[0] == 0.5
    arm.positions[0] = 0.995
    output = commander.tick()
    assert published(output)[0] == pytest.approx(0.25)
    assert output.trajectory is None
    arm.positions[0] = 1.0
    assert published(commander.tick())[0] == 0.0
    arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "gone")
    assert published(commander.tick())[0] == 0.0


@pytest.mark.parametrize(("follows", "step"), [(0.5, 0.01), (1.2, -0.01)])
def test_increments_are_judged_from_where_the_arm_is(small: Small, follows: float, step: float) -> None:
    """An arm that follows increments by half still gets to its limit, one that overshoots no further."""
    contract = small(representation="delta", lookahead=0.0, hold_deadline=1.0)
    commander, arm = commander_of(contract, -0.5 if step > 0 else 0.5, 0.25)
    for _ in range(40):
        submit(commander, constant(step, step))
        for _ in range(10):
            arm.positions = arm.positions + follows * published(commander.tick())
    bounds = commander.limiter
    end = bounds.upper if step > 0 else bounds.lower
    np.testing.assert_allclose(arm.positions, end, atol=0.2 * abs(step) if follows > 1 else 1e-3)
    beyond = np.maximum(arm.positions - bounds.upper, bounds.lower - arm.positions)
    assert np.all(beyond <= 0.2 * abs(step) + 1e-9)
    arm.positions = np.where(step > 0, bounds.upper + 0.1, bounds.lower - 0.1)
    assert not published(commander.tick()).any(), "outside a limit it may stand"
    submit(commander, constant(-step, -step))
    back = [commander.tick() for _ in range(10)]  # of which the first are blended
    assert not any(output.violations for output in back[4:]), "and move back"
    np.testing.assert_allclose(published(back[-1]), [-step, -step])


def test_increments_go_on_from_where_they_would_lead_while_nothing_is_measured(small: Small) -> None:
    commander, arm = commander_of(small(representation="delta", lookahead=0.0), 0.98, 0.1)
    submit(commander, constant(0.01, 0.0))
    commander.tick()
    arm.error = IngestError(Reason.STALE_RECEIPT, "joint_states", "gone")
    np.testing.assert_allclose(
        [published(commander.tick())[0] for _ in range(3)], [0.01, 0.0, 0.0], atol=1e-9
    )
