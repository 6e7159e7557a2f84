"""CPU time that one observation costs the policy node, without the model.

    . scripts/env.sh && python -P benchmarks/bench_observation.py [--cameras raw,compressed] [--json out.json]

Another process publishes the cameras (640 x 480, 30 Hz) and joint states (100 Hz) over DDS, in the
environment that the launch files set. This process does with them what the node does: its subscriptions,
synchroniser and ingest, and the runtime's resize. CPU time is that of threads, so that waiting costs
nothing; what the executor's thread spends on messages that no observation used is included.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from flashrt_ros.bringup import node_environment

WIDTH, HEIGHT, CAMERA_RATE, JOINT_RATE = 640, 480, 30.0, 100.0
MODEL_SIZE = 224
GOAL_MS = 8.0
VIEWS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
JOINTS = tuple(f"joint_{index}" for index in range(7))
READY = "FLASHRT_BENCH_READY"  # set once this process has the environment of a node


@dataclass(frozen=True)
class Result:
    """CPU milliseconds per observation, by what they were spent on."""

    cameras: str
    executor: str
    observations: int
    observations_per_s: float
    callbacks_ms: float
    sync_ms: float
    decode_ms: float
    resize_ms: float
    total_ms: float
    goal_ms: float = GOAL_MS


def contract_text(cameras: list[str]) -> str:
    """A robot contract with these cameras ("raw" or "compressed")."""
    types = {"raw": "Image", "compressed": "CompressedImage"}
    streams = [
        f"  camera_{i}: {{topic: bench/camera_{i}, type: sensor_msgs/msg/{types[kind]}, view: {VIEWS[i]}}}"
        for i, kind in enumerate(cameras)
    ]
    limits = "limits: {position: [-3.0, 3.0], velocity: 2.0}"
    return "\n".join(
        [
            "contract_version: 1",
            "robot: bench",
            "streams:",
            *streams,
            "  joint_states: {topic: bench/joint_states, type: sensor_msgs/msg/JointState}",
            "joints:",
            *(f"  - {{name: {name}, unit: rad, {limits}}}" for name in JOINTS),
            f"state: {{stream: joint_states, field: position, joints: [{', '.join(JOINTS)}]}}",
            f"action: {{representation: absolute, period: 0.02, joints: [{', '.join(JOINTS)}]}}",
            "outputs: [{topic: bench/command, type: trajectory_msgs/msg/JointTrajectory, lookahead: 0.1}]",
            "limits: {on_violation: clamp}",
            "sync: {max_skew: 0.05, max_age: 0.25}",
            "rates: {control: 50.0, inference: back_to_back}",
            "timeline: {open_loop_cap: 0.5, blend_steps: 4, hold_deadline: 1.0}",
        ]
    )


def publish(cameras: list[str]) -> None:
    """Publish until this process is ended: what a robot's drivers do."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, Image, JointState

    rclpy.init()
    node = rclpy.create_node("bench_drivers")
    frame = scene()
    publishers = []
    for index, kind in enumerate(cameras):
        message_type = Image if kind == "raw" else CompressedImage
        publisher = node.create_publisher(message_type, f"bench/camera_{index}", qos_profile_sensor_data)
        publishers.append((publisher, image_message(kind, frame)))
    joints = node.create_publisher(JointState, "bench/joint_states", qos_profile_sensor_data)
    position = array.array("d", np.linspace(-1.0, 1.0, len(JOINTS)).tobytes())
    state = JointState(name=list(JOINTS), position=position)
    camera_due = time.monotonic()
    for now in ticks(1.0 / JOINT_RATE):
        stamp = node.get_clock().now().to_msg()
        state.header.stamp = stamp
        joints.publish(state)
        if now >= camera_due:
            camera_due += 1.0 / CAMERA_RATE
            for publisher, message in publishers:
                message.header.stamp = stamp
                publisher.publish(message)


def scene() -> np.ndarray:
    """An RGB image (HEIGHT, WIDTH, 3) with structure and sensor noise, so that its JPEG has a usual size."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def image_message(kind: str, frame: np.ndarray) -> object:
    """`frame` as an Image or as a CompressedImage (JPEG, quality 90)."""
    from sensor_msgs.msg import CompressedImage, Image

    buffer = array.array("B")
    if kind == "raw":
        buffer.frombytes(frame.tobytes())
        return Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH, data=buffer)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    buffer.frombytes(encoded.tobytes())
    return CompressedImage(format="jpeg", data=buffer)


def ticks(period: float) -> Iterator[float]:
    """Absolute deadlines, `period` [s] apart, for ever."""
    due = time.monotonic()
    while True:
        yield due
        due += period
        time.sleep(max(0.0, due - time.monotonic()))


class ThreadClock:
    """CPU time of one thread [s], readable from any other."""

    def __init__(self, thread: threading.Thread) -> None:
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)

    def now(self) -> float:
        return time.clock_gettime(self._clock)


def measure(cameras: list[str], executor_name: str, seconds: float, folder: Path) -> Result:
    """Take observations for `seconds` as the node's worker does, and add up the CPU time of both threads."""
    import rclpy
    import torch

    from flashrt_ros.core.contract import load_contract
    from flashrt_ros.core.ingest import Ingest
    from flashrt_ros.core.sync import Snapshot, Synchroniser
    from flashrt_ros.nodes.executors import EXECUTORS
    from flashrt_ros.nodes.streams import subscribe
    from flashrt_runtime.processing.images import prepare_image

    torch.set_num_threads(1)
    path = folder / "bench.yaml"
    path.write_text(contract_text(cameras))
    contract = load_contract(path)
    rclpy.init()
    node = rclpy.create_node("bench_node")
    synchroniser, ingest, new = Synchroniser(contract), Ingest(contract), threading.Event()
    subscribe(node, contract, synchroniser, new.set)
    executor = EXECUTORS[executor_name]()
    executor.add_node(node)
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin)
    thread.start()
    callbacks = ThreadClock(thread)
    count, warm_up, used = 0, 30, 0
    sync = decode = resize = began = 0.0
    callbacks_began = 0.0
    try:
        while count < warm_up or time.monotonic() < began + seconds:
            if not new.wait(30.0):
                raise SystemExit("no image came within 30 s: was the workspace sourced?")
            new.clear()
            start = time.thread_time()
            selected = synchroniser.select(node.get_clock().now().nanoseconds, time.monotonic_ns())
            if not isinstance(selected, Snapshot):
                continue
            oldest = min(selected.messages[stream.name].stamp for stream in contract.image_streams)
            if oldest <= used:  # not every camera has a new frame yet
                sync += time.thread_time() - start
                continue
            used = oldest
            selected_at = time.thread_time()
            observation = ingest.observe(selected)
            observed_at = time.thread_time()
            for image in observation.images.values():
                prepare_image(image, MODEL_SIZE, "antialias_uint8")
            done = time.thread_time()
            count += 1
            if count == warm_up:
                sync = decode = resize = 0.0
                began, callbacks_began = time.monotonic(), callbacks.now()
            elif count > warm_up:
                sync, decode = sync + selected_at - start, decode + observed_at - selected_at
                resize += done - observed_at
        wall, callbacks_spent = time.monotonic() - began, callbacks.now() - callbacks_began
    finally:
        stop.set()
        thread.join()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
    number = count - warm_up
    parts = [1e3 * part / number for part in (callbacks_spent, sync, decode, resize)]
    return Result(",".join(cameras), executor_name, number, number / wall, *parts, sum(parts))


def table(result: Result) -> str:
    """The result in lines for a person."""
    rows = [
        ("callbacks (executor thread)", result.callbacks_ms),
        ("synchronise", result.sync_ms),
        ("decode images, read joints", result.decode_ms),
        (f"resize to {MODEL_SIZE}", result.resize_ms),
        ("total", result.total_ms),
    ]
    head = (
        f"{result.cameras} {WIDTH}x{HEIGHT} cameras at {CAMERA_RATE:g} Hz, joints at {JOINT_RATE:g} Hz, "
        f"executor {result.executor}: {result.observations} observations, {result.observations_per_s:.1f}/s"
    )
    verdict = "within" if result.total_ms <= GOAL_MS else "above"
    lines = [f"  {name:<30}{value:7.2f} ms" for name, value in rows]
    return "\n".join([head, *lines, f"  CPU per observation {verdict} the goal of {GOAL_MS:g} ms"])


def main() -> int:
    """0 when measured, whatever the figure: a benchmark is no test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cameras", default="raw,compressed", help="raw or compressed, for each camera")
    parser.add_argument("--executor", default="events", choices=("events", "single"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cameras = options.cameras.split(",")
    if not set(cameras) <= {"raw", "compressed"} or not 1 <= len(cameras) <= len(VIEWS):
        parser.error(f"--cameras {options.cameras}: expected 1 to {len(VIEWS)} of raw, compressed")
    if READY not in os.environ:  # malloc reads its settings when a process starts
        isolated = {"ROS_DOMAIN_ID": str(1 + os.getpid() % 39), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        os.environ.update(isolated | node_environment() | {READY: "1"})
        os.execv(sys.executable, [sys.executable, "-P", *sys.argv])
    if options.publish:
        publish(cameras)
    drivers = subprocess.Popen([sys.executable, "-P", __file__, "--publish", "--cameras", options.cameras])
    try:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            result = measure(cameras, options.executor, options.seconds, Path(folder))
    finally:
        drivers.kill()
        drivers.wait()
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
