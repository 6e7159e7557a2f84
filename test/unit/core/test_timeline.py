"""The timeline: examples of every rule, then properties over random arrival patterns."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.chunk import at_control_rate, blend, check_chunk
from flashrt_ros.core.contract import Representation, RobotContract
from flashrt_ros.core.errors import ChunkError, TimelineConfigError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, Command, CommandKind, Dropped, ObservationMark, Timeline

PERIOD = 20_000_000
ABSOLUTE, DELTA, VELOCITY = Representation.ABSOLUTE, Representation.DELTA, Representation.VELOCITY


def timeline(
    representation: Representation = ABSOLUTE, *, ratio: int = 1, cap: int = 10, blend_steps: int = 0,
    hold: int = 3, lookahead: int | None = None, dof: int = 1, clock: Callable[[], int] = lambda: 0,
) -> Timeline:
    """Cap and lookahead in actions, hold deadline in control ticks; time stands still without a clock."""
    control = PERIOD // ratio
    ahead = None if lookahead is None else lookahead * PERIOD
    return Timeline(
        dof, representation, PERIOD, control, cap * PERIOD, blend_steps, hold * control, ahead, clock
    )


class Clock:
    """Monotonic time [ns] that the test moves by hand."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def ramp(start: float, count: int) -> np.ndarray:
    """Actions start, start + 1, … of one joint."""
    return np.arange(start, start + count, dtype=np.float64)[:, None]


def accepted(outcome: Accepted | Dropped) -> Accepted:
    assert isinstance(outcome, Accepted), outcome
    return outcome


def value(command: Command) -> float:
    assert command.values is not None
    return float(command.values[0])


def values(line: Timeline, ticks: int) -> list[float]:
    return [value(line.tick()) for _ in range(ticks)]


def test_waits_in_silence_until_the_first_chunk() -> None:
    line = timeline()
    for _ in range(20):
        command = line.tick()
        assert command.kind is CommandKind.WAITING
        assert command.values is None
        assert command.reason is Reason.NO_CHUNK
    assert not line.pending


def test_first_chunk_starts_at_action_0_however_long_it_took() -> None:
    line = timeline()
    mark = line.mark_observation()
    for _ in range(100):
        line.tick()
    assert accepted(line.submit(ramp(0, 5), mark)).start_index == 0
    command = line.tick()
    assert (value(command), command.index, command.sequence) == (0.0, 0, 1)
    assert command.kind is line.kind is CommandKind.RUNNING


def test_splice_skips_what_was_sent_since_the_observation() -> None:
    line = timeline()
    line.submit(ramp(0, 10), line.mark_observation())
    values(line, 2)
    mark = line.mark_observation()
    assert (mark.sequence, mark.index, mark.generation) == (1, 2, 0)
    assert values(line, 3) == [2, 3, 4]
    outcome = accepted(line.submit(ramp(100, 10), mark))
    assert (outcome.consumed, outcome.start_index, outcome.sequence, outcome.blended) == (3, 3, 2, False)
    assert values(line, 2) == [103, 104]


def test_held_ticks_do_not_count_as_consumed() -> None:
    line = timeline(hold=10)
    line.submit(ramp(0, 3), line.mark_observation())
    line.tick()
    mark = line.mark_observation()
    values(line, 2)
    assert [line.tick().kind for _ in range(4)] == [CommandKind.HOLDING] * 4
    assert accepted(line.submit(ramp(50, 5), mark)).start_index == 2
    assert value(line.tick()) == 52


def test_late_chunk_is_played_from_where_it_is_due_and_dropped_when_nothing_is_left() -> None:
    line = timeline(cap=5, hold=10)
    line.submit(ramp(0, 10), line.mark_observation())
    early, late = line.mark_observation(), line.mark_observation()
    assert values(line, 4) == [0, 1, 2, 3]
    assert accepted(line.submit(ramp(10, 10), early)).start_index == 4
    assert values(line, 1) == [14]
    assert line.tick().kind is CommandKind.HOLDING
    outcome = line.submit(ramp(20, 10), late)
    assert isinstance(outcome, Dropped)
    assert outcome.reason is Reason.CHUNK_LATE
    assert "5 commands were sent since its observation, it covers 5" in outcome.message
    # The next observation, taken while held, starts afresh: no deadlock.
    assert accepted(line.submit(ramp(30, 10), line.mark_observation())).start_index == 0


def test_open_loop_cap_bounds_what_is_played() -> None:
    line = timeline(cap=4, hold=2)
    line.submit(ramp(0, 50), line.mark_observation())
    assert line.remaining == 4 * PERIOD
    commands = [line.tick() for _ in range(8)]
    assert [command.kind.value for command in commands] == (
        ["running"] * 4 + ["holding"] * 2 + ["stopped"] * 2
    )
    assert [value(command) for command in commands[:6]] == [0, 1, 2, 3, 3, 3]
    assert [command.reason for command in commands[4:]] == (
        [Reason.STARVED] * 2 + [Reason.HOLD_DEADLINE] * 2
    )
    assert commands[-1].values is None
    assert line.idle_reason is Reason.HOLD_DEADLINE


@pytest.mark.parametrize(("representation", "held"), [(ABSOLUTE, 7.0), (DELTA, 0.0), (VELOCITY, 0.0)])
def test_hold_by_representation(representation: Representation, held: float) -> None:
    line = timeline(representation, hold=5, lookahead=3)
    line.submit(np.array([[5.0], [7.0]]), line.mark_observation())
    values(line, 2)
    command = line.tick()
    assert command.kind is CommandKind.HOLDING
    assert value(command) == held
    assert command.lookahead[:, 0].tolist() == [held] * 3
    assert command.offsets.tolist() == [PERIOD, 2 * PERIOD, 3 * PERIOD]
    assert (command.index, command.sequence) == (-1, 1)


def test_a_chunk_ends_a_stop_without_blending() -> None:
    line = timeline(cap=2, hold=1, blend_steps=4)
    line.submit(ramp(0, 5), line.mark_observation())
    kinds = [line.tick().kind for _ in range(4)]
    assert kinds[-1] is CommandKind.STOPPED
    outcome = accepted(line.submit(ramp(10, 5), line.mark_observation()))
    assert (outcome.start_index, outcome.blended) == (0, False)
    assert value(line.tick()) == 10


def test_blend_weights() -> None:
    line = timeline(blend_steps=4)
    line.submit(np.zeros((10, 1)), line.mark_observation())
    line.tick()
    assert accepted(line.submit(np.ones((10, 1)), line.mark_observation())).blended
    np.testing.assert_allclose(values(line, 6), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_blend_after_the_old_chunk_ended_is_with_the_hold() -> None:
    for representation, base in ((ABSOLUTE, 3.0), (DELTA, 0.0)):
        line = timeline(representation, blend_steps=3, hold=9)
        line.submit(np.array([[1.0], [3.0]]), line.mark_observation())
        values(line, 2)
        line.tick()
        line.submit(np.full((5, 1), 7.0), line.mark_observation())
        np.testing.assert_allclose(values(line, 4), [base + (7 - base) * w for w in (0.25, 0.5, 0.75, 1.0)])


def test_blend_runs_out_of_the_old_chunk_into_its_hold() -> None:
    line = timeline(blend_steps=3)
    line.submit(np.array([[0.0], [2.0], [4.0]]), line.mark_observation())
    values(line, 2)
    line.submit(np.full((5, 1), 8.0), line.mark_observation())
    np.testing.assert_allclose(values(line, 4), [5.0, 6.0, 7.0, 8.0])


def test_generation_fences_chunks_and_holds() -> None:
    line = timeline(hold=5)
    line.submit(ramp(0, 10), line.mark_observation())
    line.tick()
    old = line.mark_observation()
    assert line.bump_generation() == line.generation == 1
    command = line.tick()
    assert (command.kind, value(command)) == (CommandKind.HOLDING, 0.0)
    assert command.reason is Reason.NO_CHUNK
    outcome = line.submit(ramp(20, 10), old)
    assert isinstance(outcome, Dropped)
    assert outcome.reason is Reason.OLD_GENERATION
    assert accepted(line.submit(ramp(30, 10), line.mark_observation())).generation == 1
    assert value(line.tick()) == 30


def test_reset_forgets_the_last_command() -> None:
    line = timeline()
    line.submit(ramp(0, 10), line.mark_observation())
    line.tick()
    assert line.reset() == 1
    assert line.tick().kind is CommandKind.WAITING
    assert line.hold_command() is None
    assert accepted(line.submit(ramp(5, 2), line.mark_observation())).sequence == 2


def test_chunks_come_in_the_order_of_their_observations() -> None:
    line = timeline()
    first, second = line.mark_observation(), line.mark_observation()
    accepted(line.submit(ramp(0, 5), second))
    for mark in (first, second):
        outcome = line.submit(ramp(9, 5), mark)
        assert isinstance(outcome, Dropped)
        assert outcome.reason is Reason.CHUNK_ORDER


@pytest.mark.parametrize(("actions", "reason"), [
    (np.array([[0.0], [np.nan]]), Reason.CHUNK_NOT_FINITE),
    (np.array([[np.inf]]), Reason.CHUNK_NOT_FINITE),
    (np.zeros((3, 2)), Reason.CHUNK_SHAPE),
    (np.zeros((0, 1)), Reason.CHUNK_SHAPE),
    (np.zeros(3), Reason.CHUNK_SHAPE),
    ([["a"]], Reason.CHUNK_SHAPE),
    ([[1.0], [1.0, 2.0]], Reason.CHUNK_SHAPE),
])
def test_a_bad_chunk_is_dropped_whole_and_what_played_goes_on(actions: object, reason: Reason) -> None:
    line = timeline()
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    outcome = line.submit(actions, line.mark_observation())  # type: ignore[arg-type]
    assert isinstance(outcome, Dropped)
    assert outcome.reason is reason
    assert values(line, 2) == [1, 2]


def test_admission_sees_the_blended_path_and_can_refuse() -> None:
    line = timeline(blend_steps=1)
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    seen: list[np.ndarray] = []

    def admit(path: np.ndarray) -> Dropped | None:
        seen.append(path.copy())
        return Dropped(Reason.LIMIT_VELOCITY, "too fast")

    outcome = line.submit(ramp(10, 5), line.mark_observation(), admit)
    assert outcome == Dropped(Reason.LIMIT_VELOCITY, "too fast")
    assert seen[0][:, 0].tolist() == [5.5, 11, 12, 13, 14]
    assert values(line, 1) == [1]


def test_confirm_and_refuse_follow_what_was_really_sent() -> None:
    line = timeline(hold=9)
    line.submit(ramp(0, 2), line.mark_observation())
    line.tick()
    line.confirm(np.array([0.25]))
    mark = line.mark_observation()
    line.tick()
    line.refuse(Reason.LIMIT_VELOCITY)
    command = line.tick()
    assert (command.kind, value(command)) == (CommandKind.HOLDING, 0.25)
    assert command.reason is Reason.LIMIT_VELOCITY
    assert accepted(line.submit(ramp(5, 5), mark)).start_index == 0


def test_refusing_the_very_first_command_returns_to_waiting() -> None:
    line = timeline()
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    stale = line.mark_observation()  # between the tick and its refusal: one command too many
    line.refuse(Reason.LIMIT_POSITION)
    command = line.tick()
    assert (command.kind, command.reason) == (CommandKind.WAITING, Reason.LIMIT_POSITION)
    assert accepted(line.submit(ramp(0, 5), stale)).start_index == 0


def test_hold_command_is_a_farewell_that_changes_nothing() -> None:
    line = timeline()
    assert line.hold_command() is None
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    command = line.hold_command()
    assert command is not None
    assert (command.kind, value(command)) == (CommandKind.HOLDING, 0.0)
    assert values(line, 2) == [1, 2]


def test_lookahead_follows_the_command_and_the_cap() -> None:
    line = timeline(cap=6, lookahead=3)
    line.submit(ramp(0, 50), line.mark_observation())
    command = line.tick()
    assert command.lookahead[:, 0].tolist() == [1, 2, 3]
    assert command.offsets.tolist() == [PERIOD, 2 * PERIOD, 3 * PERIOD]
    values(line, 3)
    assert line.tick().lookahead[:, 0].tolist() == [5]
    assert line.tick().lookahead.shape == (0, 1)


def test_lookahead_defaults_to_the_cap_and_never_exceeds_it() -> None:
    for lookahead in (None, 100):
        line = timeline(cap=6, lookahead=lookahead)
        line.submit(ramp(0, 50), line.mark_observation())
        assert line.tick().offsets.max() == 5 * PERIOD


def test_lookahead_at_a_faster_control_rate() -> None:
    line = timeline(ratio=4, cap=4)
    line.submit(ramp(0, 9), line.mark_observation())
    first, second = line.tick(), line.tick()
    assert (first.index, first.phase, second.index, second.phase) == (0, 0, 0, 1)
    assert value(second) == 0.25
    assert first.lookahead[:, 0].tolist() == second.lookahead[:, 0].tolist() == [1, 2, 3]
    quarter = PERIOD // 4
    assert (second.offsets // quarter).tolist() == [3, 7, 11]


def test_lookahead_of_increments_sums_to_where_the_chunk_leads() -> None:
    line = timeline(DELTA, ratio=4, cap=3)
    line.submit(np.array([[4.0], [8.0], [12.0]]), line.mark_observation())
    sent = 0.0
    for _ in range(12):
        command = line.tick()
        sent += value(command)
        assert sent + command.lookahead.sum() == pytest.approx(24.0)
    # On the last tick of an action the next point is a whole action away.
    line.submit(np.array([[4.0], [8.0], [12.0]]), line.mark_observation())
    commands = [line.tick() for _ in range(4)]
    assert commands[0].lookahead[:, 0].tolist() == [3, 8, 12]
    assert commands[3].lookahead[:, 0].tolist() == [8, 12]


def test_splice_in_the_middle_of_an_action() -> None:
    line = timeline(ratio=2)
    line.submit(ramp(0, 10), line.mark_observation())
    mark = line.mark_observation()
    assert values(line, 3) == [0, 0.5, 1]
    outcome = accepted(line.submit(ramp(100, 10), mark))
    assert (outcome.consumed, outcome.start_index) == (3, 2)
    command = line.tick()
    assert (value(command), command.index, command.phase) == (101.5, 1, 1)


@pytest.mark.parametrize(("representation", "ratio", "expected"), [
    (ABSOLUTE, 1, [0, 2, 4]),
    (ABSOLUTE, 2, [0, 1, 2, 3, 4]),
    (DELTA, 2, [0, 0, 1, 1, 2, 2]),
    (VELOCITY, 2, [0, 0, 2, 2, 4, 4]),
])
def test_control_rate_by_representation(
    representation: Representation, ratio: int, expected: list[float]
) -> None:
    path = at_control_rate(np.array([[0.0], [2.0], [4.0]]), ratio, representation)
    assert path[:, 0].tolist() == expected


@pytest.mark.parametrize(("action", "control"), [
    (PERIOD, PERIOD * 2), (PERIOD, 15_000_000), (33_333_333, 20_000_000), (0, PERIOD), (PERIOD, -1),
])
def test_other_ratios_are_refused(action: int, control: int) -> None:
    with pytest.raises(TimelineConfigError, match=r"integer multiple|above 0"):
        Timeline(1, ABSOLUTE, action, control, 10 * PERIOD, 0, PERIOD)


def test_periods_rounded_by_hand_are_taken() -> None:
    line = Timeline(1, ABSOLUTE, 33_300_000, 33_333_333, 500_000_000, 0, PERIOD)
    line.submit(ramp(0, 50), line.mark_observation())
    assert line.remaining == 15 * 33_333_333


@pytest.mark.parametrize("changes", [{"cap": 0}, {"blend_steps": -1}, {"hold": -1}, {"dof": 0}])
def test_impossible_settings_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(TimelineConfigError, match="expected dof >= 1"):
        timeline(**changes)  # type: ignore[arg-type]


def test_from_contract(demo: RobotContract) -> None:
    line = Timeline.from_contract(demo)
    line.submit(np.zeros((50, 7)), line.mark_observation())
    assert line.remaining == demo.timeline.open_loop_cap
    assert line.tick().offsets.max() == demo.trajectory_lookahead


def test_check_chunk_names_the_bad_value() -> None:
    with pytest.raises(ChunkError, match="action 1, joint index 0 is nan"):
        check_chunk([[0.0, 1.0], [np.nan, 1.0]], 2)
    assert check_chunk(np.zeros((2, 3), np.float32), 3).dtype == np.float64


def test_blend_is_exact_beyond_its_steps() -> None:
    new = ramp(0, 5)
    np.testing.assert_array_equal(blend(np.full((2, 1), 9.0), new, 2)[2:], new[2:])
    np.testing.assert_array_equal(blend(np.zeros((0, 1)), new, 0), new)
    assert blend(np.full((1, 1), 3.0), new[:1], 2)[0, 0] == 2.0


def assert_late(outcome: Accepted | Dropped, text: str) -> None:
    assert isinstance(outcome, Dropped)
    assert outcome.reason is Reason.CHUNK_LATE
    assert text in outcome.message


def test_a_chunk_of_an_observation_older_than_cap_and_deadline_is_dropped() -> None:
    clock = Clock()
    line = timeline(cap=10, hold=5, clock=clock)  # 0.2 s + 0.1 s
    mark = line.mark_observation()
    assert mark.taken == clock.now
    clock.advance(0.3)
    accepted(line.submit(ramp(0, 5), mark))
    old = line.mark_observation()
    clock.advance(0.301)
    assert_late(line.submit(ramp(0, 5), old), "0.301 s old; the bound (cap + hold) is 0.3 s")
    assert_late(line.submit(ramp(0, 5), line.mark_observation(clock.now - 400_000_000)), "0.400 s old")


def test_an_accepted_chunk_expires_unless_a_tick_starts_it() -> None:
    clock = Clock()
    line = timeline(cap=10, clock=clock)
    line.submit(ramp(0, 5), line.mark_observation())
    for _ in range(10):
        clock.advance(0.02)
        line.watch()
    assert line.pending
    clock.advance(0.03)
    line.watch()
    assert not line.pending
    command = line.tick()
    assert (command.kind, command.reason) == (CommandKind.WAITING, Reason.CHUNK_LATE)
    accepted(line.submit(ramp(0, 5), line.mark_observation()))
    clock.advance(0.25)
    assert line.tick().kind is CommandKind.WAITING


def test_a_chunk_observed_before_a_stop_does_not_start_motion() -> None:
    line = timeline(cap=2, hold=1)
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    before = line.mark_observation()
    assert [line.tick().kind for _ in range(3)][-1] is CommandKind.STOPPED
    assert_late(line.submit(ramp(10, 5), before), "before commands stopped or stalled")
    assert line.tick().kind is CommandKind.STOPPED
    accepted(line.submit(ramp(10, 5), line.mark_observation()))
    assert value(line.tick()) == 10


def test_ticks_that_stop_coming_flush_the_plan() -> None:
    clock = Clock()
    line = timeline(cap=50, hold=10, clock=clock)
    line.submit(ramp(0, 50), line.mark_observation())
    line.tick()
    before = line.mark_observation()
    clock.advance(0.1)
    command = line.tick()
    assert (command.kind, command.stalled) == (CommandKind.RUNNING, False)
    clock.advance(0.101)
    command = line.tick()
    assert (command.kind, command.reason, command.stalled) == (
        CommandKind.HOLDING, Reason.CONTROL_STALLED, True
    )
    assert not line.pending
    again = line.tick()
    assert (again.reason, again.stalled) == (Reason.CONTROL_STALLED, False)
    assert_late(line.submit(ramp(10, 5), before), "before commands stopped or stalled")
    accepted(line.submit(ramp(20, 5), line.mark_observation()))
    assert value(line.tick()) == 20


def test_a_slow_control_rate_stalls_after_five_periods() -> None:
    clock = Clock()
    line = Timeline(1, ABSOLUTE, 10**9, 10**9, 20 * 10**9, 0, 10**9, clock=clock)
    line.submit(ramp(0, 20), line.mark_observation())
    line.tick()
    clock.advance(5.0)
    assert line.tick().kind is CommandKind.RUNNING
    clock.advance(5.001)
    assert line.tick().reason is Reason.CONTROL_STALLED


def test_the_hold_deadline_is_also_a_time() -> None:
    clock = Clock()
    line = timeline(cap=1, hold=10, clock=clock)  # 0.2 s
    line.submit(ramp(0, 5), line.mark_observation())
    line.tick()
    kinds = []
    for _ in range(5):
        clock.advance(0.06)  # ticks come at a third of their rate
        kinds.append(line.tick().kind)
    assert kinds == [CommandKind.HOLDING] * 4 + [CommandKind.STOPPED]


# Properties. Actions spell out chunk and index, so that a published value tells where it came from.
CHUNK = 1000.0


@dataclass
class Model:
    """What the rules say, kept apart from the implementation: counts only, no paths."""

    sent: int = 0
    generation: int = 0
    marks: list[tuple[ObservationMark, int, int]] = field(default_factory=list)  # mark, sent, generation
    newest_accepted: int = -1
    stopped: int = 0  # marks taken before the last stop
    chunk: tuple[int, int, int, int] | None = None  # number, first tick, ticks it covers, sent at its start
    last: float | None = None
    held: int = 0


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.integers(1, 12)),
        st.tuples(st.just("mark"), st.just(0)),
        st.tuples(st.just("submit"), st.integers(0, 5)),
        st.tuples(st.just("submit_new"), st.just(0)),
        st.tuples(st.just("bump"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("bad"), st.just(0)),
    ),
    max_size=60,
)


def run_pattern(
    operations: list[tuple[str, int]], ratio: int, cap: int, hold: int, horizon: int
) -> list[tuple[CommandKind, float | None]]:
    """Play a pattern on a timeline and compare every step with the model."""
    line = timeline(ratio=ratio, cap=cap, hold=hold)
    model, number = Model(), 0
    published: list[tuple[CommandKind, float | None]] = []
    for name, argument in operations:
        if name == "mark":
            model.marks.append((line.mark_observation(), model.sent, model.generation))
        elif name in ("submit", "submit_new", "bad"):
            if name == "submit_new" or not model.marks:
                model.marks.append((line.mark_observation(), model.sent, model.generation))
            position = max(0, len(model.marks) - 1 - (argument if name == "submit" else 0))
            mark, sent, generation = model.marks[position]
            number += 1
            actions = ramp(CHUNK * number, horizon)
            if name == "bad":
                actions[horizon // 2] = np.nan
            outcome = line.submit(actions, mark)
            covered = (min(horizon, cap) - 1) * ratio + 1
            consumed = model.sent - sent
            fits = (
                name != "bad" and generation == model.generation and position > model.newest_accepted
                and consumed < covered and position >= model.stopped
            )
            assert isinstance(outcome, Accepted) == fits, outcome
            if fits:
                model.newest_accepted = position
                model.chunk = (number, consumed, covered, model.sent)
                model.held = 0
        elif name == "bump":
            line.bump_generation()
            model.generation += 1
            model.chunk = None
        elif name == "reset":
            line.reset()
            model.generation += 1
            model.chunk, model.last, model.held = None, None, 0
        else:
            for _ in range(argument):
                published.append(expect_tick(line, model, ratio, hold))
    return published


def expect_tick(line: Timeline, model: Model, ratio: int, hold: int) -> tuple[CommandKind, float | None]:
    command = line.tick()
    if model.chunk is not None:
        number, first, covered, sent_at_start = model.chunk
        tick = first + model.sent - sent_at_start
        if tick < covered:
            expected = CHUNK * number + tick / ratio
            assert command.kind is CommandKind.RUNNING
            assert value(command) == pytest.approx(expected, abs=1e-9)
            assert (command.index, command.phase) == divmod(tick, ratio)
            assert command.generation == model.generation
            ahead = expected + command.offsets / PERIOD
            np.testing.assert_allclose(command.lookahead[:, 0], ahead, atol=1e-9)
            assert tick + command.offsets.max(initial=0) * ratio // PERIOD <= covered - 1
            model.sent += 1
            model.last, model.held = expected, 0
            return command.kind, expected
    if model.last is None:
        assert command.values is None
        assert command.kind in (CommandKind.WAITING, CommandKind.STOPPED)
        return command.kind, None
    model.held += 1
    if model.held > max(1, hold):
        assert command.kind is CommandKind.STOPPED
        assert command.values is None
        model.last, model.held, model.stopped = None, 0, len(model.marks)
        return command.kind, None
    assert command.kind is CommandKind.HOLDING
    assert value(command) == pytest.approx(model.last, abs=1e-9)
    return command.kind, model.last


PATTERN = {
    "operations": OPERATIONS, "ratio": st.integers(1, 3), "cap": st.integers(1, 12),
    "hold": st.integers(0, 6), "horizon": st.integers(1, 15),
}


@settings(max_examples=400, deadline=None)
@given(**PATTERN)
def test_random_arrivals_follow_the_rules(
    operations: list[tuple[str, int]], ratio: int, cap: int, hold: int, horizon: int
) -> None:
    """Index exact (never a repeat, never a skip beyond what was consumed), fences, cap, hold, stop."""
    run_pattern(operations, ratio, cap, hold, horizon)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(**PATTERN)
def test_ten_thousand_random_arrivals(
    operations: list[tuple[str, int]], ratio: int, cap: int, hold: int, horizon: int
) -> None:
    run_pattern(operations, ratio, cap, hold, horizon)


@settings(max_examples=200, deadline=None)
@given(
    blend_steps=st.integers(0, 8), ratio=st.integers(1, 3), before=st.integers(1, 9),
    flight=st.integers(0, 9), representation=st.sampled_from([ABSOLUTE, DELTA, VELOCITY]),
    seed=st.integers(0, 2**31),
)
def test_a_seam_lies_between_old_and_new_and_ends_on_new(
    blend_steps: int, ratio: int, before: int, flight: int, representation: Representation, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    old, new = rng.normal(size=(2, 20, 1))
    line = timeline(representation, ratio=ratio, cap=20, blend_steps=blend_steps)
    line.submit(old, line.mark_observation())
    values(line, before)
    mark = line.mark_observation()
    values(line, flight)
    accepted(line.submit(new, mark))
    old_path = at_control_rate(old, ratio, representation)[before + flight :, 0]
    new_path = at_control_rate(new, ratio, representation)[flight:, 0]
    count = min(len(old_path), len(new_path), 10)
    got = np.array(values(line, count))
    steps = blend_steps * ratio
    low = np.minimum(old_path[:count], new_path[:count]) - 1e-12
    high = np.maximum(old_path[:count], new_path[:count]) + 1e-12
    assert np.all((got >= low) & (got <= high))
    np.testing.assert_allclose(got[steps:], new_path[steps:count])
    if steps and count:
        share = (got[0] - old_path[0]) / (new_path[0] - old_path[0])
        assert share == pytest.approx(1 / (steps + 1), abs=1e-6)


def test_ticks_and_submissions_from_two_threads() -> None:
    """Whatever the interleaving, an index is one above the last of its chunk."""
    line = timeline(cap=30, hold=10**6)
    stop = threading.Event()
    offered = 0

    def worker() -> None:
        nonlocal offered
        while not stop.is_set():
            offered += 1
            line.submit(ramp(CHUNK * offered, 40), line.mark_observation())

    thread = threading.Thread(target=worker)
    thread.start()
    try:
        previous = None
        running = 0
        while running < 3000:
            command = line.tick()
            if command.kind is not CommandKind.RUNNING:
                continue
            running += 1
            chunk, index = divmod(value(command), CHUNK)
            assert index == command.index
            if previous is not None and previous[0] == chunk:
                assert index == previous[1] + 1
            previous = chunk, index
    finally:
        stop.set()
        thread.join()
    assert offered > 1
