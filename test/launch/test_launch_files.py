"""Every launch file, read by real launch tooling: nodes, parameters, remappings, namespaces, environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "config" / "robots").glob("*.yaml"))
REAL = sorted(path.stem for path in (ROOT / "config" / "robots" / "parameters").glob("*.yaml"))
LAUNCH_FILES = sorted(path.name for path in (ROOT / "launch").glob("*.launch.py"))


def test_every_launch_file_is_known_here() -> None:
    expected = [f"{name}.launch.py" for name in ("demo", "pi0", "pi05", "pi0fast")]
    assert expected == LAUNCH_FILES


def test_pi05_starts_the_policy_node_alone(resolve, checkpoint: Path) -> None:
    found = resolve("pi05.launch.py", checkpoint=str(checkpoint))
    assert found.status == 0, found.output
    assert list(found.nodes) == ["/policy_node"]
    node = found.nodes["/policy_node"]
    assert (node.package, node.executable, node.namespace) == ("flashrt_ros", "policy_node", "")
    expected = {
        "checkpoint": str(checkpoint),
        "robot": "demo_arm",
        "autostart": True,
        "use_sim_time": False,
    }
    assert expected.items() <= node.parameters.items()
    assert node.remappings == []
    assert node.log_level == "info"


def test_pi05_passes_every_argument_on(resolve, checkpoint: Path) -> None:
    found = resolve(
        "pi05.launch.py",
        checkpoint=str(checkpoint),
        robot="my_robot.yaml",
        prompt="put the cup on the plate",
        precision="bf16",
        namespace="left",
        log_level="debug",
        use_sim_time="true",
    )
    assert list(found.nodes) == ["/left/policy_node"]
    node = found.nodes["/left/policy_node"]
    expected = {
        "robot": "my_robot.yaml",
        "prompt": "put the cup on the plate",
        "precision": "bf16",
        "use_sim_time": True,
    }
    assert expected.items() <= node.parameters.items()
    assert (node.namespace, node.log_level) == ("/left", "debug")


@pytest.mark.parametrize("file", ["pi0.launch.py", "pi05.launch.py"])
@pytest.mark.parametrize("robot", SHIPPED)
def test_every_shipped_robot_is_launched_with_its_own_parameters(
    resolve, checkpoint: Path, file: str, robot: str
) -> None:
    found = resolve(file, checkpoint=str(checkpoint), robot=robot, namespace=f"{robot}_1")
    assert found.status == 0, found.output
    assert list(found.nodes) == [f"/{robot}_1/policy_node"]
    parameters = found.nodes[f"/{robot}_1/policy_node"].parameters
    assert parameters["robot"] == robot
    assert parameters["dry_run"] is (robot in REAL)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_launch_argument_wins_over_the_robots_dry_run(resolve, checkpoint: Path, dry_run: bool) -> None:
    given = {"robot": "ur5e", "dry_run": str(dry_run).lower(), "autostart": "false"}
    found = resolve("pi05.launch.py", checkpoint=str(checkpoint), **given)
    parameters = found.nodes["/policy_node"].parameters
    assert parameters["dry_run"] is dry_run
    assert parameters["autostart"] is False


def test_pi0fast_is_the_same_node_with_another_policy(resolve, checkpoint: Path) -> None:
    given = {"checkpoint": str(checkpoint), "prompt": "go"}
    found = [resolve(f"{name}.launch.py", **given) for name in ("pi05", "pi0fast", "pi0")]
    for each in found:
        assert each.status == 0, each.output
    pi05, fast, pi0 = (each.nodes["/policy_node"] for each in found)
    assert fast.parameters == pi05.parameters | {"config": "pi0fast"}
    assert pi0.parameters == pi05.parameters | {"config": "pi0"}
    assert fast.package == pi05.package


@pytest.mark.parametrize("namespace", ["", "arm_1"])
def test_demo_starts_robot_and_policy_side_by_side(resolve, checkpoint: Path, namespace: str) -> None:
    found = resolve("demo.launch.py", checkpoint=str(checkpoint), namespace=namespace)
    prefix = f"/{namespace}" if namespace else ""
    assert set(found.nodes) == {f"{prefix}/demo_robot", f"{prefix}/policy_node"}
    assert found.nodes[f"{prefix}/demo_robot"].executable == "demo_robot_node"
    policy = found.nodes[f"{prefix}/policy_node"]
    assert policy.executable == "policy_node"
    assert policy.parameters["prompt"] == "pick up the red block"
    assert policy.parameters["seed"] == 7
    assert all(node.namespace == prefix and not node.remappings for node in found.nodes.values())


@pytest.mark.parametrize("file", LAUNCH_FILES)
def test_camera_images_get_the_environment_they_need(resolve, checkpoint: Path, file: str) -> None:
    found = resolve(file, checkpoint=str(checkpoint))
    assert found.nodes
    for node in found.nodes.values():
        assert Path(node.env["FASTRTPS_DEFAULT_PROFILES_FILE"]).read_text().count("<type>SHM</type>") == 1
        assert int(node.env["MALLOC_MMAP_THRESHOLD_"]) > 640 * 480 * 3


@pytest.mark.parametrize("file", LAUNCH_FILES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no checkpoint given: pass checkpoint:=DIR"),
        ({"checkpoint": "/does/not/exist"}, "checkpoint:=/does/not/exist: no such directory"),
        ({"checkpoint": "{checkpoint}", "precision": "int3"}, "precision:=int3: expected one of"),
    ],
)
def test_bad_arguments_end_the_launch(resolve, checkpoint: Path, file: str, arguments, message: str) -> None:
    found = resolve(file, **{name: value.format(checkpoint=checkpoint) for name, value in arguments.items()})
    assert found.status != 0
    assert found.nodes == {}
    assert [line for line in found.output.splitlines() if message in line], found.output


def test_the_real_launch_is_meant() -> None:
    """This repository brings no module that could pass for `launch` or `launch_ros`."""
    for name in ("launch", "launch_ros"):
        assert not list(ROOT.glob(f"**/{name}/__init__.py")) or name in _installed_outside()
        assert not (ROOT / f"{name}.py").exists()
    for file in LAUNCH_FILES:
        text = (ROOT / "launch" / file).read_text()
        assert "from launch import LaunchDescription" in text
        assert "sys.modules" not in text
        assert "sys.path" not in text


def _installed_outside() -> set[str]:
    specs = {name: importlib.util.find_spec(name) for name in ("launch", "launch_ros")}
    return {name for name, spec in specs.items() if spec is not None and spec.origin is not None}
