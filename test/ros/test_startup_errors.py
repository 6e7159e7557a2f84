"""The errors a newcomer makes: each ends the node with status 1 and one line that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_rig import nodes_here

from flashrt_ros.core.reasons import Reason
from flashrt_ros.nodes.policy_node import PolicyNode


def failure(node) -> str:
    """The one line of error that a node ended with."""
    assert node.wait(60.0) == 1, node.output
    lines = [line for line in node.lines if line.strip()]
    assert len(lines) == 1, node.output
    assert "[ERROR]" in lines[0]
    assert "cannot configure: " in lines[0]
    return lines[0].split("cannot configure: ", 1)[1]


def test_no_checkpoint(policy_node) -> None:
    assert "parameter checkpoint is not set" in failure(policy_node(checkpoint=""))


def test_missing_checkpoint_directory(policy_node, tmp_path: Path) -> None:
    missing = tmp_path / "not_there"
    assert str(missing) in failure(policy_node(checkpoint=str(missing)))


def test_checkpoint_of_another_architecture(policy_node, checkpoint_maker) -> None:
    message = failure(policy_node(checkpoint=str(checkpoint_maker("--policy", "pi0"))))
    assert "pi0" in message
    assert "pi05" in message


def test_missing_tokenizer(policy_node, rig, checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.model").unlink()
    rig.env["HOME"] = str(tmp_path)  # nor in the caches of the home directory
    rig.env.pop("FLASH_RT_PALIGEMMA_TOKENIZER", None)
    message = failure(policy_node(checkpoint=str(bare), prompt=""))
    assert "tokenizer" in message.lower()
    assert "download" in message


# The rest in this process, which has paid for its imports; node, parameters and checkpoint are real as well.


@pytest.fixture
def configure(rig, checkpoint: Path):
    """configure(parameter=…) -> reason and message with which configuring failed; succeeds: it must not."""
    with nodes_here(rig) as (context, made):

        def attempt(succeeds: bool = False, **parameters) -> tuple[Reason, str]:
            values = {"checkpoint": str(checkpoint), "robot": "demo_arm", "prompt": "wave", **parameters}
            overrides = [Parameter(name, value=value) for name, value in values.items()]
            node = PolicyNode(context=context, parameter_overrides=overrides)
            made.append(node)
            wanted = TransitionCallbackReturn.SUCCESS if succeeds else TransitionCallbackReturn.FAILURE
            assert node.trigger_configure() == wanted, node.report().message
            report = node.report()
            assert report.state == (report.STATE_INACTIVE if succeeds else report.STATE_UNCONFIGURED)
            return Reason(report.reason), report.message

        yield attempt


def test_a_precision_of_a_later_version(configure) -> None:
    reason, message = configure(precision="nvfp4")
    assert reason == Reason.PARAMETER_INVALID
    assert message == "precision 'nvfp4' is not supported yet: use fp32, bf16, fp16, fp8"


def test_no_robot(configure) -> None:
    reason, message = configure(robot="")
    assert reason == Reason.PARAMETER_INVALID
    assert "parameter robot is not set" in message


def test_unknown_robot(configure) -> None:
    reason, message = configure(robot="my_new_robot")
    assert reason == Reason.CONTRACT_INVALID
    assert "my_new_robot" in message
    assert "demo_arm" in message  # the known ones are named


def test_contract_with_a_mistake(configure, tmp_path: Path) -> None:
    contract = tmp_path / "robot.yaml"
    contract.write_text("contract_version: 1\nrobot: mine\nstreems: {}\n")
    reason, message = configure(robot=str(contract))
    assert reason == Reason.CONTRACT_INVALID
    assert f"{contract}:3: " in message


def test_checkpoint_for_another_robot(configure, checkpoint_maker) -> None:
    reason, message = configure(checkpoint=str(checkpoint_maker("--preset", "libero")))
    assert reason == Reason.POLICY_MISMATCH
    # One line for every disagreement, each with the line of the contract it is about.
    assert all("demo_arm.yaml:" in line for line in message.splitlines())
    assert "width" in message


def test_what_the_checkpoint_leaves_open(configure, checkpoint: Path, tmp_path: Path) -> None:
    """Statistics of two robots, no horizon: the error names the parameters, and with them it configures."""
    vague = Path(shutil.copytree(checkpoint, tmp_path / "vague"))
    config = json.loads((vague / "config.json").read_text())
    horizon = config.pop("action_horizon")
    (vague / "config.json").write_text(json.dumps(config))
    (own,) = (vague / "assets").iterdir()
    shutil.copytree(own, vague / "assets" / "lab")
    given: dict[str, object] = {"checkpoint": str(vague)}
    for name, value in (("asset_id", "lab"), ("action_horizon", horizon)):
        reason, message = configure(**given)
        assert reason == Reason.CHECKPOINT_INVALID
        assert f"parameter {name} of the node" in message
        given[name] = value
    for name, value, words in (
        ("delta_actions", "true,false", "names 2 dimensions, the robot has 7"),
        ("delta_actions", "all", "delta_actions is 'all': expected true"),
        ("rules", "resize=nearest", "rule 'resize' is 'nearest'"),
    ):
        assert words in configure(**given, **{name: value})[1]
    rules = "resize=bilinear_float, std_eps=0.5"
    configure(succeeds=True, **given, delta_actions="true,true,true,true,true,true,false", rules=rules)


def test_the_expert_that_was_asked_for(configure) -> None:
    """The parameter reaches the policy, which refuses what the CPU has not."""
    assert "expert='chain' was asked for" in configure(expert="chain", hardware="cpu")[1]


def test_prompt_longer_than_the_policy_takes(configure) -> None:
    reason, message = configure(prompt="pick up the block and " * 100)
    assert reason == Reason.PROMPT_INVALID
    assert "token" in message


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"precision": "int3"}, "int3"), ({"config": "pi06"}, "pi06"), ({"hardware": "abacus"}, "abacus"),
     ({"expert": "turbo"}, "turbo")],
)  # fmt: skip
def test_parameter_values(configure, parameters, word: str) -> None:
    reason, message = configure(**parameters)
    assert reason == Reason.PARAMETER_INVALID
    assert word in message
