"""The simulated robot of the demo: physics in real time, two cameras, joint states, and commands executed.

Publishes (reliable, so that either kind of subscriber matches):
    base_camera/image_raw              sensor_msgs/Image            30 Hz
    wrist_camera/image_raw/compressed  sensor_msgs/CompressedImage  30 Hz
    joint_states                       sensor_msgs/JointState      100 Hz
    /diagnostics                       diagnostic_msgs/DiagnosticArray 1 Hz: commands, limits, overruns
Subscribes: arm_controller/joint_trajectory (trajectory_msgs/JointTrajectory).

Faults can be injected at run time through the parameters `<stream>.<option>`, the options being the fields of
`flashrt_ros.demo.faults`: `ros2 param set /demo_robot base_camera.drop 1.0` silences the base camera.
"""

from __future__ import annotations

import array
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from numpy.typing import NDArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.demo.faults import (
    COMPRESSED_ENCODINGS,
    RAW_ENCODINGS,
    CameraFaults,
    FaultGate,
    JointFaults,
    StreamFaults,
    encode_compressed,
    encode_raw,
)
from flashrt_ros.demo.sim import ArmSim, CameraRenderer
from flashrt_ros.demo.trajectory import CommandError, TrajectoryExecutor
from flashrt_ros.nodes.executors import make_executor

MAX_CATCH_UP = 0.1  # simulated time further behind than this is given up, and counted [s]
MAX_IMAGE_SIDE = 1280  # the model's off-screen buffer is 1280 x 960 [pixels]


@dataclasses.dataclass(frozen=True)
class CameraFormat:
    """Image size [pixels] and encoding a camera publishes."""

    width: int = 224
    height: int = 224
    encoding: str = "rgb8"

    def check(self, allowed: Sequence[str]) -> None:
        """Raises ValueError, naming the option, for a value out of range."""
        if not (16 <= self.width <= MAX_IMAGE_SIDE and 16 <= self.height <= 960):
            raise ValueError(f"size must lie in 16x16..{MAX_IMAGE_SIDE}x960, got {self.width}x{self.height}")
        if self.encoding not in allowed:
            raise ValueError(f"encoding must be one of {', '.join(allowed)}, got '{self.encoding}'")


class _Stream:
    """A publisher with its fault gate."""

    def __init__(self, node: Node, name: str, message_type: type, topic: str, faults: StreamFaults) -> None:
        self.name = name
        qos = QoSProfile(reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST, depth=5)
        self._publisher = node.create_publisher(message_type, topic, qos)
        self.gate: FaultGate[Any] = FaultGate(faults)

    def send(self, now: int, message: Any | None) -> None:
        for ready in self.gate.send(now, message):
            self._publisher.publish(ready)


class _Camera(_Stream):
    def __init__(self, node: Node, name: str, topic: str, compressed: bool) -> None:
        super().__init__(node, name, CompressedImage if compressed else Image, topic, CameraFaults())
        self.compressed = compressed
        self.format = CameraFormat(encoding="jpeg" if compressed else "rgb8")

    @property
    def encodings(self) -> Sequence[str]:
        return COMPRESSED_ENCODINGS if self.compressed else RAW_ENCODINGS

    def message(self, image: NDArray[np.uint8], encoding: str, stamp: int) -> Image | CompressedImage:
        """Message of an RGB image (H, W, 3), cut short where the faults say so."""
        if self.compressed:
            message = CompressedImage(format=encoding)
            data = encode_compressed(image, encoding)
        else:
            data, step = encode_raw(image, encoding)
            message = Image(height=image.shape[0], width=image.shape[1], encoding=encoding, step=step)
        message.header.stamp = _time(stamp)
        message.header.frame_id = f"{self.name}_optical_frame"
        faults = self.gate.faults
        assert isinstance(faults, CameraFaults)
        # array.array is the only type rclpy takes without walking every byte
        buffer = array.array("B")
        buffer.frombytes(data[: int(len(data) * faults.truncate)])
        message.data = buffer
        return message


class DemoRobot(Node):
    """The node; `start()` begins physics and cameras in threads of their own, `stop()` joins them."""

    def __init__(self) -> None:
        super().__init__("demo_robot")
        self._sim = ArmSim()
        self._sim_lock = threading.Lock()
        self._commands = TrajectoryExecutor(
            self._sim.joint_names, self._sim.lower, self._sim.upper, self._sim.home
        )
        self._cameras = (
            _Camera(self, "base_camera", "base_camera/image_raw", compressed=False),
            _Camera(self, "wrist_camera", "wrist_camera/image_raw/compressed", compressed=True),
        )
        self._joints = _Stream(self, "joint_states", JointState, "joint_states", JointFaults())
        self._camera_period = 1.0 / self.declare_parameter("camera_rate", 30.0).value
        self._joint_period = 1.0 / self.declare_parameter("joint_rate", 100.0).value
        self._declare_stream_parameters()
        self.add_on_set_parameters_callback(self._on_parameters)

        self._overruns = 0
        self._render_seconds = 0.0
        self._cpu_mark = (time.monotonic(), time.process_time(), self._sim.time)
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._cameras_ready = threading.Event()
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=loop.__name__)
            for loop in (self._physics_loop, self._camera_loop)
        ]
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1.0, self._publish_diagnostics)
        self.create_subscription(JointTrajectory, "arm_controller/joint_trajectory", self._on_command, 10)

    def start(self) -> None:
        """Begin physics, cameras and joint states."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End and join the threads; safe to call twice, or without start()."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    # Parameters

    def _declare_stream_parameters(self) -> None:
        for stream in (*self._cameras, self._joints):
            stream.gate.faults = self._declared(stream.name, stream.gate.faults)
        for camera in self._cameras:
            camera.format = self._declared(camera.name, camera.format)
        self._check_streams({})

    def _declared(self, prefix: str, options: Any) -> Any:
        """The dataclass `options`, every field declared as a parameter and replaced by its given value."""
        values = {
            item.name: self.declare_parameter(f"{prefix}.{item.name}", getattr(options, item.name)).value
            for item in dataclasses.fields(options)
        }
        return dataclasses.replace(options, **values)

    def _check_streams(self, changes: dict[str, Any]) -> list[Callable[[], None]]:
        """What puts `changes` (by parameter name) in force; raises ValueError where one is not allowed."""
        assignments: list[Callable[[], None]] = []

        def plan(stream: _Stream, owner: Any, attribute: str, check: Sequence[str]) -> None:
            options = getattr(owner, attribute)
            fields = {item.name for item in dataclasses.fields(options)}
            values = {name: changes[key] for name in fields if (key := f"{stream.name}.{name}") in changes}
            changed = dataclasses.replace(options, **values)
            try:
                changed.check(check)
            except ValueError as error:
                raise ValueError(f"{stream.name}.{error}") from error
            assignments.append(lambda: setattr(owner, attribute, changed))

        for stream in (*self._cameras, self._joints):
            plan(stream, stream.gate, "faults", self._sim.joint_names)
        for camera in self._cameras:
            plan(camera, camera, "format", camera.encodings)
        return assignments

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        changes = {parameter.name: parameter.value for parameter in parameters}
        for fixed in ("camera_rate", "joint_rate"):
            if fixed in changes:
                return SetParametersResult(successful=False, reason=f"{fixed} is read at start only")
        try:
            assignments = self._check_streams(changes)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=str(error))
        for assign in assignments:
            assign()
        return SetParametersResult(successful=True)

    # Commands and diagnostics, on the executor's thread

    def _now(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _on_command(self, message: JointTrajectory) -> None:
        before = self._commands.counts().limit_violations
        try:
            self._commands.command(message, self._now())
        except CommandError as error:
            self.get_logger().warning(f"command rejected: {error}", throttle_duration_sec=1.0)
            return
        counts = self._commands.counts()
        if counts.limit_violations > before:
            text = f"command beyond joint limits, clamped: {counts.last_violation}"
            self.get_logger().warning(text, throttle_duration_sec=1.0)

    def _publish_diagnostics(self) -> None:
        wall, cpu, simulated = time.monotonic(), time.process_time(), self._sim.time
        elapsed = wall - self._cpu_mark[0]
        counts = self._commands.counts()
        values = {
            "simulated_time_s": f"{simulated:.3f}",
            "real_time_factor": f"{(simulated - self._cpu_mark[2]) / elapsed:.3f}",
            "cpu_percent": f"{100.0 * (cpu - self._cpu_mark[1]) / elapsed:.1f}",
            "physics_overruns": str(self._overruns),
            "render_ms": f"{1e3 * self._render_seconds:.2f}",
            "commands_received": str(counts.received),
            "commands_rejected": str(counts.rejected),
            "limit_violations": str(counts.limit_violations),
            "last_rejection": counts.last_rejection,
            "last_violation": counts.last_violation,
        }
        self._cpu_mark = (wall, cpu, simulated)
        status = DiagnosticStatus(level=DiagnosticStatus.OK, name="demo_robot", message="ok")
        if counts.rejected or counts.limit_violations or self._overruns:
            status.level = DiagnosticStatus.WARN
            status.message = "commands refused or clamped, or physics too slow"
        status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
        report = DiagnosticArray(status=[status])
        report.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(report)

    # Physics and cameras, each on its own thread

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a loop; an error in it ends the node, except for what a shutdown under way causes."""
        try:
            loop()
        except Exception as error:
            if self.context.ok():
                self.failure = error
                self.get_logger().fatal(f"{type(error).__name__}: {error}")
                self._stop.set()
                self.context.try_shutdown()

    def _physics_loop(self) -> None:
        # Making an OpenGL context holds the interpreter for a tenth of a second.
        while not self._cameras_ready.wait(0.1) and not self._stop.is_set():
            pass
        origin, done = time.monotonic(), 0
        timestep = self._sim.timestep
        for _ in _ticks(self._joint_period, self._stop):
            now = self._now()
            due = int((time.monotonic() - origin) / timestep) - done
            if due * timestep > MAX_CATCH_UP:
                self._overruns += 1
                skipped = due - int(MAX_CATCH_UP / timestep)
                due, done = due - skipped, done + skipped
            done += due
            with self._sim_lock:
                for step in range(due):
                    self._sim.step(self._commands.sample(now - round((due - 1 - step) * timestep * 1e9)))
                reading = self._sim.joints()
            self._publish_joints(now, reading.positions, reading.velocities, reading.efforts)

    def _publish_joints(self, now: int, *columns: NDArray[np.float64]) -> None:
        stamp = self._joints.gate.stamp(now)
        message = None
        if stamp is not None:
            faults = self._joints.gate.faults
            assert isinstance(faults, JointFaults)
            names, values = faults.apply(self._sim.joint_names, *columns)
            position, velocity, effort = (array.array("d", value.tobytes()) for value in values)
            message = JointState(name=names, position=position, velocity=velocity, effort=effort)
            message.header.stamp = _time(stamp)
        self._joints.send(now, message)

    def _camera_loop(self) -> None:
        renderers: dict[tuple[int, int], CameraRenderer] = {}
        try:
            for size in {(camera.format.width, camera.format.height) for camera in self._cameras}:
                renderers[size] = CameraRenderer(self._sim.model, *size)
                renderers[size].render(self._sim.state(), self._cameras[0].name)
            self._cameras_ready.set()
            for _ in _ticks(self._camera_period, self._stop):
                with self._sim_lock:
                    now, state = self._now(), self._sim.state()
                for camera in self._cameras:
                    self._publish_image(camera, renderers, now, state)
                for size in set(renderers) - {(c.format.width, c.format.height) for c in self._cameras}:
                    renderers.pop(size).close()
        finally:
            for renderer in renderers.values():
                renderer.close()

    def _publish_image(
        self,
        camera: _Camera,
        renderers: dict[tuple[int, int], CameraRenderer],
        now: int,
        state: NDArray[np.float64],
    ) -> None:
        stamp = camera.gate.stamp(now)
        message = None
        if stamp is not None:
            wanted = camera.format
            size = (wanted.width, wanted.height)
            if size not in renderers:
                renderers[size] = CameraRenderer(self._sim.model, *size)
            begin = time.monotonic()
            image = renderers[size].render(state, camera.name)
            self._render_seconds += 0.05 * (time.monotonic() - begin - self._render_seconds)
            message = camera.message(image, wanted.encoding, stamp)
        camera.send(self._now(), message)


def _ticks(period: float, stop: threading.Event) -> Iterator[None]:
    """Yield at absolute deadlines `period` [s] apart until `stop` is set; missed ones are skipped."""
    deadline = time.monotonic()
    while not stop.is_set():
        yield
        now = time.monotonic()
        deadline += period
        if deadline < now - period:
            deadline = now
        if deadline > now:
            stop.wait(deadline - now)


def _time(nanoseconds: int) -> Time:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return Time(sec=seconds, nanosec=rest)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; 1 when physics or rendering failed, 2 on wrong parameters."""
    rclpy.init(args=args)
    node: DemoRobot | None = None
    executor = make_executor()
    try:
        node = DemoRobot()
        executor.add_node(node)
        node.start()
        while rclpy.ok():
            executor.spin_once(timeout_sec=0.1)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except ValueError as error:
        print(f"demo_robot: {error}", file=sys.stderr)
        return 2
    finally:
        # A thread still inside a native call at interpreter exit would abort the process.
        if node is not None:
            node.stop()
        executor.shutdown()
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()
    return 1 if node is None or node.failure is not None else 0


if __name__ == "__main__":
    sys.exit(main())
