"""Malformed messages through the node's own callbacks: no crash, no observation, no command, each counted."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from malformed import BASE, JOINTS, WRIST, good_messages, malformed
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_rig import wait_until
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.ingest import Ingest, MeasuredPositions
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.refusals import MessageInspector, RefusedMessages
from flashrt_ros.core.sync import NotReady, Synchroniser
from flashrt_ros.msg import ActionChunk, PolicyStatus
from flashrt_ros.nodes.streams import STREAM_MESSAGES, stream_callback

COUNT = 5_000
ROOT = Path(__file__).resolve().parents[2]
STAMPS = {Reason.CLOCK, Reason.STALE_STAMP, Reason.STAMP_UNSET}
STAND_IN = Path(__file__).with_name("stand_in_node.py")


def test_five_thousand_malformed_messages_give_no_observation_and_are_counted_once_each() -> None:
    """Each comes between good messages of the other streams, as the newest of its own."""
    contract = load_contract("demo_arm")
    rng, refused, now = np.random.default_rng(11), RefusedMessages(), [10**18]
    synchroniser, inspector = Synchroniser(contract), MessageInspector(contract, refused)
    ingest = Ingest(contract, on_refused=refused.count)
    measured = MeasuredPositions(contract, synchroniser)
    callbacks = {
        stream.name: stream_callback(stream, synchroniser, lambda: None, inspector, lambda: now[0])
        for stream in contract.streams.values()
    }
    expected: Counter[str] = Counter()
    source = malformed(contract, rng, lambda: now[0])
    for index in range(COUNT):
        now[0] += 10**9  # whatever came before is too old
        bad = next(source)
        synchroniser.clear()
        for name, message in good_messages(contract, now[0]).items():
            callbacks[name](bad.message if name == bad.stream else message)
        selected = synchroniser.select(now[0], time.monotonic_ns())
        if not isinstance(selected, NotReady):
            with pytest.raises(IngestError) as caught:
                ingest.observe(selected)
            assert caught.value.stream == bad.stream
            assert caught.value.reason in bad.reasons, str(caught.value)
            with pytest.raises(IngestError):  # looked at again, it is not counted again
                ingest.observe(selected)
        if bad.stream == JOINTS and not bad.reasons & STAMPS:
            with pytest.raises(IngestError):
                measured(time.monotonic_ns())
        expected[bad.stream] += 1
        counted = {name: sum(reasons.values()) for name, reasons in refused.counts().items()}
        assert counted == dict(expected), f"message {index}: {bad}"
    counts = refused.counts()
    assert set(counts) == {BASE, WRIST, JOINTS}
    assert {reason.name for reasons in counts.values() for reason in reasons} == {
        "IMAGE_SIZE", "IMAGE_ENCODING", "IMAGE_DECODE", "JOINT_MISSING", "JOINT_DUPLICATE", "JOINT_FIELD",
        "JOINT_NOT_FINITE", "CLOCK", "STALE_STAMP", "STAMP_UNSET",
    }


def test_good_messages_are_not_counted() -> None:
    contract, refused = load_contract("demo_arm"), RefusedMessages()
    inspector = MessageInspector(contract, refused)
    for name, message in good_messages(contract, 10**18).items():
        assert not inspector.inspect(name, 10**18, 10**18, message)
    assert refused.counts() == {}


class Publisher:
    """Publishes every stream of a contract from the test's own node, good messages also by themselves."""

    def __init__(self, rig, contract) -> None:
        qos = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
        self._contract, self._node = contract, rig.node
        self.topics = {
            stream.name: rig.node.create_publisher(STREAM_MESSAGES[stream.type], stream.topic, qos)
            for stream in contract.streams.values()
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def now(self) -> int:
        return self._node.get_clock().now().nanoseconds

    def _run(self) -> None:
        while not self._stop.wait(1 / 30):
            for name, message in good_messages(self._contract, self.now()).items():
                self.topics[name].publish(message)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def counted(report: DiagnosticArray) -> dict[str, int]:
    """STREAM.refused.REASON -> count, as the node reports it."""
    values = {entry.key: entry.value for entry in report.status[0].values}
    return {key: int(value) for key, value in values.items() if ".refused." in key}


@pytest.mark.slow
def test_five_thousand_malformed_messages_over_dds_crash_nothing_and_command_nothing(
    rig, policy_node, tmp_path
) -> None:
    """Alone they start nothing; between good ones they change nothing; the node goes on afterwards."""
    text = (ROOT / "config" / "robots" / "demo_arm.yaml").read_text()
    path = tmp_path / "robot.yaml"
    for depth in ("depth: 5", "depth: 20"):
        text = text.replace("reliability: best_effort, " + depth, "reliability: reliable, depth: 1000")
    path.write_text(text)
    contract = load_contract(path)
    assert {stream.qos.depth for stream in contract.streams.values()} == {1000}
    commands = rig.collect(JointTrajectory, "/arm_controller/joint_trajectory")
    chunks = rig.collect(ActionChunk, "/policy_node/action_chunk")
    statuses = rig.collect(PolicyStatus, "/policy_node/status")
    reports = rig.collect(DiagnosticArray, "/diagnostics")
    node = policy_node(robot=str(path), command=[sys.executable, "-P", str(STAND_IN)])
    publisher = Publisher(rig, contract)
    node.wait_for_line("active")
    for name, topic in publisher.topics.items():
        wait_until(lambda topic=topic: topic.get_subscription_count() == 1, 20.0, f"subscription of {name}")

    local = MessageInspector(contract, RefusedMessages())
    source = malformed(contract, np.random.default_rng(23), publisher.now)
    sent = 0
    while sent < COUNT:
        bad = next(source)
        if bad.deep:  # counted when it is used, which without good messages around it never is
            continue
        publisher.topics[bad.stream].publish(bad.message)
        stamp = bad.message.header.stamp
        stamp_ns = stamp.sec * 10**9 + stamp.nanosec
        assert local.inspect(bad.stream, stamp_ns, publisher.now(), bad.message) in bad.reasons
        sent += 1
        time.sleep(0.001)
    expected = {
        f"{stream}.refused.{reason.name.lower()}": count
        for stream, reasons in local.refused.counts().items()
        for reason, count in reasons.items()
    }
    assert sum(expected.values()) == COUNT
    reports.wait_for(lambda report: counted(report) == expected, timeout=30.0)
    assert commands.messages == []
    assert chunks.messages == []
    assert node.running

    middle = good_messages(contract, 0)[JOINTS].position
    with publisher:
        running = statuses.wait_for(lambda message: message.state == PolicyStatus.STATE_RUNNING, timeout=30.0)
        assert running.reason == 0
        for _ in range(1000):  # deep damage too, now that there is something to go with it
            bad = next(source)
            publisher.topics[bad.stream].publish(bad.message)
            time.sleep(0.002)
        mixed = time.monotonic()
        chunks.wait_for(timeout=30.0, since=mixed)
        wait_until(lambda: len(commands.since(mixed)) > 20, 30.0, "commands after the malformed messages")
    for command in commands.messages:
        for point in command.points:
            np.testing.assert_allclose(point.positions, middle, atol=1e-6)
    assert node.end() == 0, node.output
    assert "Traceback" not in node.output
    assert "callback failed" not in node.output
