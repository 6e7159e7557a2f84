"""What the policy node adds to the model: newest camera stamp to chunk published, less the inference.

    . scripts/env.sh && python -P benchmarks/bench_node.py [--seconds 30] [--document docs/node.md]

Three processes, as on a robot: cameras (two raw 640 x 480 at 30 Hz) and joint states (100 Hz) over DDS, the
real node, and this one, which reads ~/metrics and the node's CPU time. The node's policy is a stub that
sleeps 40 ms without the interpreter's lock, as a GPU does. Both others have the environment that the launch
files give them.
"""

from __future__ import annotations

import argparse
import array
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from flashrt_ros.bringup import node_environment

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, CAMERA_RATE, JOINT_RATE = 640, 480, 30.0, 100.0
INFERENCE = 0.040  # [s]
SETTLE = 5.0  # after activation, before anything is counted [s]
GOALS = {"overhead p50": 4.0, "overhead p99": 12.0, "control jitter p99": 3.0, "CPU": 60.0}
BEGIN, END = "<!-- overhead: begin -->\n", "<!-- overhead: end -->\n"  # of the table in a document
HOME = (0.0, -1.2, 1.0, -0.5, 0.0, 0.0, 0.02)


class SleepingPolicy:
    """Holds the arm where it is."""

    precision = "fp32"

    def __init__(self, checkpoint: str, names: tuple[str, ...]) -> None:
        self.spec = SimpleNamespace(
            views=("base_0_rgb", "left_wrist_0_rgb"), horizon=50, state_dim=len(names),
            action_dim=len(names), state_names=names, action_names=names, action_rate_hz=50.0,
            checkpoint=checkpoint, rtc_training_max_delay=0,
        )

    def set_prompt(self, prompt: str) -> None: ...

    def predict(self, images: Any, prompt: str, state: Any, **_: Any) -> Any:
        time.sleep(INFERENCE)
        return np.tile(np.asarray(state, np.float32), (self.spec.horizon, 1))

    def close(self) -> None: ...


def run_node(arguments: list[str]) -> int:
    """The real node's main with the stub as its policy."""
    from flashrt_ros.nodes.policy_node import main

    return main(
        arguments, load=lambda values, contract: SleepingPolicy(values.checkpoint, contract.action.joints)
    )


def run_robot() -> int:
    """Cameras and joint states from one process; images differ from frame to frame."""
    import rclpy
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image, JointState

    from flashrt_ros.core.contract import load_contract
    from flashrt_ros.nodes.outputs import time_message

    rclpy.init()
    node = rclpy.create_node("bench_robot")
    qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
    topics = ("base_camera/image_raw", "wrist_camera/image_raw")
    cameras = [node.create_publisher(Image, topic, qos) for topic in topics]
    joints = node.create_publisher(JointState, "joint_states", qos)
    state = JointState(name=list(load_contract("demo_arm").action.joints), position=array.array("d", HOME))
    rng = np.random.default_rng(0)
    frames = [
        Image(height=HEIGHT, width=WIDTH, step=3 * WIDTH, encoding="rgb8", data=array.array(
            "B", rng.integers(0, 255, HEIGHT * WIDTH * 3, np.uint8).tobytes()
        ))
        for _ in range(3)
    ]
    ticks = 0
    deadline = time.monotonic()
    while rclpy.ok():
        stamp = time_message(time.time_ns())
        state.header.stamp = stamp
        joints.publish(state)
        if int(ticks * CAMERA_RATE / JOINT_RATE) != int((ticks - 1) * CAMERA_RATE / JOINT_RATE):
            stamp = time_message(time.time_ns())  # both cameras are triggered together
            for offset, camera in enumerate(cameras):
                frame = frames[(ticks + offset) % len(frames)]
                frame.header.stamp = stamp
                camera.publish(frame)
        ticks += 1
        deadline += 1.0 / JOINT_RATE
        time.sleep(max(0.0, deadline - time.monotonic()))
    return 0


def contract(directory: Path) -> Path:
    """The demo arm with two raw cameras."""
    data = yaml.safe_load((ROOT / "config/robots/demo_arm.yaml").read_text())
    data["streams"]["wrist_camera"] |= {"topic": "wrist_camera/image_raw", "type": "sensor_msgs/msg/Image"}
    path = directory / "robot.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@dataclass
class Measured:
    """metrics: the node's last ~/metrics; cpu: percent of one core over `seconds`; rates [Hz]."""

    metrics: Any
    cpu: float
    seconds: float
    rates: dict[str, float]
    chunk_rate: float


def measure(seconds: float) -> Measured:
    """Start robot and node, let them settle, listen for `seconds`."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    from flashrt_ros.msg import LatencyMetrics, PolicyStatus

    environment = {**os.environ, **node_environment()}
    here = [sys.executable, "-P", str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory() as scratch:
        parameters = {"checkpoint": scratch, "robot": str(contract(Path(scratch))), "prompt": "wave"}
        words = [word for name, value in parameters.items() for word in ("-p", f'{name}:="{value}"')]
        robot = subprocess.Popen([*here, "--role", "robot"], env=environment)
        node = subprocess.Popen(
            [*here, "--role", "node", "--ros-args", *words, "-p", "autostart:=true"], env=environment
        )
        rclpy.init()
        listener = rclpy.create_node("bench_listener")
        last: dict[str, Any] = {}
        listener.create_subscription(
            LatencyMetrics, "/policy_node/metrics", lambda m: last.update(metrics=m), 10
        )
        listener.create_subscription(PolicyStatus, "/policy_node/status", lambda m: last.update(status=m), 10)
        executor = SingleThreadedExecutor()
        executor.add_node(listener)
        try:
            running = PolicyStatus.STATE_RUNNING
            _spin(executor, 60.0, lambda: "status" in last and last["status"].state == running)
            if "status" not in last or last["status"].state != running:
                raise SystemExit(f"the node did not run within a minute; last it said: {last.get('status')}")
            _spin(executor, SETTLE)
            begin, cpu = time.monotonic(), _cpu_seconds(node.pid)
            _spin(executor, seconds)
            elapsed, used = time.monotonic() - begin, _cpu_seconds(node.pid) - cpu
        finally:
            for process in (node, robot):
                process.terminate()
                process.wait(10.0)
            rclpy.try_shutdown()
    status = last["status"]
    rates = dict(zip(status.stream_names, status.stream_rates, strict=True))
    return Measured(last["metrics"], 100.0 * used / elapsed, elapsed, rates, status.chunk_rate)


def _spin(executor: Any, seconds: float, until: Any = lambda: False) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        executor.spin_once(timeout_sec=0.1)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def table(found: Measured) -> str:
    """Markdown: goals first, then every window of ~/metrics."""
    metrics = found.metrics
    values = {
        "overhead p50": 1e3 * metrics.overhead.p50, "overhead p99": 1e3 * metrics.overhead.p99,
        "control jitter p99": 1e3 * metrics.control_jitter.p99, "CPU": found.cpu,
    }
    lines = ["| figure | measured | goal | |", "|---|---|---|---|"]
    for name, value in values.items():
        unit = "% of a core" if name == "CPU" else "ms"
        verdict = "met" if value <= GOALS[name] else "missed"
        lines.append(f"| {name} | {value:.2f} {unit} | ≤ {GOALS[name]:g} {unit} | {verdict} |")
    lines += ["", "| window | count | p50 | p95 | p99 | max |", "|---|---|---|---|---|---|"]
    for name in metrics.get_fields_and_field_types():
        if name in ("header", "window") or name.startswith("seam_"):
            continue
        one = getattr(metrics, name)
        cells = " | ".join(f"{1e3 * value:.2f}" for value in (one.p50, one.p95, one.p99, one.max))
        lines.append(f"| `{name}` [ms] | {one.count} | {cells} |")
    rates = ", ".join(f"{name} {rate:.1f} Hz" for name, rate in found.rates.items())
    where = f"{os.cpu_count()} CPU cores, {found.seconds:.0f} s; chunks {found.chunk_rate:.1f} Hz, {rates}"
    return "\n".join(lines) + f"\n\n{where}.\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--role", choices=("robot", "node", "bench"), default="bench")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--document", type=Path, help="file whose overhead table is replaced")
    options, rest = parser.parse_known_args()
    if options.role == "robot":
        return run_robot()
    if options.role == "node":
        return run_node([sys.argv[0], *rest])
    text = table(measure(options.seconds))
    print(text)
    if options.document is not None:
        before, _, rest = options.document.read_text().partition(BEGIN)
        options.document.write_text(before + BEGIN + text + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
