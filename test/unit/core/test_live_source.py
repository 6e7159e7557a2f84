"""Live observations for a calibration, over simulated time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from flashrt_ros.core.calibration_job import CalibrationJob
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.errors import TooFewObservationsError
from flashrt_ros.core.live_source import INTERVAL, LiveSource
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.sync import Synchroniser
from flashrt_ros.core.timing import NS_PER_S, to_ns

MS = 1_000_000


class World:
    """Cameras at 50 Hz and joint states at 100 Hz, while somebody sleeps."""

    def __init__(self, contract: RobotContract) -> None:
        self.contract = contract
        self.synchroniser = Synchroniser(contract)
        self.now = 10 * NS_PER_S
        self.silent: set[str] = set()
        self.encoding = "rgb8"
        self.source = LiveSource(
            contract, self.synchroniser, lambda: self.now, monotonic=lambda: self.now, sleep=self.sleep
        )

    def sleep(self, seconds: float) -> None:
        end = self.now + to_ns(seconds)
        while self.now < end:
            self.now += 10 * MS
            for stream in self.contract.streams.values():
                if stream.name in self.silent or (stream.is_image and self.now % (20 * MS)):
                    continue
                self.synchroniser.push(stream.name, self.now, self.now, self.message(stream.is_image))

    def message(self, image: bool) -> SimpleNamespace:
        if image:
            data = np.zeros(12, np.uint8).tobytes()
            return SimpleNamespace(encoding=self.encoding, height=2, width=2, step=6, data=data)
        names = list(self.contract.joints)
        return SimpleNamespace(name=names, position=[0.01] * len(names), velocity=[], effort=[])


@pytest.fixture
def world(demo: RobotContract) -> World:
    return World(demo)


def always() -> bool:
    return True


def test_different_frames_a_tenth_of_a_second_apart(world) -> None:
    taken = [(world.now, item) for item in world.source.observations(5, go_on=always)]
    assert len(taken) == 5
    times = [time for time, _ in taken]
    assert all(INTERVAL <= after - before < 2 * INTERVAL for before, after in pairwise(times))
    stamps = [item.stamps["base_camera"] for _, item in taken]
    assert len(set(stamps)) == 5
    assert list(taken[0][1].images) == ["base_0_rgb", "left_wrist_0_rgb"]


def test_says_what_it_waits_for_and_goes_on(world) -> None:
    told: list = []
    world.silent = {"wrist_camera"}

    def go_on() -> bool:
        if world.now > 11 * NS_PER_S:
            world.silent = set()
        return True

    taken = list(world.source.observations(1, go_on=go_on, on_problem=told.append))
    assert len(taken) == 1
    assert {item.reason for item in told[:-1]} == {Reason.NO_MESSAGE}
    assert {item.stream for item in told[20:-3]} == {"wrist_camera"}
    assert told[-1] is None


def test_patience_ends_and_names_the_cause(world) -> None:
    world.silent = {"joint_states"}
    with pytest.raises(TooFewObservationsError, match=r"0 of 3 observations.*joint_states") as caught:
        list(world.source.observations(3, go_on=always, patience=2 * NS_PER_S))
    assert caught.value.reason is Reason.NO_MESSAGE
    assert 12 * NS_PER_S <= world.now < 12.1 * NS_PER_S


def test_a_frame_that_cannot_be_decoded_is_waited_over(world) -> None:
    world.encoding = "16UC1"
    told: list = []

    def go_on() -> bool:
        world.encoding = "16UC1" if world.now < 11 * NS_PER_S else "rgb8"
        return True

    assert len(list(world.source.observations(2, go_on=go_on, on_problem=told.append))) == 2
    assert Reason.IMAGE_ENCODING in {item.reason for item in told if item is not None}


def test_frames_that_stand_still_are_not_taken_twice(world) -> None:
    """Cameras that stop after a moment: what they showed last is no second observation."""

    def go_on() -> bool:
        if world.now > 10.1 * NS_PER_S:
            world.silent = {"base_camera", "wrist_camera"}
        return True

    with pytest.raises(TooFewObservationsError, match="of 9 observations"):
        list(world.source.observations(9, go_on=go_on, patience=NS_PER_S))


def test_ends_when_told_to(world) -> None:
    assert list(world.source.observations(5, go_on=lambda: False)) == []
    world.silent = {"base_camera"}
    assert list(world.source.observations(5, go_on=lambda: world.now < 11 * NS_PER_S)) == []


@pytest.fixture
def job() -> Callable[..., CalibrationJob]:
    return lambda **fields: CalibrationJob("live", 8, **fields)


def test_a_job_says_how_far_it_is_and_what_stands_in_the_way(job) -> None:
    running = job(done=2)
    assert running.progress == 0.25
    assert running.problem == Problem(
        Reason.CALIBRATING, "", "calibrating from live: 2 of 8 observations"
    )
    running.obstacle = Problem(Reason.NO_MESSAGE, "base_camera", "no message yet")
    assert running.problem.reason is Reason.NO_MESSAGE
    assert str(running.problem).startswith("base_camera: calibrating from live: 2 of 8 observations; waiting")
    running.failed = Problem(Reason.CALIBRATION_FAILED, "", "broken")
    assert running.problem == running.failed
    assert job(done=9).progress == 1.0
