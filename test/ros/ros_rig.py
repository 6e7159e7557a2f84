"""Real ROS 2 processes under test: started in a domain of their own, watched, ended, never left behind."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile

# Domains 1..99 keep their ports below those that Linux hands out.
DOMAINS = range(40, 100)


class DomainLock:
    """A ROS_DOMAIN_ID that no other test of this machine uses at the moment."""

    def __init__(self) -> None:
        for number in DOMAINS:
            path = Path(tempfile.gettempdir()) / f"flashrt_ros_domain_{number}.lock"
            self._file: IO[str] = path.open("w")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                continue
            self.number = number
            return
        raise RuntimeError(f"no free ROS domain in {DOMAINS.start}..{DOMAINS.stop - 1}")

    def release(self) -> None:
        self._file.close()


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true value of `condition`, asked every 20 ms; fails with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)
    return value


class RosProcess:
    """A process with its output collected line by line."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for_line(self, text: str, timeout: float = 30.0) -> str:
        """The first line that contains `text`; fails when the process ends without it."""

        def found() -> str | None:
            line = next((line for line in list(self.lines) if text in line), None)
            if line is None and not self.running:
                self._reader.join(timeout=2.0)
                line = next((line for line in list(self.lines) if text in line), None)
                assert line is not None, f"ended without '{text}':\n{self.output}"
            return line

        return str(wait_until(found, timeout, f"line '{text}' in:\n{self.output}"))

    def wait(self, timeout: float = 30.0) -> int:
        """Exit status; fails with the output when the process goes on."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.output}") from error
        self._reader.join(timeout=2.0)
        return status

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, number: int = signal.SIGINT, timeout: float = 10.0) -> int:
        """Ask it to end and wait; exit status."""
        if self.running:
            self.send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """Whatever is left of it and of its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=2.0)


class Collector:
    """Messages of one topic, each with its receipt time [s, monotonic]."""

    def __init__(
        self, node: Node, message_type: type, topic: str, qos: QoSProfile | int, check: Callable[[], None]
    ) -> None:
        """`check` fails when the messages cannot come any more."""
        self._entries: list[tuple[float, Any]] = []
        self._topic, self._check = topic, check
        node.create_subscription(message_type, topic, self._add, qos)

    def _add(self, message: Any) -> None:
        self._entries.append((time.monotonic(), message))

    @property
    def entries(self) -> list[tuple[float, Any]]:
        """(receipt time, message) of each."""
        return list(self._entries)

    @property
    def messages(self) -> list[Any]:
        return [message for _, message in list(self._entries)]

    def forget(self, before: float) -> None:
        """Drop what was received before that [s, monotonic]."""
        while self._entries and self._entries[0][0] < before:
            self._entries.pop(0)

    def since(self, moment: float) -> list[Any]:
        """Messages received after `moment` [s, monotonic]."""
        return [message for received, message in list(self._entries) if received > moment]

    def wait_for(
        self, accept: Callable[[Any], bool] = lambda _: True, timeout: float = 30.0, since: float = 0.0
    ) -> Any:
        """The first message received after `since` that `accept` takes."""

        deadline = time.monotonic() + timeout
        while True:
            message = next((message for message in self.since(since) if accept(message)), None)
            if message is not None:
                return message
            self._check()
            if time.monotonic() > deadline:
                last = self.messages[-1] if self._entries else "nothing"
                raise AssertionError(f"not within {timeout:g} s on {self._topic}; last came: {last}")
            time.sleep(0.02)


class Rig:
    """One ROS domain: processes to start in it, and a node of the test's own that listens and calls."""

    def __init__(self) -> None:
        self._domain = DomainLock()
        self.env = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self._domain.number),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "PYTHONUNBUFFERED": "1",
            "RCUTILS_COLORIZED_OUTPUT": "0",
        }
        self._processes: list[RosProcess] = []
        self._clients: dict[str, Any] = {}
        self._context = Context()
        rclpy.init(context=self._context, domain_id=self._domain.number)
        self.node = rclpy.create_node("test_observer", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="test node")
        self._thread.start()

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> RosProcess:
        """Start a process in this domain."""
        process = RosProcess(command, {**self.env, **(env or {})})
        self._processes.append(process)
        return process

    def forget(self, process: RosProcess) -> None:
        """Kill a process that is no longer wanted; how it ends is nobody's concern."""
        process.kill()
        self._processes.remove(process)

    def collect(self, message_type: type, topic: str, qos: QoSProfile | int = 50) -> Collector:
        """Subscribe and keep every message."""
        return Collector(self.node, message_type, topic, qos, self._check_processes)

    def _still(self, condition: Callable[[], bool]) -> bool:
        """`condition()`, failing at once when a process has died meanwhile."""
        self._check_processes()
        return condition()

    def _check_processes(self) -> None:
        for process in self._processes:
            if not process.running and process.wait() != 0:
                raise AssertionError(f"a process ended with {process.wait()}:\n{process.output}")

    def call(self, service_type: Any, name: str, timeout: float = 30.0, **fields: Any) -> Any:
        """Call a service once it is there; its response."""
        future = self.request(service_type, name, timeout, **fields)
        wait_until(lambda: self._still(future.done), timeout, f"answer of service {name}")
        return future.result()

    def request(self, service_type: Any, name: str, timeout: float = 30.0, **fields: Any) -> Any:
        """Call a service once it is there, without waiting for the answer: the future of its response."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(service_type, name)
        wait_until(lambda: self._still(client.service_is_ready), timeout, f"service {name}")
        return client.call_async(service_type.Request(**fields))

    def close(self) -> None:
        """End everything; fails when a process had to be killed."""
        running = [process for process in self._processes if process.running]
        for process in running:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10.0
        while any(process.running for process in running) and time.monotonic() < deadline:
            time.sleep(0.02)
        stuck = [process for process in running if process.running]
        for process in self._processes:
            process.kill()
        self._stop.set()
        self._thread.join()
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)
        self._domain.release()
        assert not stuck, "did not end after SIGINT:\n" + "\n---\n".join(process.output for process in stuck)


@contextlib.contextmanager
def nodes_here(rig: Rig) -> Iterator[tuple[Context, list[Node]]]:
    """A context in the rig's domain for nodes of this process, and a list: nodes put there are gone at the
    end.

    A life cycle's topic and services go with the node's object only, which configuring has hidden from the
    collector: left behind, they would stand beside those of the next test's node in this domain, and its
    ~/change_state would not be found. So nobody else may hold on to these nodes.
    """
    context, nodes = Context(), []
    rclpy.init(context=context, domain_id=int(rig.env["ROS_DOMAIN_ID"]))
    yield context, nodes
    while nodes:
        nodes.pop().destroy_node()
    gc.unfreeze()
    gc.collect()
    rclpy.shutdown(context=context)

    def left() -> list[str]:
        topics = rig.node.get_topic_names_and_types()
        return [name for name, _ in topics if name.endswith("/transition_event")]

    wait_until(lambda: not left(), 5.0, "no node of this process is left for the next test")
