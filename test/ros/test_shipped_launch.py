"""Every shipped robot's launch, started: synthetic drivers in, chunks and commands out, dry_run kept."""

from __future__ import annotations

import array
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from ros_rig import wait_until
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, Header

from flashrt_ros.bringup import NodeSpec, pi0_nodes, pi05_nodes
from flashrt_ros.core.contract import JointMapping, OutputType, RobotContract, StreamType, load_contract
from flashrt_ros.core.timing import NS_PER_S
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.nodes.outputs import MESSAGES
from flashrt_ros.nodes.streams import STREAM_MESSAGES, qos_profile
from flashrt_ros.runner import node_command
from flashrt_runtime.checkpoints.presets import Preset, preset_named

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.random.default_rng(5).integers(0, 256, (96, 128, 3), dtype=np.uint8)
JPEG = array.array("B", cv2.imencode(".jpg", cv2.GaussianBlur(PIXELS, (0, 0), 1))[1].tobytes())
ROBOTS = [
    ("libero_franka", "libero", "pi05"), ("aloha", "aloha", "pi0"), ("so101", "so101", "pi05"),
    ("ur5e", "ur5e", "pi0"),
]
NODES = {"pi05": pi05_nodes, "pi0": pi0_nodes}


class Drivers:
    """Publishes what the robot's drivers would, at 30 Hz; joints at the middle of the policy's state."""

    def __init__(self, rig: Any, contract: RobotContract, preset: Preset, namespace: str) -> None:
        self._node, self._contract = rig.node, contract
        names = [name for source in contract.state.sources for name in source.joints]
        mapping = JointMapping([contract.joints[name] for name in names])
        pose = dict(zip(names, mapping.to_robot(preset.state_stats["mean"]), strict=True))
        self._joints: dict[str, dict[str, float]] = {}
        for source in contract.state.sources:
            found = self._joints.setdefault(source.stream, {})
            found |= {contract.joints[name].in_messages: float(pose[name]) for name in source.joints}
        self._publishers = {
            stream.name: rig.node.create_publisher(
                STREAM_MESSAGES[stream.type], f"/{namespace}/{stream.topic}", qos_profile(stream.qos)
            )
            for stream in contract.streams.values()
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(1 / 30):
            seconds, rest = divmod(time.time_ns(), NS_PER_S)
            header = Header(stamp=Time(sec=seconds, nanosec=rest))
            for stream in self._contract.streams.values():
                self._publishers[stream.name].publish(self._message(stream.name, stream.type, header))

    def _message(self, name: str, kind: StreamType, header: Header) -> Any:
        if kind is StreamType.IMAGE:
            data = array.array("B", PIXELS.tobytes())
            return Image(header=header, height=96, width=128, step=384, encoding="rgb8", data=data)
        if kind is StreamType.COMPRESSED_IMAGE:
            return CompressedImage(header=header, format="jpeg", data=JPEG)
        values = self._joints[name]
        return JointState(header=header, name=list(values), position=array.array("d", values.values()))

    def __enter__(self) -> Drivers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(("robot", "preset", "policy"), ROBOTS)
def test_the_launch_of_a_shipped_robot(rig, tmp_path: Path, robot: str, preset: str, policy: str) -> None:
    made = str(tmp_path / "checkpoint")
    command = ["flashrt", "make-checkpoint", "--preset", preset, "--policy", policy, "--out", made]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    contract = load_contract(robot)
    given = {"checkpoint": made, "robot": robot, "namespace": robot, "prompt": "do it"}
    real = (ROOT / "config" / "robots" / "parameters" / f"{robot}.yaml").is_file()
    (spec,) = NODES[policy](given)
    chunks = rig.collect(ActionChunk, f"/{robot}/policy_node/action_chunk")
    statuses = rig.collect(PolicyStatus, f"/{robot}/policy_node/status")
    topics = {output: f"/{robot}/{output.topic}" for output in contract.outputs}
    commands = [(output, rig.collect(MESSAGES[output.type], topic)) for output, topic in topics.items()]

    def starts(node: NodeSpec) -> Any:
        begin = time.monotonic()
        process = rig.start(node_command(node), node.env)
        is_running = lambda message: message.state == PolicyStatus.STATE_RUNNING  # noqa: E731
        statuses.wait_for(is_running, timeout=120.0, since=begin)
        wait_until(lambda: len(chunks.since(begin)) >= 3, 60.0, "chunks")
        return process

    with Drivers(rig, contract, preset_named(preset), robot):
        if real:  # as shipped: everything but commands
            process = starts(spec)
            assert [topic.messages for _, topic in commands] == [[] for _ in commands]
            assert process.end(timeout=20.0) == 0, process.output
            (spec,) = NODES[policy]({**given, "dry_run": "false"})
        process = starts(spec)
        for output, topic in commands:
            wait_until(lambda topic=topic: len(topic.messages) >= 20, 30.0, f"commands on {output.topic}")
        assert process.end(timeout=20.0) == 0, process.output
    chunk = chunks.messages[-1]
    assert tuple(chunk.joint_names) == contract.action.joints
    assert set(chunk.observation_streams) == set(contract.streams)
    for output, topic in commands:
        check(output.joints or contract.action.joints, output.type, topic.messages, contract)


def check(joints: tuple[str, ...], kind: OutputType, messages: list[Any], contract: RobotContract) -> None:
    """Every command has its controller's joints, finite and within the limits."""
    limits = [contract.joints[name].limits for name in joints]
    for message in messages:
        single = isinstance(message, Float64MultiArray)
        rows = [message.data] if single else [point.positions for point in message.points]
        assert all(len(row) == len(joints) and np.isfinite(row).all() for row in rows)
        if kind is OutputType.JOINT_TRAJECTORY:
            assert tuple(message.joint_names) == contract.message_names(joints)
        if contract.action.representation == "absolute":
            lower = np.array([limit.lower for limit in limits if limit])
            upper = np.array([limit.upper for limit in limits if limit])
            assert all(np.all((np.array(row) >= lower) & (np.array(row) <= upper)) for row in rows)
