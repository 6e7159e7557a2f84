"""Timeline and limiter under random arrival patterns: the rules, counted on what is published."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.commander import Commander, Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.delay import DelayEstimate
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timeline import Accepted, Command, CommandKind, ObservationMark

PERIOD = 20_000_000
HORIZON = 20
Small = Callable[..., RobotContract]


@dataclass
class Robot:
    """One control loop and any number of inferences under way, with the counts that the rules speak of."""

    contract: RobotContract
    rng: np.random.Generator
    spread: float
    positions: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.1]))
    blind: bool = False
    now: int = 10**12
    published: int = 0  # commands of chunks that went out
    generation: int = 0
    # mark, and what was published and the generation then
    flights: list[tuple[ObservationMark, int, int]] = field(default_factory=list)
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)  # sequence -> published since mark, gen
    tick: int = -1  # of the chunk in force
    sequence: int = 0
    before: np.ndarray | None = None
    seams: int = 0
    newest: int = 0  # serial of the mark accepted last

    def __post_init__(self) -> None:
        self.commander = Commander(self.contract, self.measured, lambda: self.now)
        self.ratio = round(PERIOD / self.contract.rates.control_period)
        self.delay = DelayEstimate(self.ratio)
        self.commands: list[Command] = []
        inner = self.commander.timeline.tick

        def recorded() -> Command:
            self.commands.append(inner())
            return self.commands[-1]

        self.commander.timeline.tick = recorded  # type: ignore[method-assign]

    def measured(self) -> np.ndarray:
        if self.blind:
            raise IngestError(Reason.NO_MESSAGE, "joint_states", "gone")
        return self.positions

    def observe(self) -> None:
        self.flights.append((self.commander.mark_observation(), self.published, self.generation))

    def arrive(self, which: int, bad: bool = False, rtc: bool = False) -> None:
        """The chunk of the observation `which` places before the last comes; it stays in the list, so that it
        may come again."""
        if not self.flights:
            return
        mark, published, generation = self.flights[max(0, len(self.flights) - 1 - which)]
        actions = self.positions + np.cumsum(self.rng.normal(size=(HORIZON, 2)) * self.spread, axis=0)
        plan = self.commander.plan(mark)
        frozen = min(self.delay.actions, len(plan)) if rtc else 0
        actions[:frozen] = plan[:frozen]
        if bad:
            actions[self.rng.integers(HORIZON)] = np.nan
        outcome = self.commander.submit(actions, mark, frozen)
        if not isinstance(outcome, Accepted):
            return
        assert not bad
        assert generation == self.generation
        assert mark.serial > self.newest, "an observation used twice, or an older one after a newer"
        self.newest = mark.serial
        consumed = self.published - published
        assert outcome.consumed == consumed, "neither a repeat nor a skip beyond what was consumed"
        if not self.chunks:
            assert consumed == 0, "the first chunk starts at action 0"
        self.chunks[outcome.sequence] = consumed, generation
        self.delay.add(mark, outcome)

    def bump(self) -> None:
        self.generation = self.commander.timeline.bump_generation()

    def reset(self) -> None:
        self.generation = self.commander.reset()
        self.before = None

    def control(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now += self.contract.rates.control_period
            self.commands.clear()
            self.check(self.commander.tick())

    def check(self, output: Output) -> None:
        if output.kind is CommandKind.RUNNING:
            self.check_index(output)
            self.published += 1
        if output.values is None:
            self.before = None
            return
        if self.commands[-1].stalled:  # it holds where the arm is now, not where it was sent
            self.before = None
        representation = self.contract.action.representation
        step = self.commander.limiter.velocity * (self.contract.rates.control_period / 1e9)
        move = {
            "absolute": output.values - (self.positions if self.before is None else self.before),
            "delta": output.values,
            "velocity": output.values * (self.contract.rates.control_period / 1e9),
        }[representation.value]
        assert np.all(np.abs(move) <= step), "faster than the limit"
        if representation == "absolute":
            self.before = self.positions = output.values
        else:
            self.positions = self.positions + move

    def check_index(self, output: Output) -> None:
        command = self.commands[-1]
        assert command.sequence == output.sequence
        tick = command.index * self.ratio + command.phase
        first, generation = self.chunks[output.sequence]
        assert generation == self.generation == output.generation, "of a generation that is over"
        if output.sequence == self.sequence:
            assert tick == self.tick + 1, "the index rises strictly, by one tick"
        else:
            assert output.sequence > self.sequence, "an older chunk again"
            assert tick == first
            self.seams += self.sequence > 0
        self.sequence, self.tick = output.sequence, tick


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("control"), st.integers(1, 15)),
        st.tuples(st.just("observe"), st.just(0)),
        st.tuples(st.just("arrive"), st.integers(0, 3)),
        st.tuples(st.just("arrive_rtc"), st.integers(0, 1)),
        st.tuples(st.just("cycle"), st.integers(0, 12)),  # observe, infer for so many ticks, arrive
        st.tuples(st.just("cycle_rtc"), st.integers(0, 12)),
        st.tuples(st.sampled_from(["bump", "reset", "bad", "blind", "stall", "move"]), st.integers(0, 1)),
    ),
    max_size=25,
)
PATTERN = {
    "events": EVENTS, "representation": st.sampled_from(["absolute", "delta", "velocity"]),
    "on_violation": st.sampled_from(["clamp", "reject"]), "ratio": st.integers(1, 3),
    "blend_steps": st.sampled_from([0, 1, 4, 9]), "spread": st.sampled_from([0.002, 0.02, 0.5]),
    "cap": st.sampled_from([0.02, 0.1, 0.3, 1.0]), "seed": st.integers(0, 2**31),
}


def play(
    small: Small, events: list[tuple[str, int]], representation: str, on_violation: str, ratio: int,
    blend_steps: int, spread: float, cap: float, seed: int,
) -> Robot:
    contract = small(
        representation=representation, on_violation=on_violation, blend_steps=blend_steps, cap=cap,
        control_period=PERIOD // ratio, lookahead=0,
    )
    robot = Robot(contract, np.random.default_rng(seed), spread)
    for name, argument in events:
        if name == "control":
            robot.control(argument)
        elif name == "observe":
            robot.observe()
        elif name.startswith("arrive"):
            robot.arrive(argument, rtc=name.endswith("rtc"))
        elif name.startswith("cycle"):
            robot.observe()
            robot.control(argument)
            robot.arrive(0, rtc=name.endswith("rtc"))
        elif name == "bump":
            robot.bump()
        elif name == "reset":
            robot.reset()
        elif name == "bad":
            robot.arrive(argument, bad=True)
        elif name == "move":
            robot.positions = robot.rng.uniform([-1.0, 0.0], [1.0, 0.5])
        elif name == "stall":
            robot.now += 150_000_000
            robot.before = None  # the next command starts from where the robot is found then
        else:
            robot.blind = bool(argument)
    return robot


@settings(max_examples=1_000, derandomize=True, deadline=None)
@given(**PATTERN)
def test_rules_hold_for_random_arrivals(small: Small, **pattern: object) -> None:
    """Per chunk the index rises by one tick, from what was consumed; the first starts at 0; no step beyond
    the velocity limit, at a seam or elsewhere; nothing of an old generation."""
    play(small, **pattern)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(**PATTERN)
def test_rules_hold_for_ten_thousand_arrivals(small: Small, **pattern: object) -> None:
    play(small, **pattern)  # type: ignore[arg-type]


@pytest.mark.parametrize("representation", ["absolute", "delta", "velocity"])
@pytest.mark.parametrize("kind", ["cycle", "cycle_rtc"])
def test_the_patterns_do_move_the_robot_over_seams(small: Small, representation: str, kind: str) -> None:
    """The properties above are not vacuous."""
    events = [(kind, 3)] * 12 + [("bump", 0), (kind, 2), (kind, 2), ("control", 5)]
    robot = play(small, events, representation, "clamp", 2, 4, 0.02, 1.0, 0)
    assert robot.seams >= 12
    assert robot.published > 30
