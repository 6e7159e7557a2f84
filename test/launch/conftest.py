"""Fixtures of the launch tests: launch files resolved by the real `launch`, or else by `play_launch`.

With the real `launch`, nodes are started for real, but from a prefix whose executables only write down their
command line and environment; the runner is tested in the same way.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXECUTABLES = ("policy_node", "demo_robot_node")
UNAVAILABLE = 77  # exit status of the set-up script where something it needs is missing

RECORDER = """#!/usr/bin/env python3
import json, os, signal, sys, time
record = {"argv": sys.argv, "env": dict(os.environ)}
path = os.path.join(os.environ["RECORD_DIR"], f"{os.getpid()}.json")
with open(path + ".part", "w") as file:
    json.dump(record, file)
os.rename(path + ".part", path)
print("recorded", flush=True)
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
while True:
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class ResolvedNode:
    """What one node of a launch file would be started with."""

    package: str
    executable: str
    namespace: str
    parameters: dict[str, Any]
    remappings: list[tuple[str, str]]
    env: dict[str, str]
    log_level: str


@dataclass(frozen=True)
class Resolution:
    """nodes by full name; on failure none, with a status above 0 and what was printed."""

    status: int
    output: str
    nodes: dict[str, ResolvedNode]


Resolve = Callable[..., Resolution]


def has_real_launch() -> bool:
    """Whether `launch` and `launch_ros` are installed; our directory launch/ is not a package."""
    specs = [importlib.util.find_spec(name) for name in ("launch", "launch_ros", "ros2launch")]
    return all(spec is not None and spec.origin is not None for spec in specs)


@pytest.fixture(autouse=True)
def without_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Fast DDS profile of the user's own would rightly be left alone; these tests look at ours."""
    for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory; launch files check that it exists, its content is the node's business."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    return path


@pytest.fixture
def recorder_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First prefix of AMENT_PREFIX_PATH: this package with recording executables."""
    prefix = tmp_path / "prefix"
    library = prefix / "lib" / "flashrt_ros"
    library.mkdir(parents=True)
    for name in EXECUTABLES:
        (library / name).write_text(RECORDER)
        (library / name).chmod(0o755)
    share = prefix / "share"
    (share / "flashrt_ros").mkdir(parents=True)
    (share / "ament_index/resource_index/packages").mkdir(parents=True)
    (share / "ament_index/resource_index/packages/flashrt_ros").touch()
    for name in ("launch", "config", "package.xml"):
        (share / "flashrt_ros" / name).symlink_to(ROOT / name)
    records = tmp_path / "records"
    records.mkdir()
    monkeypatch.setenv("RECORD_DIR", str(records))
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{prefix}:{os.environ.get('AMENT_PREFIX_PATH', '')}")
    return prefix


def read_records(records: Path) -> dict[str, ResolvedNode]:
    """What the recording executables were started with."""
    found = [json.loads(path.read_text()) for path in records.glob("*.json")]
    return dict(node_from_command(record["argv"], record["env"]) for record in found)


def node_from_command(argv: list[str], env: dict[str, str]) -> tuple[str, ResolvedNode]:
    """Full name and content of a node's command line, as rcl would read it."""
    parameters: dict[str, Any] = {}
    remappings: dict[str, str] = {}
    log_level = ""
    ros_arguments = argv[argv.index("--ros-args") + 1 :]
    for flag, value in itertools.pairwise(ros_arguments):
        if flag == "-r":
            source, _, target = value.partition(":=")
            remappings[source] = target
        elif flag == "-p":
            name, _, text = value.partition(":=")
            parameters[name] = yaml.safe_load(text)
        elif flag == "--params-file":
            for section in yaml.safe_load(Path(value).read_text()).values():
                parameters.update(section["ros__parameters"])
        elif flag == "--log-level":
            log_level = value
    name, namespace = remappings.pop("__node"), remappings.pop("__ns", "").rstrip("/")
    executable = Path(argv[0])
    package, pairs = executable.parent.name, list(remappings.items())
    node = ResolvedNode(package, executable.name, namespace, parameters, pairs, env, log_level)
    return f"{namespace}/{name}", node


@pytest.fixture(scope="session")
def play_launch() -> str:
    """The wrapper that scripts/setup_play_launch.sh makes; skips with its reason where it cannot."""
    folder = ROOT / "build" / "play_launch"
    script = ROOT / "scripts" / "setup_play_launch.sh"
    done = subprocess.run([str(script), str(folder)], capture_output=True, text=True, timeout=280)
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return str(folder / "play_launch")


@pytest.fixture
def resolve(request: pytest.FixtureRequest, tmp_path: Path) -> Resolve:
    """resolve("pi05.launch.py", checkpoint=…) -> Resolution."""
    if has_real_launch():
        request.getfixturevalue("recorder_prefix")
        return lambda file, **arguments: _with_launch(file, arguments, tmp_path / "records")
    program = request.getfixturevalue("play_launch")
    return lambda file, **arguments: _with_play_launch(program, file, arguments, tmp_path)


def _with_launch(file: str, arguments: dict[str, str], records: Path) -> Resolution:
    command = ["ros2", "launch", "flashrt_ros", file, *_texts(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expected = 2 if file == "demo.launch.py" else 1
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if len(list(records.glob("*.json"))) == expected:
            break
    nodes = read_records(records)
    if nodes:
        process.send_signal(2)
    lines += process.stdout.readlines()
    return Resolution(process.wait(timeout=30), "".join(lines), nodes)


def _with_play_launch(program: str, file: str, arguments: dict[str, str], folder: Path) -> Resolution:
    model = folder / "model.yaml"
    command = [program, "resolve", "flashrt_ros", file, "-o", str(model), *_texts(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return Resolution(done.returncode, done.stderr, {})
    found = yaml.safe_load(model.read_text())["structure"]["nodes"]
    return Resolution(0, done.stderr, {name: _node_from_model(name, node) for name, node in found.items()})


def _node_from_model(full_name: str, node: dict[str, Any]) -> ResolvedNode:
    arguments = node.get("ros_args", [])
    parameters: dict[str, Any] = {}
    for text in node.get("params_files", []):
        for section in yaml.safe_load(text).values():
            parameters.update(section["ros__parameters"])
    return ResolvedNode(
        package=node["pkg"],
        executable=node["exec"],
        namespace=full_name.rpartition("/")[0],
        parameters=parameters | node.get("params", {}),
        remappings=[(pair["from"], pair["to"]) for pair in node.get("remaps", [])],
        env={pair["name"]: pair["value"] for pair in node.get("env", [])},
        log_level=arguments[arguments.index("--log-level") + 1] if "--log-level" in arguments else "",
    )


def _texts(arguments: dict[str, str]) -> list[str]:
    return [f"{name}:={value}" for name, value in arguments.items()]
