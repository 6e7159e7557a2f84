"""A ROS node beside a program: its own context without signal handlers, spun by a thread that is joined."""

from __future__ import annotations

import threading

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from flashrt_ros.core.contract import Qos


class SpinningNode:
    """`node` receives from start() to stop(). A callback's exception ends that and is kept in `failure`."""

    def __init__(self, name: str) -> None:
        self.failure: Exception | None = None
        self._context = Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node(name, context=self._context, start_parameter_services=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def stop(self) -> None:
        """End and join the thread, leave ROS; safe to call twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._context.ok():
            self._executor.shutdown()
            self.node.destroy_node()
            rclpy.shutdown(context=self._context)

    def now(self) -> int:
        """ROS time [ns]."""
        return int(self.node.get_clock().now().nanoseconds)

    def _run(self) -> None:
        try:
            self._receive()
        except Exception as error:
            self.failure = error

    def _receive(self) -> None:
        """Handle messages until `_stopping` is set."""
        while not self._stopping.is_set():
            self._executor.spin_once(timeout_sec=0.1)


def qos_profile(qos: Qos) -> QoSProfile:
    """A contract's QoS as rclpy has it."""
    return QoSProfile(
        depth=qos.depth,
        reliability=ReliabilityPolicy[qos.reliability.upper()],
        durability=DurabilityPolicy[qos.durability.upper()],
    )


def reliable(depth: int) -> QoSProfile:
    """Reliable, volatile, keeping the last `depth`."""
    return QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)
