"""Starts the nodes of `flashrt_ros.bringup` where `ros2 launch` is not installed.

    python -m flashrt_ros.runner pi05 checkpoint:=DIR robot:=NAME
    python -m flashrt_ros.runner pi0 checkpoint:=DIR robot:=aloha namespace:=left
    python -m flashrt_ros.runner demo checkpoint:=DIR
    python -m flashrt_ros.runner pi05 --show-args

Ends with 0 after Ctrl-C, SIGTERM or SIGHUP, with the exit status of the required node that ended, or with 2
on bad arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from flashrt_ros import bringup
from flashrt_ros.bringup import BringupError, NodeSpec

NODE_LISTS: dict[str, Callable[[Mapping[str, str]], list[NodeSpec]]] = {
    "pi05": bringup.pi05_nodes,
    "pi0": bringup.pi0_nodes,
    "pi0fast": bringup.pi0fast_nodes,
    "demo": bringup.demo_nodes,
}

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def node_command(spec: NodeSpec, prefixes: Sequence[str] | None = None) -> list[str]:
    """The command line of one node, as `ros2 launch` would build it.

    prefixes: where to look for lib/PACKAGE/EXECUTABLE; default AMENT_PREFIX_PATH. Raises BringupError.
    """
    if prefixes is None:
        prefixes = [prefix for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    candidates = [os.path.join(prefix, "lib", spec.package, spec.executable) for prefix in prefixes]
    executable = next((path for path in candidates if os.access(path, os.X_OK)), None)
    if executable is None:
        raise BringupError(
            f"executable '{spec.executable}' of package '{spec.package}' not found in AMENT_PREFIX_PATH: "
            f"build the workspace (`make setup`) and source its setup script (scripts/env.sh)"
        )
    command = [executable, *spec.arguments, "--ros-args", "-r", f"__node:={spec.name}"]
    if spec.namespace:
        command += ["-r", f"__ns:=/{spec.namespace.strip('/')}"]
    for source, target in spec.remappings:
        command += ["-r", f"{source}:={target}"]
    for path in spec.parameter_files:
        command += ["--params-file", path]
    for name, value in spec.parameters.items():
        command += ["-p", f"{name}:={_parameter_text(value)}"]
    return [*command, "--log-level", spec.log_level]


class Runner:
    """Runs the processes of a node list together.

    Call start() from a thread that lives until stop(): on Linux the nodes get SIGINT when it ends.
    on_line(node name, line) receives every line of output, from one reader thread per node; what it raises is
    dropped; the default prints "[name] line". The end of a required node shows in poll(); stop() then ends
    the others. A node with `respawn` is started again by poll() and wait(), RESPAWN_LIMIT times, and is
    like any other after that.
    grace: seconds from SIGINT to SIGTERM, and again from SIGTERM to SIGKILL.
    """

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        *,
        on_line: Callable[[str, str], None] | None = None,
        env: Mapping[str, str] | None = None,
        grace: float = 5.0,
    ) -> None:
        self._nodes = list(nodes)
        self._on_line = on_line or _print_line
        self._env = dict(os.environ if env is None else env)
        self._grace = grace
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        self._commands: dict[str, list[str]] = {}
        self._ended: dict[str, float] = {}  # when a node that is to be started again was found ended
        self._respawns: Counter[str] = Counter()
        names = [_full_name(spec) for spec in self._nodes]
        if len(set(names)) != len(names):
            raise BringupError(f"node names must differ, got {', '.join(names)}")

    def start(self) -> None:
        """Start every node; raises BringupError when an executable is missing, with nothing left running."""
        prefixes = [prefix for prefix in self._env.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
        commands = [node_command(spec, prefixes) for spec in self._nodes]
        try:
            for spec, command in zip(self._nodes, commands, strict=True):
                self._commands[_full_name(spec)] = command
                self._start_one(spec, command)
        except BaseException:
            self.stop()
            raise

    def poll(self) -> int | None:
        """None while every required node runs; else the exit status of the first one found ended.

        Nodes that will be respawned count as running, and are started again when it is time.
        """
        for spec in self._nodes:
            process = self._processes.get(_full_name(spec))
            if process is None or process.poll() is None:
                continue
            if spec.respawn and self._respawns[_full_name(spec)] < bringup.RESPAWN_LIMIT:
                self._respawn(spec, process.returncode)
            elif spec.required:
                return process.returncode
        return None

    def _respawn(self, spec: NodeSpec, status: int) -> None:
        name, now = _full_name(spec), time.monotonic()
        if name not in self._ended:
            self._ended[name] = now
            with contextlib.suppress(Exception):
                again = f"in {bringup.RESPAWN_DELAY:g} s it is started again"
                self._on_line(name, f"ended with status {_exit_status(status)}: {again}")
        elif now - self._ended[name] >= bringup.RESPAWN_DELAY:
            del self._ended[name]
            self._respawns[name] += 1
            self._start_one(spec, self._commands[name])

    def wait(self, timeout: float | None = None) -> int | None:
        """Block until a required node ends (its exit status) or until timeout seconds passed (None)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(0.05)
        return status

    def stop(self) -> dict[str, int]:
        """SIGINT to all, after `grace` SIGTERM, after `grace` again SIGKILL. Exit status by node name.

        Nodes stop together and no process is left, whatever state they were in.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            running = [process for process in self._processes.values() if process.poll() is None]
            for process in running:
                _signal_group(process, number)
            deadline = time.monotonic() + self._grace
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                time.sleep(0.02)
        for process in self._processes.values():
            process.wait()
        for reader in self._readers:
            reader.join(timeout=1.0)
        return {name: process.returncode for name, process in self._processes.items()}

    def process_ids(self) -> dict[str, int]:
        """Process id by node name."""
        return {name: process.pid for name, process in self._processes.items()}

    def __enter__(self) -> Runner:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _start_one(self, spec: NodeSpec, command: list[str]) -> None:
        # A session of its own: Ctrl-C on the terminal reaches the nodes once, from stop(), and not twice.
        process = subprocess.Popen(
            command,
            env={**self._env, **spec.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        name = _full_name(spec)
        self._processes[name] = process
        reader = threading.Thread(
            target=self._read, args=(name, process), name=f"output of {name}", daemon=True
        )
        reader.start()
        self._readers.append(reader)

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            # Whatever becomes of the line (stdout is a pipe that was closed), the node must not block on a
            # full pipe of its own.
            with contextlib.suppress(Exception):
                self._on_line(name, line.rstrip("\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: python -m flashrt_ros.runner {{{','.join(NODE_LISTS)}}} [name:=value ...] [--show-args]"
    if not arguments or arguments[0] not in NODE_LISTS:
        print(usage, file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    name, rest = arguments[0], arguments[1:]
    if "--show-args" in rest:
        for argument in bringup.ARGUMENTS[name]:
            print(f"{argument.name}:={argument.default!r}  {argument.description}")
        return 0
    try:
        return _run(Runner(NODE_LISTS[name](parse_arguments(rest))))
    except BringupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(texts: Sequence[str]) -> dict[str, str]:
    """["name:=value", …] → {name: value}. Raises BringupError on anything else."""
    given: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition(":=")
        if not separator or not name:
            raise BringupError(f"malformed launch argument '{text}': expected name:=value")
        given[name] = value
    return given


def _run(runner: Runner) -> int:
    asked_to_stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        asked_to_stop.set()

    # SIGHUP: the terminal was closed.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, on_signal) for number in numbers}
    status: int | None = None
    try:
        runner.start()
        while status is None and not asked_to_stop.is_set():
            status = runner.wait(timeout=0.2)
    finally:
        ended = runner.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if status is None:
        # Stopped on request: a node that did not end cleanly is still worth a status of its own.
        return next((_exit_status(code) for code in ended.values() if code), 0)
    return _exit_status(status)


def _exit_status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _full_name(spec: NodeSpec) -> str:
    return f"{spec.namespace.strip('/')}/{spec.name}" if spec.namespace.strip("/") else spec.name


def _parameter_text(value: bool | int | float | str) -> str:
    """A value as YAML, in which a text must never be read as a number or a bool."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    return repr(value)


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended between poll() and here
        os.killpg(process.pid, number)


def _end_with_parent() -> Callable[[], None] | None:
    """What a child calls before its program starts, so that Linux sends it SIGINT when this process dies.

    SIGINT is not ignored from there on, as it is by what a shell starts in the background. Linux means the
    thread that starts the child: it must live as long as the children are to. None elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Resolved before the fork: the child of a process with threads should do as little as possible.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
        if os.getppid() != parent:  # it died before the request
            os.kill(os.getpid(), signal.SIGINT)

    return ask


def _print_line(name: str, line: str) -> None:
    print(f"[{name}] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
