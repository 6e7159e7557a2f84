"""Record the demo robot into a rosbag2.

    python -m flashrt_ros.demo.sample_bag --out PATH [--duration 10] [--storage mcap] [--compression zstd]
        [--checkpoint DIR]

Without a checkpoint the arm follows a gentle scripted motion; with one the policy drives it and its chunks
and status are recorded too. Exit status: 0 done; 1 a node ended or a topic stayed silent; 2 bad arguments;
130 stopped by Ctrl-C or SIGTERM (what was recorded until then is a valid bag).
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from rosbags.interfaces import Connection
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.errors import WriterError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from flashrt_ros.bringup import DEMO_PROMPT, BringupError, node_environment, share_directory
from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.timing import NS_PER_S
from flashrt_ros.msg import ActionChunk, PolicyStatus

from .observer import MESSAGE_TYPES
from .processes import Processes, demo_processes, robot_process
from .recording import FloatArray, RobotView
from .spinning import SpinningNode, qos_profile, reliable

ROBOT, POLICY = "demo_arm", "policy_node"
GRACE = 0.6  # as in the demo [s]
STARTUP_TIMEOUT = 90.0  # for every topic to carry something [s]
COMMAND_PERIOD = 0.02  # of the scripted motion [s]
LOOKAHEAD = 5  # points of a scripted command after the first
AMPLITUDE = {True: 0.3, False: 0.008}  # of the scripted motion: revolute [rad], prismatic [m]
RAMP = 2.0  # seconds until the scripted motion has its full amplitude


class BagRecorder(SpinningNode):
    """Writes the serialised messages of the robot's topics, and of the policy's, into an open bag."""

    def __init__(self, contract: RobotContract, writer: Writer, policy: bool) -> None:
        super().__init__("sample_bag")
        self.counts: Counter[str] = Counter()
        self.recording = threading.Event()
        self._seen: set[str] = set()
        self._waiting: queue.SimpleQueue[tuple[Connection, int, bytes]] = queue.SimpleQueue()
        self._writer = writer
        self._typestore = get_typestore(Stores.ROS2_JAZZY)
        for path in sorted(Path(share_directory(), "msg").glob("*.msg")):
            name = f"flashrt_ros/msg/{path.stem}"
            self._typestore.register(get_types_from_msg(path.read_text(encoding="utf-8"), name))
        for stream in contract.streams.values():
            self._record(MESSAGE_TYPES[stream.type], stream.type.value, stream.topic, qos_profile(stream.qos))
        for output in contract.outputs:
            self._record(JointTrajectory, output.type.value, output.topic, reliable(50))
        if policy:
            self._record(ActionChunk, "flashrt_ros/msg/ActionChunk", f"{POLICY}/action_chunk", reliable(50))
            self._record(PolicyStatus, "flashrt_ros/msg/PolicyStatus", f"{POLICY}/status", reliable(10))

    def silent(self) -> list[str]:
        """Topics that have carried nothing yet."""
        return [topic for topic in self.counts if topic not in self._seen]

    def write(self) -> None:
        """Write what has come to the bag; only the thread that opened the bag may do so."""
        while not self._waiting.empty():
            self._writer.write(*self._waiting.get())

    def _record(self, message_type: type, type_name: str, topic: str, qos: Any) -> None:
        connection = self._writer.add_connection(f"/{topic}", type_name, typestore=self._typestore)
        self.counts[topic] = 0

        def on_message(data: bytes) -> None:
            self._seen.add(topic)
            if self.recording.is_set():
                self._waiting.put((connection, self.now(), data))
                self.counts[topic] += 1

        self.node.create_subscription(message_type, topic, on_message, qos, raw=True)


class ScriptedMotion:
    """Sends sine waves around the pose the arm has when it starts, each joint at its own frequency."""

    def __init__(self, spinning: SpinningNode, contract: RobotContract) -> None:
        self._robot = RobotView.from_contract(contract)
        self._clock = spinning.now
        self._start: FloatArray | None = None
        self._begin = 0
        dof = len(self._robot.joint_names)
        self._amplitude = np.array([AMPLITUDE[bool(angular)] for angular in self._robot.angular])
        self._frequency = np.linspace(0.12, 0.24, dof)  # up to 0.45 rad/s
        node = spinning.node
        stream = contract.streams[contract.state.sources[0].stream]
        node.create_subscription(JointState, stream.topic, self._on_joints, qos_profile(stream.qos))
        self._publisher = node.create_publisher(JointTrajectory, contract.outputs[0].topic, reliable(10))
        node.create_timer(COMMAND_PERIOD, self._send)

    def _on_joints(self, message: JointState) -> None:
        if self._start is None:
            values = dict(zip(message.name, message.position, strict=True))
            self._start = np.array([values[name] for name in self._robot.joint_names])
            self._begin = self._clock()

    def _send(self) -> None:
        if self._start is None:
            return
        now = self._clock()
        command = JointTrajectory(joint_names=list(self._robot.joint_names))
        command.header.stamp = Time(sec=now // NS_PER_S, nanosec=now % NS_PER_S)
        for index in range(LOOKAHEAD + 1):
            ahead = round(index * COMMAND_PERIOD * NS_PER_S)
            positions = self.positions((now + ahead - self._begin) / NS_PER_S)
            point = JointTrajectoryPoint(
                positions=positions.tolist(), time_from_start=Duration(nanosec=ahead)
            )
            command.points.append(point)
        self._publisher.publish(command)

    def positions(self, seconds: float) -> FloatArray:
        """Positions (dof,) [rad, m] this long after the start, within the contract's limits."""
        assert self._start is not None
        swing = min(1.0, seconds / RAMP) * self._amplitude * np.sin(2 * np.pi * self._frequency * seconds)
        return np.asarray(np.clip(self._start + swing, self._robot.lower, self._robot.upper))


def record(options: argparse.Namespace) -> int:
    """Start the nodes, record for options.duration seconds, stop everything; the exit status."""
    contract = load_contract(ROBOT)
    stop = threading.Event()
    lines: list[tuple[str, str]] = []

    def on_line(node: str, line: str) -> None:
        lines.append((node, line))

    if options.checkpoint:
        arguments = {"checkpoint": options.checkpoint, "robot": ROBOT, "prompt": DEMO_PROMPT}
        nodes: Processes = demo_processes(arguments, on_line, GRACE)
    else:
        nodes = robot_process(on_line, GRACE)
    previous = {
        number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    storage = StoragePlugin[options.storage.upper()]
    bag = Writer(options.out, version=9, storage_plugin=storage)
    if options.compression == "zstd":
        # Compressed by chunk where the format has chunks: that needs no word in metadata.yaml.
        mode = CompressionMode.STORAGE if storage is StoragePlugin.MCAP else CompressionMode.MESSAGE
        bag.set_compression(mode, CompressionFormat.ZSTD)
    try:
        with bag as writer:
            recorder = BagRecorder(contract, writer, policy=bool(options.checkpoint))
            try:
                if not options.checkpoint:
                    ScriptedMotion(recorder, contract)
                recorder.start()
                nodes.start()
                problem = _wait(recorder, nodes, stop, options.duration)
            finally:
                recorder.stop()
                recorder.write()
                nodes.stop()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if problem:
        print(
            *(f"{node}: {line}" for node, line in lines[-15:]), f"error: {problem}", sep="\n", file=sys.stderr
        )
        return 1
    for topic, count in recorder.counts.items():
        print(f"{count:6d}  /{topic}")
    size = sum(file.stat().st_size for file in options.out.iterdir()) / 1e6
    print(f"bag: {options.out}, {size:.1f} MB" + (" (stopped on request)" if stop.is_set() else ""))
    return 130 if stop.is_set() else 0


def _wait(recorder: BagRecorder, nodes: Processes, stop: threading.Event, seconds: float) -> str:
    """Until the recording is complete or stopped (""), or something fails (what)."""
    deadline = time.monotonic() + STARTUP_TIMEOUT
    while not stop.wait(0.05):
        recorder.write()
        if (status := nodes.poll()) is not None:
            return f"a node ended while recording (status {status})"
        if recorder.failure is not None:
            return f"recording failed: {recorder.failure!r}"
        now = time.monotonic()
        if recorder.recording.is_set():
            if now >= deadline:
                return ""
        elif not recorder.silent():
            recorder.recording.set()
            deadline = now + seconds
        elif now >= deadline:
            return f"nothing came on {', '.join(recorder.silent())} within {STARTUP_TIMEOUT:.0f} s"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m flashrt_ros.demo.sample_bag", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", required=True, type=Path, help="directory of the bag, which must not exist")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds to record (%(default)s)")
    parser.add_argument("--storage", choices=("mcap", "sqlite3"), default="mcap", help="format (%(default)s)")
    parser.add_argument(
        "--compression", choices=("zstd", "none"), default="zstd", help="of the messages (%(default)s)"
    )
    parser.add_argument("--checkpoint", default="", help="let this policy drive the arm, and record it too")
    options = parser.parse_args(argv)
    if not 0.5 <= options.duration <= 3600.0:
        parser.error(f"--duration must lie in 0.5..3600 s, got {options.duration:g}")
    if options.out.exists():
        print(f"error: {options.out} exists: a bag is written to a new directory", file=sys.stderr)
        return 2
    try:
        for variable, value in node_environment().items():
            os.environ.setdefault(variable, value)
        return record(options)
    except (BringupError, WriterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
