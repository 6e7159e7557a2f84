"""`flashrt replay`, and how the command line finds commands of other packages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.synthetic_bag import MS, START, STORE, message_of, stamped, write_bag
from flashrt_ros.core.contract import load_contract
from flashrt_runtime.cli import plugins
from flashrt_runtime.errors import OptionError
from flashrt_runtime.untrained import make_checkpoint

TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    """Two seconds of the demo arm, standing at one command."""
    contract = load_contract("demo_arm")

    def extra(writer) -> None:
        kinds, none = STORE.types, np.zeros(0)
        connection = writer.add_connection(f"/{contract.outputs[0].topic}", TRAJECTORY, typestore=STORE)
        rest = kinds["builtin_interfaces/msg/Duration"](sec=0, nanosec=0)
        point = kinds["trajectory_msgs/msg/JointTrajectoryPoint"](
            positions=np.zeros(7), velocities=none, accelerations=none, effort=none, time_from_start=rest
        )
        data = message_of(TRAJECTORY, joint_names=list(contract.joints), points=[point])
        for time in range(START, START + 2000 * MS, 20 * MS):
            writer.write(connection, time, stamped(data, time))

    return write_bag(tmp_path_factory.mktemp("replay") / "bag", contract, 2.0, extra=extra)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("replay") / "pi05", preset="demo_arm")


def test_figures_for_each_joint_and_a_plot(flashrt, bag, checkpoint, tmp_path) -> None:
    arguments = ("--checkpoint", checkpoint, "--robot", "demo_arm", "--prompt", "wave", "--samples", "2")
    code, out, err = flashrt("replay", bag, *arguments, "--out", tmp_path / "report", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "report" / "replay.json").read_text())
    assert (summary["moments"], summary["skipped"], summary["prompt"]) == (2, 0, "wave")
    assert [joint["joint"] for joint in summary["joints"]] == list(load_contract("demo_arm").action.joints)
    for joint in summary["joints"]:
        assert 0 < joint["mean"] <= joint["rms"] <= joint["largest"]
        assert joint["still"] == 0
    assert (tmp_path / "report" / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_with_one_line(flashrt, bag, checkpoint, tmp_path) -> None:
    end = ("--checkpoint", checkpoint, "--robot", "demo_arm", "--out", tmp_path)
    for arguments, words in (
        ((bag, *end), "pass --prompt"),
        ((tmp_path / "absent", *end), "no such bag"),
        ((bag, *end[:2], "--robot", "robby", *end[4:]), "no robot contract of this name"),
        ((bag, *end, "--prompt", "wave", "--namespace", "left"), "no messages on topic /left/base_camera"),
    ):
        code, out, err = flashrt("replay", *arguments)
        assert (code, out) == (2, ""), err
        assert words in err


def test_a_command_whose_package_is_missing_says_so(monkeypatch) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    monkeypatch.setattr(plugins, "PLUGINS", {"replay": ("flashrt_absent.cli", "Not there.")})
    plugins.add_plugins(app)
    result = CliRunner().invoke(app, ["replay", "bag", "--checkpoint", "x"])
    assert isinstance(result.exception, OptionError)
    assert "part of the ROS package flashrt_ros" in str(result.exception)
    assert "flashrt_absent" in str(result.exception)
