"""A node as a process: executor, signals, an end in which the last command is a hold."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

import rclpy
from rclpy.executors import Executor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from .executors import make_executor

# How long a thread may have to wait for the Python code of another [s]: with the default, 5 ms, the control
# thread would be late by that much.
SWITCH_INTERVAL = 0.0005
# A second signal after this long ends the process at once, whatever the model does; the hold went out [s].
PATIENCE = 2.0
LOG_PERIOD = 2.0  # between two lines about failed callbacks [s]


def run(make: Callable[[Callable[[], bool]], LifecycleNode], args: list[str] | None = None) -> int:
    """Run the node that `make(stopping)` makes until SIGINT or SIGTERM: 0. With its property `autostart`, 1
    (or its own `start_status`) when it cannot configure and activate itself. `stopping()`: whether a signal
    has come.

    Ends the process, once the node is taken down, with the node's `exit_status` when that is not 0 any more;
    so it does with a `start_status` above 1.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    stop = threading.Event()
    asked = 0.0

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if not stop.is_set():
            asked = now
            stop.set()
        elif now - asked > PATIENCE:  # a terminal and a launcher may both pass one Ctrl-C on
            os._exit(1)

    # rclpy's own handlers would take the publishers away before the hold could be sent.
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    node, status = make(stop.is_set), 0
    executor = make_executor()
    executor.add_node(node)
    try:
        with contextlib.ExitStack() as ending:  # in reverse, each whatever the others raise
            ending.callback(gc.freeze)  # else the interpreter spends most of a second on the collector then
            ending.callback(rclpy.try_shutdown)
            ending.callback(node.destroy_node)
            ending.callback(executor.shutdown)
            if getattr(node, "autostart", False) and not _start(node) and not stop.is_set():
                status = getattr(node, "start_status", 1)
            # The events executor calls a timer that is overdue when it is added once for every timer added
            # with or after it, and each call takes a period from the future: silence after a burst.
            for timer in node.timers:
                timer.reset()
            while not stop.is_set() and not status:
                _spin_once(executor, node)
                status = getattr(node, "exit_status", 0)
    except Exception:
        if status <= 1:
            raise
        traceback.print_exc()  # a node that cannot be taken down must not hide why the process ends
    if status > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what is left on a lost GPU may abort the interpreter at its end, or hold it up
    return status


def _spin_once(executor: Executor, node: LifecycleNode) -> None:
    """One callback; what it raises is logged, as a robot must not lose its node to one bad message."""
    try:
        executor.spin_once(timeout_sec=0.1)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        node.get_logger().error(f"callback failed: {text}", throttle_duration_sec=LOG_PERIOD)


def _start(node: LifecycleNode) -> bool:
    succeeded = TransitionCallbackReturn.SUCCESS
    return node.trigger_configure() == succeeded and node.trigger_activate() == succeeded
