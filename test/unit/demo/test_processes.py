"""`ros2 launch` is not installed where these tests must run: a script stands in for it."""

import signal
import sys
import time
from pathlib import Path

import pytest

from flashrt_ros.demo.processes import LaunchedDemo, ros2_launch

FAKE = """#!{python}
import signal, sys, time
print("arguments", *sys.argv[1:], flush=True)
{behaviour}
"""
WELL_BEHAVED = """
def end(*_):
    print("ended by SIGINT", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, end)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""
DEAF = """
import os
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print("child", child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    def make(behaviour, grace=1.0):
        script = tmp_path / "ros2"
        script.write_text(FAKE.format(python=sys.executable, behaviour=behaviour))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        lines = []
        arguments = {"checkpoint": "/some/dir", "prompt": "pick up", "precision": ""}
        return LaunchedDemo(arguments, lambda node, line: lines.append(line), grace), lines

    return make


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_passes_arguments_and_ends_on_sigint(launch):
    demo, lines = launch(WELL_BEHAVED)
    demo.start()
    wait_for(lambda: "ready" in lines)
    assert lines[0] == "arguments launch flashrt_ros demo.launch.py checkpoint:=/some/dir prompt:=pick up"
    assert demo.poll() is None
    assert demo.stop() == {"ros2 launch": 0}
    assert lines[-1] == "ended by SIGINT"


def test_a_launch_that_ends_by_itself_is_a_failure(launch):
    demo, _ = launch("sys.exit(0)")
    demo.start()
    wait_for(lambda: demo.poll() is not None)
    assert demo.poll() == 1
    demo.stop()


def test_what_ignores_sigint_is_killed_with_its_children(launch):
    demo, lines = launch(DEAF, grace=0.2)
    demo.start()
    wait_for(lambda: len(lines) == 2)
    child = Path("/proc", lines[1].removeprefix("child "), "stat")
    assert child.exists()
    begin = time.monotonic()
    assert demo.stop() == {"ros2 launch": -signal.SIGKILL}
    assert time.monotonic() - begin < 2.0
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_stop_without_start_is_harmless(launch):
    demo, _ = launch(WELL_BEHAVED)
    assert demo.stop() == {}


def test_ros2_alone_is_not_enough(launch, monkeypatch):
    launch(WELL_BEHAVED)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ros2_launch() is None
