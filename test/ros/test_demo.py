"""The demo as a person starts it, and the bag recorder: real processes from start to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ros_rig import wait_until
from rosbags.highlevel import AnyReader

from flashrt_ros.bringup import DEMO_PROMPT
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.contract import load_contract
from flashrt_ros.demo.recording import RobotView

DEMO = [sys.executable, "-m", "flashrt_ros.demo"]
BAG = [sys.executable, "-m", "flashrt_ros.demo.sample_bag"]


def domain_processes(process) -> list[str]:
    """Nodes of the demo's domain that still run, found by their environment."""
    domain = f"ROS_DOMAIN_ID={process.domain}".encode()
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if domain in environment and int(entry.name) != os.getpid():
            left.append(command)
    return left


@pytest.fixture
def start(rig, tmp_path):
    """start(command) -> process, in the rig's domain and in an empty directory."""

    def start(command):
        process = rig.start([*command], {"PWD": str(tmp_path), "COLUMNS": "100"})
        process.domain = rig.env["ROS_DOMAIN_ID"]
        return process

    return start


def test_demo_drives_the_arm_and_writes_its_report(start, checkpoint, tmp_path) -> None:
    report = tmp_path / "report"
    demo = start([*DEMO, "--checkpoint", str(checkpoint), "--duration", "6", "--report", str(report)])
    assert demo.wait(120) == 0, demo.output
    assert domain_processes(demo) == []

    summary = json.loads((report / "summary.json").read_text())
    assert summary["duration_s"] > 5.5
    assert summary["chunks"] >= 6
    assert summary["control_rate_target_hz"] == 50.0
    assert summary["control_rate_hz"] > 40.0
    for count in ("limit_violations", "velocity_limit_violations", "invalid_commands"):
        assert summary[count] == 0, count
    assert summary["robot_diagnostics"]["limit_violations"] == "0"
    assert summary["joint_travel_rad"] > 0.25
    assert 0 < summary["tracking_rms_rad"] < 0.1
    assert 0 < summary["inference_p50_ms"] < summary["stamp_to_publish_p50_ms"]
    assert summary["stamp_to_publish_p50_ms"] <= summary["stamp_to_publish_p99_ms"]
    assert summary["control_jitter_p99_ms"] > 0
    assert set(summary["stream_rates_hz"]) == {"base_camera", "wrist_camera", "joint_states"}

    pictures = {path.name for path in report.glob("*.png")}
    assert pictures == {"joints.png", "latency.png", "control.png", "cameras.png"}
    text = (report / "report.md").read_text()
    assert all(f"({name})" in text for name in pictures)
    assert "untrained" in text
    assert "untrained policy (random weights)" in demo.lines[0]
    assert any("running" in line and "chunks" in line for line in demo.lines)
    assert "Summary" in demo.output


def test_ctrl_c_ends_the_demo_within_two_seconds_and_leaves_nothing(start, checkpoint, tmp_path) -> None:
    report = tmp_path / "report"
    demo = start([*DEMO, "--checkpoint", str(checkpoint), "--report", str(report)])
    demo.wait_for_line("running", 90)
    assert len(domain_processes(demo)) == 3  # the demo and its two nodes
    begin = time.monotonic()
    assert demo.end(signal.SIGINT, timeout=10) == 130, demo.output
    assert time.monotonic() - begin < 2.0
    assert domain_processes(demo) == []
    assert "Traceback" not in demo.output
    assert not list(report.iterdir())


def test_a_node_that_dies_ends_the_demo_with_its_last_lines(start, checkpoint, tmp_path) -> None:
    demo = start([*DEMO, "--checkpoint", str(checkpoint), "--report", str(tmp_path / "report")])
    demo.wait_for_line("running", 90)
    node = next(
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if parent_of(entry) == demo.pid and "policy_node" in (entry / "cmdline").read_text()
    )
    os.kill(node, signal.SIGKILL)
    assert demo.wait(20) == 1, demo.output
    assert "A node ended while the demo ran" in demo.output
    assert "Last lines of policy_node" in demo.output
    assert domain_processes(demo) == []


def parent_of(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def test_without_chunks_the_demo_says_why(start, checkpoint, tmp_path) -> None:
    """The prompt is missing: the policy node waits for one and says so."""
    arguments = ["--checkpoint", str(checkpoint), "--report", str(tmp_path / "report"), "--prompt", ""]
    demo = start([*DEMO, *arguments, "--startup-timeout", "25"])
    assert demo.wait(90) == 1, demo.output
    assert "No action chunk, no command came within" in demo.output
    assert "prompt" in demo.lines[-1] + demo.lines[-2]
    assert domain_processes(demo) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "/no/such/dir"], "no such directory"),
        ([], "--checkpoint"),
        (["--checkpoint", ".", "--duration", "0"], "--duration must lie in"),
    ],
)
def test_bad_arguments_end_with_one_line(rig, arguments, words) -> None:
    done = subprocess.run([*DEMO, *arguments], env=rig.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_sample_bag_holds_every_stream_of_a_moving_arm(start, tmp_path, storage) -> None:
    path = tmp_path / "bag"
    recorder = start([*BAG, "--out", str(path), "--duration", "2", "--storage", storage])
    assert recorder.wait(90) == 0, recorder.output
    assert domain_processes(recorder) == []
    contract = load_contract("demo_arm")
    robot = RobotView.from_contract(contract)
    with AnyReader([path]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        topics = [stream.topic for stream in contract.streams.values()]
        assert set(counts) == {f"/{topic}" for topic in [*topics, contract.outputs[0].topic]}
        assert 1.5 < reader.duration * 1e-9 < 3.0
        positions = []
        for connection, _, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            if connection.topic == "/joint_states":
                values = dict(zip(message.name, message.position, strict=True))
                positions.append([values[name] for name in robot.joint_names])
            elif connection.topic == "/base_camera/image_raw":
                assert message.data.size == message.height * message.step > 0
            elif connection.topic == "/arm_controller/joint_trajectory":
                commanded = np.array([point.positions for point in message.points])
                assert np.all((commanded >= robot.lower) & (commanded <= robot.upper))
    assert counts["/joint_states"] > 2 * counts["/base_camera/image_raw"] > 20
    assert np.ptp(np.array(positions), axis=0)[robot.angular].min() > 0.02
    with BagSource(path, contract, samples=8) as source:  # as a calibration takes it
        assert len(list(source)) == 8
    assert source.warnings == []


def test_sample_bag_stopped_early_is_still_a_bag(start, tmp_path) -> None:
    path = tmp_path / "bag"
    recorder = start([*BAG, "--out", str(path), "--duration", "60", "--compression", "none"])
    data = path / "bag.mcap"
    wait_until(lambda: data.exists() and data.stat().st_size > 2_000_000, 60, "a few messages in the bag")
    assert recorder.end(signal.SIGINT, timeout=10) == 130, recorder.output
    with AnyReader([path]) as reader:
        assert sum(1 for _ in reader.messages()) > 20
    again = start([*BAG, "--out", str(path)])
    assert again.wait(30) == 2
    assert "exists" in again.output


@pytest.mark.slow
def test_a_recorded_policy_is_replayed_with_its_own_prompt(start, rig, checkpoint, tmp_path) -> None:
    """The policy drives the arm and is recorded; `flashrt replay` then takes the prompt from its chunks."""
    path, report = tmp_path / "bag", tmp_path / "report"
    recorder = start([*BAG, "--out", str(path), "--duration", "4", "--checkpoint", str(checkpoint)])
    assert recorder.wait(120) == 0, recorder.output
    command = ["flashrt", "replay", str(path), "--checkpoint", str(checkpoint), "--robot", "demo_arm"]
    done = subprocess.run(
        [*command, "--out", str(report), "--samples", "4", "--json"],
        env=rig.env, capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["prompt"] == DEMO_PROMPT
    assert summary["commands"] == ["/arm_controller/joint_trajectory"]
    assert summary["moments"] == 4
    assert summary["actions_compared"] > 100
    assert all(joint["mean"] is not None for joint in summary["joints"])
    assert (report / "replay.png").stat().st_size > 10_000
