"""Fixtures of the ROS tests. They need the sourced workspace (scripts/env.sh) and run against install/."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.ros)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without ROS there is nothing to import here: the whole folder is left out, with one line."""
    if HERE in collection_path.parents and collection_path.name.startswith("test_") and not _has_ros():
        print(f"{collection_path.name} left out: rclpy or flashrt_ros.msg missing, source scripts/env.sh")
        return True
    return None


def _has_ros() -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in ("rclpy", "flashrt_ros.msg"))
    except ModuleNotFoundError:
        return False


@pytest.fixture
def rig() -> Iterator[Any]:
    """A ROS domain of its own; every process started in it has ended afterwards."""
    from ros_rig import Rig

    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Pi0.5 checkpoint for the demo arm."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "pi05")


def make_checkpoint(path: Path, *arguments: str) -> Path:
    """`flashrt make-checkpoint` for the demo arm."""
    command = ["flashrt", "make-checkpoint", "--size", "tiny", "--preset", "demo_arm", "--out", str(path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def checkpoint_maker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint_maker("--policy", "pi0") -> directory."""
    return lambda *arguments: make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "made", *arguments)


@pytest.fixture
def policy_node(rig: Any, checkpoint: Path) -> Callable[..., Any]:
    """policy_node(prompt=…, …) starts the node's executable with these parameters; autostart by default."""
    from flashrt_ros.bringup import PACKAGE, NodeSpec, node_environment
    from flashrt_ros.runner import node_command

    def start(namespace: str = "", command: list[str] | None = None, **parameters: Any) -> Any:
        values = {"checkpoint": str(checkpoint), "robot": "demo_arm", "prompt": "wave", "autostart": True}
        spec = NodeSpec(PACKAGE, "policy_node", "policy_node", namespace, parameters={**values, **parameters})
        words = node_command(spec)
        if command is not None:
            words[:1] = command
        return rig.start(words, node_environment())

    return start


@pytest.fixture
def demo_robot(rig: Any) -> Callable[..., Any]:
    """demo_robot({"base_camera.drop": 1.0}) starts the simulated robot; small images keep it cheap."""
    from flashrt_ros.bringup import PACKAGE, NodeSpec, node_environment
    from flashrt_ros.runner import node_command

    def start(parameters: dict[str, Any] | None = None, namespace: str = "") -> Any:
        cameras, sides = ("base_camera", "wrist_camera"), ("width", "height")
        values = {f"{camera}.{side}": 96 for camera in cameras for side in sides} | (parameters or {})
        spec = NodeSpec(PACKAGE, "demo_robot_node", "demo_robot", namespace, parameters=values)
        return rig.start(node_command(spec), node_environment())

    return start


@pytest.fixture
def driver() -> Iterator[Any]:
    """A pipeline of the demo arm that is fed by a thread, without transport."""
    from pipeline_driver import Driver

    made = Driver()
    yield made
    made.close()
