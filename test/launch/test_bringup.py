"""The node list: pure, importable by any Python from 3.10 on, the one truth of launch files and runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flashrt_ros import bringup
from flashrt_ros.bringup import BringupError, demo_nodes, pi05_nodes, resolve_arguments

ROOT = Path(__file__).resolve().parents[2]


def test_imports_nothing_but_the_standard_library() -> None:
    """Launch tools embed an older Python that cannot load this installation's compiled modules."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "import flashrt_ros.bringup\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - {'flashrt_ros'}\n"
        "sys.exit(str(new - set(sys.stdlib_module_names)) if new - set(sys.stdlib_module_names) else 0)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_syntax_is_that_of_python_3_10() -> None:
    import ast

    for path in (ROOT / "flashrt_ros/bringup.py", ROOT / "flashrt_ros/launch_translation.py"):
        ast.parse(path.read_text(), feature_version=(3, 10))


def test_launch_arguments_win_over_the_parameter_file_only_when_given(checkpoint: Path) -> None:
    plain = pi05_nodes({"checkpoint": str(checkpoint)})[0]
    assert plain.parameter_files == (str(ROOT / "config/pi05.yaml"),) or plain.parameter_files[0].endswith(
        "share/flashrt_ros/config/pi05.yaml"
    )
    assert "prompt" not in plain.parameters
    assert not {"precision", "hardware"} & set(plain.parameters)
    words = {"prompt": "wipe the table", "precision": "fp32", "hardware": "any"}
    given = pi05_nodes({"checkpoint": str(checkpoint), **words})[0]
    assert given.parameters["hardware"] == "any"
    assert given.parameters["prompt"] == "wipe the table"
    assert given.parameters["precision"] == "fp32"


def test_a_parameter_file_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("/**: {ros__parameters: {seed: 1}}\n")
    node = pi05_nodes({"checkpoint": str(checkpoint), "params_file": str(own)})[0]
    assert node.parameter_files == (str(own),)
    demo = demo_nodes({"checkpoint": str(checkpoint), "params_file": str(own)})[1]
    assert "seed" not in demo.parameters  # the demo's own seed would win over the file's
    with pytest.raises(BringupError, match=r"params_file:=/nowhere\.yaml: no such file"):
        pi05_nodes({"checkpoint": str(checkpoint), "params_file": "/nowhere.yaml"})


@pytest.mark.parametrize("nodes", [pi05_nodes, demo_nodes])
def test_a_checkpoint_is_needed(nodes, tmp_path: Path) -> None:
    with pytest.raises(BringupError, match=r"no checkpoint given: pass checkpoint:=DIR"):
        nodes({})
    with pytest.raises(BringupError, match=r"no such directory"):
        nodes({"checkpoint": str(tmp_path / "missing")})
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BringupError, match=r"no such directory"):
        nodes({"checkpoint": str(file)})


def test_unknown_names_and_values_are_refused() -> None:
    with pytest.raises(BringupError, match=r"unknown launch argument 'chekpoint': expected one of"):
        resolve_arguments(bringup.PI05_ARGUMENTS, {"chekpoint": "x"})
    with pytest.raises(BringupError, match=r"use_sim_time:=maybe: expected one of true, false"):
        resolve_arguments(bringup.PI05_ARGUMENTS, {"use_sim_time": "maybe"})
    assert resolve_arguments(bringup.PI05_ARGUMENTS, {"use_sim_time": "True"})["use_sim_time"] == "true"


def test_a_fast_dds_profile_of_the_users_is_left_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "FASTRTPS_DEFAULT_PROFILES_FILE" in pi05_nodes({"checkpoint": str(checkpoint)})[0].env
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "/my/own.xml")
    assert "FASTRTPS_DEFAULT_PROFILES_FILE" not in pi05_nodes({"checkpoint": str(checkpoint)})[0].env


def test_every_argument_is_described() -> None:
    for arguments in bringup.ARGUMENTS.values():
        names = [argument.name for argument in arguments]
        expected = "checkpoint robot prompt precision hardware namespace params_file log_level use_sim_time"
        assert names == [*expected.split(), "dry_run", "autostart", "respawn"]
        assert all(argument.description for argument in arguments)


def test_a_real_arms_own_file_is_read_before_the_users(checkpoint: Path, tmp_path: Path) -> None:
    given = {"checkpoint": str(checkpoint), "robot": "aloha"}
    assert [Path(path).name for path in pi05_nodes(given)[0].parameter_files] == ["pi05.yaml", "aloha.yaml"]
    own = tmp_path / "own.yaml"
    own.write_text("/**: {ros__parameters: {seed: 1}}\n")
    files = pi05_nodes({**given, "params_file": str(own)})[0].parameter_files
    assert [Path(path).name for path in files] == ["aloha.yaml", "own.yaml"]
    # A contract of one's own that happens to have the name is not the shipped robot.
    assert len(pi05_nodes({**given, "robot": "my/aloha"})[0].parameter_files) == 1


def test_respawn_is_for_the_policy_node_alone(checkpoint: Path) -> None:
    nodes = demo_nodes({"checkpoint": str(checkpoint), "respawn": "True"})
    assert [(node.name, node.respawn) for node in nodes] == [("demo_robot", False), ("policy_node", True)]
    assert not pi05_nodes({"checkpoint": str(checkpoint)})[0].respawn
    with pytest.raises(BringupError, match=r"respawn:=maybe: expected one of true, false"):
        pi05_nodes({"checkpoint": str(checkpoint), "respawn": "maybe"})
