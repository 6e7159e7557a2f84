"""A commander with an arm and a clock that the test moves by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashrt_ros.core.commander import Commander, Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.timeline import Accepted, Dropped

PERIOD = 20_000_000  # control period of the small contracts [ns]


class Arm:
    """Measured joint positions, or the error that reading them raises."""

    def __init__(self, *positions: float) -> None:
        self.positions = np.array(positions)
        self.error: Exception | None = None

    def __call__(self) -> np.ndarray:
        if self.error is not None:
            raise self.error
        return self.positions.copy()


class Clock:
    """Monotonic time [ns] that the test moves by hand."""

    now = 10**12

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def commander_of(
    contract: RobotContract, *start: float, clock: Clock | None = None
) -> tuple[Commander, Arm]:
    arm = Arm(*(start or (0.0, 0.1)))
    return Commander(contract, arm, clock or Clock()), arm


def submit(commander: Commander, actions: Any) -> Accepted | Dropped:
    return commander.submit(actions, commander.mark_observation())


def constant(*row: float, count: int = 20) -> np.ndarray:
    return np.tile(row, (count, 1))


def published(output: Output) -> np.ndarray:
    assert output.values is not None
    return output.values
