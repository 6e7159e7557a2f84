"""Starts the demo's nodes: with `ros2 launch` where it is installed, else with `flashrt_ros.runner`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from flashrt_ros import bringup
from flashrt_ros.runner import Runner

OnLine = Callable[[str, str], None]


class Processes(Protocol):
    """Running nodes: start(), then poll() until it is not None, then stop()."""

    def start(self) -> None: ...

    def poll(self) -> int | None: ...

    def stop(self) -> dict[str, int]: ...


def demo_processes(arguments: Mapping[str, str], on_line: OnLine, grace: float) -> Processes:
    """The nodes of demo.launch.py with launch `arguments`, not yet started.

    on_line(node, line) receives their output; grace as in `flashrt_ros.runner.Runner`. Raises BringupError.
    """
    nodes = bringup.demo_nodes(arguments)
    if ros2_launch() is None:
        return Runner(nodes, on_line=on_line, grace=grace)
    return LaunchedDemo(arguments, on_line, grace)


def robot_process(on_line: OnLine, grace: float) -> Processes:
    """The simulated robot alone, from the same node list, not yet started. Raises BringupError."""
    nodes = bringup.demo_nodes({"checkpoint": os.curdir})  # the policy node it is for is left out
    return Runner([node for node in nodes if node.name == "demo_robot"], on_line=on_line, grace=grace)


def ros2_launch() -> str | None:
    """Path of the `ros2` command where `ros2 launch` can run; None elsewhere."""
    installed = all(importlib.util.find_spec(module) for module in ("launch", "launch_ros", "ros2launch"))
    return shutil.which("ros2") if installed else None


class LaunchedDemo:
    """`ros2 launch flashrt_ros demo.launch.py` with the interface of `flashrt_ros.runner.Runner`."""

    def __init__(self, arguments: Mapping[str, str], on_line: OnLine, grace: float) -> None:
        values = [f"{name}:={value}" for name, value in arguments.items() if value]
        self._command = ["ros2", "launch", bringup.PACKAGE, "demo.launch.py", *values]
        self._on_line, self._grace = on_line, grace
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start the launch process, apart from the terminal, so that Ctrl-C reaches it from stop() only."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="output of ros2 launch", daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """None while the launch runs; it ends when a node ends, which is never a success here."""
        if self._process is None or self._process.poll() is None:
            return None
        return self._process.returncode or 1

    def stop(self) -> dict[str, int]:
        """SIGINT to the launch process (SIGTERM would orphan its nodes), in the end SIGKILL to its group."""
        if self._process is None:
            return {}
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 2 * self._grace
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        if self._reader is not None:
            self._reader.join(timeout=1.0)
        return {"ros2 launch": code}

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._on_line("ros2 launch", line.rstrip("\n"))
