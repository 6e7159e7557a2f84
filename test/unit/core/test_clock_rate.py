"""The rate of a simulated clock against real time."""

import re

import pytest

from flashrt_ros.core.clock_rate import ClockRate
from flashrt_ros.core.reasons import Reason

POLL = 50_000_000


def run(rate: ClockRate, factor: float, seconds: float, tick: int = 1, start: int = 0, mono: int = 0) -> None:
    """Looks at a clock that runs at `factor` and moves in steps of `tick` ns."""
    for passed in range(0, int(seconds * 1e9), POLL):
        rate.add(start + int(factor * passed) // tick * tick, mono + passed)


@pytest.mark.parametrize("tick", [1, 1_000_000, 100_000_000])
@pytest.mark.parametrize("factor", [0.98, 1.0, 1.02])
def test_real_time_is_no_problem_however_coarse_the_clock(factor: float, tick: int) -> None:
    rate = ClockRate()
    run(rate, factor, 20.0, tick)
    assert rate.factor == pytest.approx(factor, abs=0.03)
    assert rate.problem is None


@pytest.mark.parametrize(("factor", "words"), [
    (0.5, "0.50 of real time.* 2.00 times as fast"), (0.9, "0.90 of.* 1.11 times"), (2.0, "0.50 times"),
    (0.0, "0.00 of real time, commands and limits are timed by real time; have"),
])
def test_another_rate_is_told(factor: float, words: str) -> None:
    rate = ClockRate()
    run(rate, factor, 3.5)
    assert rate.problem is None, "too short to say"
    run(rate, factor, 6.0)
    problem = rate.problem
    assert problem is not None
    assert problem.reason is Reason.CLOCK_RATE
    assert re.search(words, problem.message), problem.message


def test_it_follows_a_change_within_the_window_and_forgets_at_a_jump() -> None:
    rate = ClockRate()
    run(rate, 1.0, 6.0)
    run(rate, 0.5, 6.0, start=6_000_000_000, mono=6_000_000_000)
    assert rate.factor == pytest.approx(0.5, abs=0.02)
    for jump in (-5_000_000_000, 60_000_000_000):
        rate.add(9_000_000_000 + jump, 12_050_000_000)
        assert rate.factor is None
        run(rate, 1.0, 6.0, start=9_000_000_000 + jump, mono=12_100_000_000)
        assert rate.factor == pytest.approx(1.0)
        rate.reset()
        run(rate, 0.5, 6.0, start=6_000_000_000, mono=6_000_000_000)
