"""A pipeline without transport: messages are pushed by a thread of the test, outputs collected.

The policy is a stand-in, for what the real one cannot be made to do: block, fail and answer nonsense.
"""

from __future__ import annotations

import array
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from builtin_interfaces.msg import Time
from ros_rig import wait_until
from sensor_msgs.msg import CompressedImage, Image, JointState

from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.timeline import CommandKind
from flashrt_ros.nodes.outputs import time_message
from flashrt_ros.nodes.pipeline import Pipeline

PERIOD = 20_000_000  # control period and action period of the demo arm [ns]
HOME = np.array([0.1, -1.0, 0.5, 0.0, 0.3, 0.0, 0.02])


class StandInPolicy:
    """Moves joint 0 at a constant, slow speed from where it is; `behave` may do anything first."""

    precision = "fp32"

    def __init__(self, names: tuple[str, ...], **spec) -> None:
        fields = {
            "views": ("base_0_rgb", "left_wrist_0_rgb"), "state_dim": 7, "action_dim": 7,
            "state_names": names, "action_names": names, "action_rate_hz": 50.0, "checkpoint": "stand-in",
        }
        self.spec = SimpleNamespace(**{**fields, **spec})
        self.behave: Callable[[str], np.ndarray | None] = lambda prompt: None
        self.prompts: list[str] = []
        self.closed_on = ""

    def set_prompt(self, prompt: str) -> None:
        pass

    def predict(self, images, prompt, state, *, seed=None):
        self.prompts.append(prompt)
        answer = self.behave(prompt)
        if answer is not None:
            return answer
        actions = np.tile(np.asarray(state, np.float32), (50, 1))
        actions[:, 0] += 0.001 * np.arange(50)
        return actions

    def close(self) -> None:
        self.closed_on = threading.current_thread().name


class Driver:
    """Feeds a pipeline with messages as a robot would, and collects what comes out."""

    def __init__(self, contract: RobotContract | None = None, max_failures: int = 10) -> None:
        self.contract = contract or load_contract("demo_arm")
        self.policy = StandInPolicy(self.contract.action.joints)
        self.commands: list = []
        self.chunks: list = []
        self.problems: list = []
        self.on_problem: Callable[[object], None] = self.problems.append
        self.shift = 0  # of the clock that drivers and node share [ns]
        self.pipeline = Pipeline(
            self.contract,
            SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=time.time_ns() + self.shift)),
            publish_command=lambda output, stamp: self.commands.append((output, stamp)),
            publish_chunk=self.chunks.append,
            on_problem=lambda problem: self.on_problem(problem),
            max_failures=max_failures,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed)
        self._thread.start()

    def begin(self, prompt: str = "wave") -> None:
        self.pipeline.load(lambda: self.policy, prompt, lambda: True)
        self.pipeline.start()

    def drive(self) -> None:
        """Begin, and wait until the robot moves."""
        self.begin()
        wait_until(lambda: len(running(self)) >= 5, 30.0, "five commands")

    def _feed(self) -> None:
        while not self._stop.wait(0.01):
            stamp = time.time_ns() + self.shift
            for stream, message in messages(time_message(stamp), self.contract.action.joints):
                self.pipeline.synchroniser.push(stream, stamp, time.monotonic_ns(), message)
            self.pipeline.wake()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.pipeline.close()


def messages(stamp: Time, names: tuple[str, ...]):
    import cv2

    pixels = np.full((8, 8, 3), 128, np.uint8)
    raw = Image(height=8, width=8, step=24, encoding="rgb8", data=array.array("B", pixels.tobytes()))
    jpeg = array.array("B", cv2.imencode(".jpg", pixels)[1].tobytes())
    state = JointState(name=list(names), position=array.array("d", HOME.tobytes()))
    found = [
        ("base_camera", raw),
        ("wrist_camera", CompressedImage(format="jpeg", data=jpeg)),
        ("joint_states", state),
    ]
    for _, message in found:
        message.header.stamp = stamp
    return found


def running(driver: Driver) -> list:
    return [(out, stamp) for out, stamp in list(driver.commands) if out.kind is CommandKind.RUNNING]
