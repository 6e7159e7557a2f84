"""The runner: real processes, but of recording executables (see conftest.py), so that no ROS is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt_ros import bringup, runner
from flashrt_ros.bringup import BringupError, NodeSpec, demo_nodes, pi05_nodes
from flashrt_ros.runner import Runner, node_command, parse_arguments

from .conftest import read_records


def wait_until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


def executable(prefix: Path, name: str, text: str) -> NodeSpec:
    """A node whose program is this shell script."""
    path = prefix / "lib/flashrt_ros" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return NodeSpec("flashrt_ros", name, name)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_nodes_get_what_the_node_list_says(recorder_prefix: Path, checkpoint: Path, tmp_path: Path) -> None:
    prompt = 'say "yes": 1 \\ 2'
    nodes = demo_nodes({"checkpoint": str(checkpoint), "namespace": "left", "prompt": prompt})
    with Runner(nodes, on_line=lambda *_: None) as started:
        wait_until(lambda: len(list((tmp_path / "records").glob("*.json"))) == 2)
        found = read_records(tmp_path / "records")
        statuses = started.stop()
    assert set(found) == {"/left/demo_robot", "/left/policy_node"}
    policy = found["/left/policy_node"]
    assert policy.parameters["prompt"] == prompt
    assert policy.parameters["checkpoint"] == str(checkpoint)
    assert policy.parameters["autostart"] is True
    assert policy.parameters["num_steps"] == 0  # of the parameter file
    assert policy.parameters["seed"] == 7  # the demo's own
    assert policy.env["FASTRTPS_DEFAULT_PROFILES_FILE"].endswith("fastdds_images.xml")
    assert statuses == {"left/demo_robot": 0, "left/policy_node": 0}


@pytest.mark.parametrize("text", ["1.5", "true", "null", "", "a: b", "ends with \\", "tab\there", "ümlaut"])
def test_texts_stay_texts(recorder_prefix: Path, checkpoint: Path, text: str) -> None:
    import yaml

    spec = NodeSpec("flashrt_ros", "policy_node", "policy_node", parameters={"prompt": text})
    command = node_command(spec)
    name, _, value = command[command.index("-p") + 1].partition(":=")
    assert (name, yaml.safe_load(value)) == ("prompt", text)


def test_output_carries_the_nodes_name(recorder_prefix: Path) -> None:
    lines: list[tuple[str, str]] = []
    spec = executable(recorder_prefix, "talker", "echo hello; echo problem >&2; exec sleep 60")
    with Runner([spec], on_line=lambda name, line: lines.append((name, line))):
        wait_until(lambda: len(lines) == 2)
    assert sorted(lines) == [("talker", "hello"), ("talker", "problem")]


def test_the_end_of_a_required_node_is_reported(recorder_prefix: Path) -> None:
    failing = executable(recorder_prefix, "failing", "exit 3")
    lasting = executable(recorder_prefix, "lasting", "exec sleep 60")
    with Runner([lasting, failing]) as started:
        assert started.wait(timeout=10.0) == 3
        pid = started.process_ids()["lasting"]
    assert not alive(pid)


def test_a_node_to_be_respawned_is_started_again(
    recorder_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashrt_ros.bringup.RESPAWN_DELAY", 0.2)
    lines: list[str] = []
    lasting = replace(executable(recorder_prefix, "lasting", "echo up; exec sleep 60"), respawn=True)
    with Runner([lasting], on_line=lambda _, line: lines.append(line)) as started:
        first = started.process_ids()["lasting"]
        wait_until(lambda: lines == ["up"])
        os.kill(first, signal.SIGKILL)
        killed = time.monotonic()
        while started.process_ids()["lasting"] == first:
            assert started.wait(timeout=0.02) is None
            assert time.monotonic() < killed + 10.0
        assert time.monotonic() - killed >= 0.2
        wait_until(lambda: lines == ["up", "ended with status 137: in 0.2 s it is started again", "up"])
        second = started.process_ids()["lasting"]
        assert started.stop() == {"lasting": -signal.SIGINT}
        time.sleep(0.3)
        assert not alive(second)
    assert lines.count("up") == 2


def test_nodes_of_a_runner_in_the_background_end_by_sigint(recorder_prefix: Path) -> None:
    """What a shell starts with `&` ignores SIGINT, and would hand that on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        lasting = executable(recorder_prefix, "lasting", "exec sleep 60")
        with Runner([lasting], on_line=lambda *_: None) as started:
            assert started.stop() == {"lasting": -signal.SIGINT}
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_last_end_of_a_node_that_was_respawned_is_that_of_all(
    recorder_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a fault that comes back would move the robot time and again, with nobody there."""
    monkeypatch.setattr("flashrt_ros.bringup.RESPAWN_DELAY", 0.05)
    lines: list[str] = []
    failing = replace(executable(recorder_prefix, "failing", "echo up; exit 75"), respawn=True)
    steady = executable(recorder_prefix, "steady", "exec sleep 60")
    with Runner([failing, steady], on_line=lambda _, line: lines.append(line)) as started:
        assert started.wait(timeout=10.0) == os.EX_TEMPFAIL
        assert started.stop() == {"failing": os.EX_TEMPFAIL, "steady": -signal.SIGINT}
    assert lines.count("up") == 1 + bringup.RESPAWN_LIMIT


def test_a_node_that_ignores_signals_is_killed(recorder_prefix: Path) -> None:
    program = "trap '' INT TERM; echo up; while :; do sleep 0.1; done"
    stubborn = executable(recorder_prefix, "stubborn", program)
    lines: list[str] = []
    started = Runner([stubborn], on_line=lambda _, line: lines.append(line), grace=0.2)
    started.start()
    wait_until(lambda: lines == ["up"])
    begin = time.monotonic()
    assert started.stop() == {"stubborn": -signal.SIGKILL}
    assert time.monotonic() - begin < 2.0


def test_nothing_is_left_when_one_cannot_be_started(recorder_prefix: Path) -> None:
    lasting = executable(recorder_prefix, "lasting", "exec sleep 60")
    missing = NodeSpec("flashrt_ros", "not_built", "not_built")
    started = Runner([lasting, missing])
    with pytest.raises(BringupError, match=r"'not_built' of package 'flashrt_ros' not found.*make setup"):
        started.start()
    assert started.process_ids() == {}


def test_two_nodes_of_one_name_are_refused(checkpoint: Path) -> None:
    node = pi05_nodes({"checkpoint": str(checkpoint)})[0]
    with pytest.raises(BringupError, match=r"node names must differ"):
        Runner([node, node])


@pytest.mark.parametrize("text", ["checkpoint=x", ":=x", "checkpoint"])
def test_malformed_arguments_are_refused(text: str) -> None:
    with pytest.raises(BringupError, match=r"expected name:=value"):
        parse_arguments([text])


def test_values_may_hold_anything() -> None:
    assert parse_arguments(["prompt:=a:=b c", "robot:="]) == {"prompt": "a:=b c", "robot": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pi05"], "error: no checkpoint given"),
        (["demo"], "error: no checkpoint given"),
        (["pi05", "checkpoint:=/does/not/exist"], "error: checkpoint:=/does/not/exist: no such directory"),
        (["pi06"], "usage: python -m flashrt_ros.runner {pi05,pi0,pi0fast,demo}"),
        ([], "usage: python -m flashrt_ros.runner {pi05,pi0,pi0fast,demo}"),
    ],
)
def test_command_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_line_ends_with_its_nodes(recorder_prefix: Path, checkpoint: Path, number: int) -> None:
    command = [sys.executable, "-P", "-m", "flashrt_ros.runner", "demo", f"checkpoint:={checkpoint}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[demo_robot] recorded\n", "[policy_node] recorded\n"]
    process.send_signal(number)
    assert process.wait(timeout=5) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of the end")
def test_no_node_outlives_a_runner_that_is_killed(
    recorder_prefix: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-m", "flashrt_ros.runner", "demo", f"checkpoint:={checkpoint}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "records"
    wait_until(lambda: len(list(records.glob("*.json"))) == 2)
    nodes = [int(path.stem) for path in records.glob("*.json")]
    assert all(running(pid) for pid in nodes)
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not any(running(pid) for pid in nodes), timeout=5.0)
    finally:
        for pid in filter(running, nodes):
            os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    """Alive, and not only waiting for somebody to ask how it ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_lines_that_cannot_be_shown_hold_up_no_node(recorder_prefix: Path) -> None:
    """More output than a pipe holds: without a reader the node would block in the middle of it."""

    def fail(_name: str, _line: str) -> None:
        raise BrokenPipeError

    many = executable(recorder_prefix, "talker", "seq 200000; exit 4")
    with Runner([many], on_line=fail) as started:
        assert started.wait(timeout=10.0) == 4


def test_command_line_takes_over_a_nodes_exit_status(recorder_prefix: Path, checkpoint: Path) -> None:
    executable(recorder_prefix, "policy_node", "echo cannot configure; exit 1")
    command = [sys.executable, "-P", "-m", "flashrt_ros.runner", "demo", f"checkpoint:={checkpoint}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "[policy_node] cannot configure" in done.stdout.splitlines()
