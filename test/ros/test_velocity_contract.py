"""A contract of velocity actions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

ROBOT = Path(__file__).resolve().parents[2] / "config" / "robots" / "demo_arm.yaml"


@pytest.mark.slow
def test_configure_warns_that_the_last_command_outlives_the_node(
    policy_node, checkpoint: Path, tmp_path: Path
) -> None:
    """A velocity controller goes on with it if the node is killed; a trajectory ends."""
    made, robot = tmp_path / "policy", tmp_path / "robot.yaml"
    shutil.copytree(checkpoint, made)
    config = json.loads((made / "config.json").read_text())
    config["flashrt"]["action_representation"] = "velocity"
    (made / "config.json").write_text(json.dumps(config))
    text = ROBOT.read_text().replace("representation: absolute", "representation: velocity")
    kind = "std_msgs/msg/Float64MultiArray"
    robot.write_text(text.replace("trajectory_msgs/msg/JointTrajectory, lookahead: 0.1", kind))
    node = policy_node(checkpoint=str(made), robot=str(robot))
    node.wait_for_line("goes on with the last one, unless its controller has a command timeout")
