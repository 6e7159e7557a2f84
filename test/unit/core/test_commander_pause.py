"""Pauses, and limits that change while commands go out."""

from collections.abc import Callable

import numpy as np
import pytest
from commander_rig import Clock

from flashrt_ros.core.commander import Commander
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import CommandKind, Dropped

Small = Callable[..., RobotContract]


def commander_of(contract: RobotContract, clock: Clock | None = None) -> Commander:
    return Commander(contract, lambda: np.array([0.0, 0.1]), clock or Clock())


def submit(commander: Commander, *row: float) -> object:
    return commander.submit(np.tile(row, (20, 1)), commander.mark_observation())


def test_a_pause_holds_what_was_sent_last_and_ends_with_resume(small: Small) -> None:
    clock = Clock()
    commander = commander_of(small(), clock=clock)
    submit(commander, 0.01, 0.1)
    sent = commander.tick().values
    commander.pause(Reason.HELD, "wait", bounded=False)
    for _ in range(100):
        clock.advance(0.02)
        held = commander.tick()
        assert (held.kind, held.reason, held.message) == (CommandKind.HOLDING, Reason.HELD, "wait")
        np.testing.assert_array_equal(held.values, sent)
    refused = submit(commander, 0.02, 0.1)
    assert isinstance(refused, Dropped)
    assert refused.reason is Reason.HELD
    commander.resume()
    submit(commander, 0.02, 0.1)
    assert commander.tick().kind is CommandKind.RUNNING


def test_a_bounded_pause_falls_silent_after_the_hold_deadline(small: Small) -> None:
    clock = Clock()
    commander = commander_of(small(hold_deadline=0.2), clock=clock)
    submit(commander, 0.01, 0.1)
    commander.tick()
    commander.pause(Reason.INFERENCE_ERROR, "broken", bounded=True)
    kinds = []
    for _ in range(15):
        kinds.append(commander.tick().kind)
        clock.advance(0.02)
    assert kinds == [CommandKind.HOLDING] * 10 + [CommandKind.STOPPED] * 5
    assert commander.tick().reason is Reason.INFERENCE_ERROR
    assert commander.farewell() is None


def test_a_bounded_pause_asked_for_again_ends_when_it_would_have(small: Small) -> None:
    clock = Clock()
    commander = commander_of(small(hold_deadline=0.2), clock=clock)
    submit(commander, 0.01, 0.1)
    commander.tick()
    kinds = []
    for _ in range(12):
        commander.pause(Reason.INFERENCE_ERROR, "broken", bounded=True)
        kinds.append(commander.tick().kind)
        clock.advance(0.02)
    assert kinds == [CommandKind.HOLDING] * 10 + [CommandKind.STOPPED] * 2
    commander.pause(Reason.HELD, "wait", bounded=False)
    assert commander.tick().reason is Reason.HELD


@pytest.mark.parametrize("representation", ["delta", "velocity"])
def test_a_pause_of_increments_or_velocities_commands_zero(small: Small, representation: str) -> None:
    lookahead = 0.0 if representation == "velocity" else 0.1
    commander = commander_of(small(representation=representation, lookahead=lookahead))
    submit(commander, 0.001, 0.001)
    commander.tick()
    commander.pause(Reason.HELD, "wait", bounded=False)
    assert not np.any(commander.tick().values)


def test_no_mark_from_before_a_pause_or_from_within_it_is_followed(small: Small) -> None:
    commander = commander_of(small())
    before = commander.mark_observation()
    commander.pause(Reason.HELD, "wait", bounded=False)
    within = commander.mark_observation()
    commander.resume()
    for mark in (before, within):
        dropped = commander.submit(np.full((20, 2), 0.1), mark)
        assert isinstance(dropped, Dropped)
        assert dropped.reason is Reason.OLD_GENERATION


def test_limits_and_cap_are_adopted_while_a_chunk_plays(small: Small) -> None:
    commander = commander_of(small())
    submit(commander, 0.9, 0.1)
    first = commander.tick().values
    commander.adopt_limits(small(cap=0.1, limits=((-1.0, 1.0, 0.5), (0.0, 0.5, 2.0))))
    second = commander.tick().values
    np.testing.assert_allclose((second - first)[0], 0.01, atol=1e-6)  # 0.5 rad/s now
    kinds = [commander.tick().kind for _ in range(5)]
    assert kinds == [CommandKind.RUNNING] * 3 + [CommandKind.HOLDING] * 2
