"""Contract files: what loads, and that every mistake is one clear line with file and line number."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from flashrt_ros.core.contract import (
    JointMapping,
    JointSpec,
    OnViolation,
    OutputType,
    Representation,
    RobotContract,
    RtcMode,
    StreamType,
    check_policy,
    default_search_path,
    known_contracts,
    load_contract,
)
from flashrt_ros.core.contract_yaml import SCHEMA_PATH, SourceMap
from flashrt_ros.core.errors import ChunkError, ContractError, ContractNotFoundError, PolicyMismatchError
from flashrt_ros.core.reasons import Reason

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], RobotContract]:
    """Load a contract from its YAML text."""

    def from_text(text: str) -> RobotContract:
        path = tmp_path / "robot.yaml"
        path.write_text(text)
        return load_contract(path)

    return from_text


def test_demo_arm_has_the_values_of_its_file(demo: RobotContract) -> None:
    assert demo.robot == "demo_arm"
    assert demo.views == ("base_0_rgb", "left_wrist_0_rgb")
    assert [stream.type for stream in demo.streams.values()] == [
        StreamType.IMAGE, StreamType.COMPRESSED_IMAGE, StreamType.JOINT_STATE,
    ]
    assert demo.dof == demo.state.width == 7
    assert demo.action.joints[-1] == "gripper"
    assert demo.action.representation is Representation.ABSOLUTE
    assert demo.action.period == demo.rates.control_period == 20_000_000
    assert demo.rates.inference_period is None
    assert demo.sync.max_skew == 50_000_000
    assert demo.streams["joint_states"].max_age == demo.sync.max_age == 250_000_000
    assert demo.timeline.open_loop_cap == 500_000_000
    assert demo.timeline.blend_steps == 15
    assert demo.on_violation is OnViolation.CLAMP
    assert demo.outputs[0].type is OutputType.JOINT_TRAJECTORY
    assert demo.trajectory_lookahead == 100_000_000
    assert demo.joints["gripper"].limits is not None
    assert demo.joints["gripper"].limits.upper == 0.04


@pytest.mark.parametrize("name", known_contracts())
def test_every_shipped_contract_loads_by_name(name: str) -> None:
    assert load_contract(name).robot == name


def test_schema_is_a_valid_schema() -> None:
    Draft202012Validator.check_schema(json.loads(SCHEMA_PATH.read_text()))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ContractNotFoundError, match=r"no_such_robot: .*known: .*demo_arm"):
        load_contract("no_such_robot")
    with pytest.raises(FileNotFoundError, match="known: none"):
        load_contract("demo_arm", [])


@pytest.mark.parametrize("path", ["missing.yaml", "some/where", ""])
def test_missing_file(path: str) -> None:
    with pytest.raises(ContractNotFoundError):
        load_contract(path)


def test_an_installed_copy_finds_its_share_directory(tmp_path: Path) -> None:
    """Layout of an ament workspace: modules under lib, contracts under share, no source tree around."""
    package = tmp_path / "lib" / "python3.12" / "site-packages" / "flashrt_ros"
    shutil.copytree(ROOT / "flashrt_ros" / "core", package / "core")
    (package / "__init__.py").touch()
    share = tmp_path / "share" / "flashrt_ros" / "config"
    shutil.copytree(ROOT / "config" / "robots", share / "robots")
    code = (
        "from flashrt_ros.core.contract import load_contract, default_search_path\n"
        "print(load_contract('demo_arm').robot, *default_search_path())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["demo_arm", str(share / "robots")]
    assert ROOT / "config" / "robots" in default_search_path()


def test_core_imports_neither_ros_nor_torch() -> None:
    names = sorted(path.stem for path in (ROOT / "flashrt_ros" / "core").glob("*.py"))
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {names}: importlib.import_module('flashrt_ros.core.' + name)\n"
        "print([m for m in ('rclpy', 'torch', 'flashrt_runtime') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# (text in the demo contract, its replacement, marker of the line to blame, what the message says)
MISTAKES = [
    ("contract_version: 1", "contract_version: 2", "contract_version", r"expected 1, .* got 2"),
    ("robot: demo_arm", "robot: demo arm", "robot:", "robot: expected a name of letters"),
    ("robot: demo_arm", "robot: demo_arm\nrobots: 2", "robots:",
     "unknown key robots; known: contract_version"),
    ("sync: {max_skew: 0.05, max_age: 0.25}\n", "", "contract_version", "missing sync; required:"),
    ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/PointCloud2", "PointCloud2",
     r"streams.wrist_camera.type: expected one of sensor_msgs/msg/Image.*got 'sensor_msgs/msg/PointCloud2'"),
    ("view: left_wrist_0_rgb", "view: base_0_rgb", "view: base_0_rgb",
     "view base_0_rgb is already served by stream base_camera"),
    ("    view: left_wrist_0_rgb\n", "", "  wrist_camera:", "image stream wrist_camera needs `view`"),
    ("topic: joint_states\n", "topic: joint_states\n    view: x\n", "view: x", "cannot have a view"),
    ("topic: joint_states\n", "topic: joint states\n", "topic: joint states", "expected a ROS topic name"),
    ("topic: joint_states\n", "topic: joint_states\n    optional: true\n", "stream: joint_states",
     "carries the state and cannot be optional"),
    ("depth: 20", "depth: 0", "depth: 0", "depth: expected a whole number of messages, .* got 0"),
    ("name: wrist_2, ", "name: elbow, ", None, "joint name elbow is given twice"),
    ("name: wrist_2, ", "name: other, ", "joints: [shoulder_pan",
     "unknown joint wrist_2; joints are .*other"),
    (", limits: {position: [-2.6, 2.6], velocity: 1.5}}", "}", "name: elbow",
     "joint elbow is commanded .* needs limits"),
    ("position: [-2.6, 2.6]", "position: [2.6, -2.6]", "name: elbow",
     "lower position limit 2.6 is not below the upper"),
    ("position: [-2.6, 2.6]", "position: [2.6]", "name: elbow", r"expected \[lower, upper\]"),
    ("position: [-2.6, 2.6]", "position: [-.inf, 2.6]", "name: elbow", "expected a finite number, got -inf"),
    ("velocity: 0.1", "velocity: 0", "name: gripper", "expected a speed above 0 .* got 0"),
    ("velocity: 0.1", "velocity: 1e-1", "name: gripper", "got '1e-1' .*write 0.1, with a decimal point"),
    ("unit: m, ", "unit: cm, ", "name: gripper", "expected one of rad, m; got 'cm'"),
    ("unit: m, ", "unit: m, sign: 0, ", "name: gripper", "expected one of 1, -1; got 0"),
    ("  stream: joint_states", "  stream: joints", "stream: joints",
     "stream joints is unknown; JointState streams: joint_states"),
    ("  stream: joint_states", "  stream: base_camera", "stream: base_camera", "is not a JointState stream"),
    ("  field: position", "  field: torque", "field: torque", "expected one of position, velocity"),
    ("representation: absolute", "representation: relative", "representation: relative",
     "expected one of absolute, delta, velocity; got 'relative'"),
    ("representation: absolute", "representation: velocity", "lookahead: 0.1",
     "velocity actions have no positions for a JointTrajectory"),
    ("period: 0.02", "period: 0", "period: 0", "expected a duration in seconds above 0, got 0"),
    ("control: 50.0", "control: 30.0", "rates:",
     r"control rate \(30 Hz\) must be an integer multiple of the action rate \(50 Hz\): set 50 or"),
    ("control: 50.0", "control: 75.0", "rates:", "set 50 or 100 Hz"),
    ("inference: back_to_back", "inference: sometimes", "rates:",
     r"expected back_to_back, a rate in Hz above 0, or \{watermark: seconds\}, got 'sometimes'"),
    ("open_loop_cap: 0.5", "open_loop_cap: 0.01", "timeline:",
     "open_loop_cap 0.01 s is shorter than one action"),
    ("blend_steps: 15", "blend_steps: 1.5", "timeline:", "expected a whole number of actions"),
    ("lookahead: 0.1}", "lookahead: 0.6}", "lookahead: 0.6", "longer than open_loop_cap, 0.5 s"),
    ("lookahead: 0.1}", "lookahead: 0.01}", "lookahead: 0.01", "shorter than one action period, 0.02 s"),
    ("trajectory_msgs/msg/JointTrajectory,", "std_msgs/msg/Float64MultiArray,", "lookahead",
     "lookahead is for JointTrajectory"),
    ("limits: {on_violation: clamp}", "limits: {on_violation: ignore}", "on_violation",
     "expected one of clamp, reject; got 'ignore'"),
    ("limits: {on_violation: clamp}", "limits: {}", "limits: {}", "missing on_violation"),
    ("max_skew: 0.05", "max_skew: 50", "sync:", "sync.max_skew: .* in seconds above 0, at most 1, got 50"),
    ("max_age: 0.25", "max_age: 250", "sync:", "sync.max_age: .* in seconds above 0, at most 5, got 250"),
    ("topic: joint_states\n", "topic: joint_states\n    max_age: 5.1\n", "max_age: 5.1",
     "streams.joint_states.max_age: .* in seconds above 0, at most 5, got 5.1"),
    ("open_loop_cap: 0.5", "open_loop_cap: 500", "timeline:",
     "timeline.open_loop_cap: .* in seconds above 0, at most 5, got 500"),
    ("hold_deadline: 1.0", "hold_deadline: 1000", "timeline:",
     "timeline.hold_deadline: .* in seconds above 0, at most 60, got 1000"),
    ("lookahead: 0.1}", "lookahead: 100}", "lookahead: 100",
     r"outputs\[0\].lookahead: .* in seconds above 0, at most 1, got 100"),
    ("max_age: 0.25", "max_age: 0.25, max_age: 1.0", "sync:", "key max_age is given twice"),
    ("view: base_0_rgb", "view: base_0_rgb\n    colour_order: grb", "colour_order",
     "expected one of declared, rgb, bgr; got 'grb'"),
    ("topic: joint_states\n", "topic: joint_states\n    colour_order: bgr\n", "colour_order",
     "cannot have a colour_order"),
    ("unit: m, ", "unit: m, policy_unit: deg, ", "name: gripper", "unit m cannot become deg; expected m, mm"),
    ("unit: m, ", "unit: m, policy_unit: mm, scale: 2, ", "name: gripper", "policy_unit and scale say the"),
    ("velocity: 0.1}", "velocity: 0.1, acceleration: -1}", "name: gripper",
     "expected an acceleration above 0 .* got -1"),
    ("limits: {on_", "grippers: {hand: {closed: 0, open: 1}}\nlimits: {on_", "grippers:",
     "unknown joint hand; joints are shoulder_pan"),
    ("limits: {on_", "grippers: {gripper: {closed: 0}}\nlimits: {on_", "grippers:",
     "grippers.gripper: missing open; required: closed, open"),
    ("limits: {on_", "grippers: {gripper: {closed: 0.04, open: 0.04}}\nlimits: {on_", "grippers:",
     "closed and open are both 0.04"),
    ("limits: {on_", "grippers: {gripper: {closed: 0, open: 1, policy_open: 0}}\nlimits: {on_", "grippers:",
     "policy_closed and policy_open are both 0"),
    ("limits: {on_", "grippers: {gripper: {closed: 0, open: 1, action_open: 2}}\nlimits: {on_", "grippers:",
     "action_closed and action_open come together"),
    ("limits: {on_",
     "grippers: {gripper: {closed: 0, open: 1, action_closed: 2, action_open: 2}}\nlimits: {on_",
     "grippers:", "action_closed and action_open are both 2"),
    ("  period: 0.02", "  period: 0.02\n  dof: 6", "dof: 6", "action.dof is 6, but action.joints names 7"),
    ("lookahead: 0.1}", "lookahead: 0.1, joints: [elbow, hand]}", "lookahead: 0.1",
     "joint hand is not commanded; action.joints are"),
    ("lookahead: 0.1}", "lookahead: 0.1, joints: [elbow, elbow]}", "lookahead: 0.1", "elbow is given twice"),
    ("lookahead: 0.1}", "lookahead: 0.1, joints: [elbow]}", "  joints: [shoulder_pan",
     "joint shoulder_pan is commanded, but no output has it"),
    ("lookahead: 0.1}", "lookahead: 0.1, stamp: now}", "stamp: now", "expected one of due, zero; got 'now'"),
    ("trajectory_msgs/msg/JointTrajectory, lookahead: 0.1", "std_msgs/msg/Float64MultiArray, stamp: zero",
     "stamp: zero", "a Float64MultiArray has no header"),
    ("name: wrist_2, ", "name: wrist_2, message_name: elbow, ", "lookahead",
     "one output would command elbow twice: split it by `joints`"),
    ("inference: back_to_back", "inference: {watermark: 0.6}", "rates:",
     "watermark 0.6 s is above open_loop_cap, 0.5 s"),
    ("inference: back_to_back", "inference: {low: 0.6}", "rates:", "unknown key low; known: watermark"),
    ("inference: back_to_back", "inference: {}", "rates:", "missing watermark"),
    ("hold_deadline: 1.0", "hold_deadline: 1.0, rtc: {mode: yes}", "timeline:",
     "timeline.rtc.mode: expected one of off, guided, trained; got 'yes'"),
    ("hold_deadline: 1.0", "hold_deadline: 1.0, rtc: {mode: guided, schedule: cubic}", "timeline:",
     "expected one of zeros, ones, linear, exp; got 'cubic'"),
    ("max_age: 0.25", "7: 0.25", "sync:", "every key must be plain text"),
    ("robot: demo_arm", "robot: [demo_arm", "streams:", "not valid YAML: .*parsing a flow"),
]


@pytest.mark.parametrize(("old", "new", "blame", "text"), MISTAKES, ids=[f"{m[1][:40]}" for m in MISTAKES])
def test_each_mistake_is_one_line_with_its_place(
    load: Callable[[str], RobotContract], demo_text: str, old: str, new: str, blame: str | None, text: str
) -> None:
    assert old in demo_text
    changed = demo_text.replace(old, new, 1)
    with pytest.raises(ContractError) as caught:
        load(changed)
    matching = [problem for problem in caught.value.problems if re.search(text, problem.text)]
    assert matching, str(caught.value)
    assert "\n" not in str(matching[0])
    lines = changed.splitlines()
    if blame is None:
        assert "name: elbow, unit" in re.sub(" +", " ", lines[matching[0].line - 1])
    else:
        assert matching[0].line in [number for number, line in enumerate(lines, 1) if blame in line]
    assert str(matching[0]).startswith(f"{matching[0].file}:{matching[0].line}: ")


def test_a_state_of_the_wrong_kind_is_told_once(load: Callable[[str], RobotContract], demo_text: str) -> None:
    with pytest.raises(ContractError) as caught:
        load(demo_text.replace("state:\n  stream", "state: 5\nrest:\n  stream"))
    texts = [problem.text for problem in caught.value.problems]
    expected = "state: expected a mapping with stream, field and joints, or a list of such mappings, got 5"
    assert [text for text in texts if text.startswith("state")] == [expected]


def test_all_problems_are_told_at_once_in_file_order(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    changed = demo_text.replace("control: 50.0", "control: 30.0").replace("left_wrist_0_rgb", "base_0_rgb")
    with pytest.raises(ContractError) as caught:
        load(changed)
    first, second = str(caught.value).splitlines()
    assert "base_0_rgb" in first
    assert "control" in second
    lines = [problem.line for problem in caught.value.problems]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", r"contract: expected .*got \['a', 'b'\]"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: &x [*x]\n", "recursi"),
        ("\ta: 1\n", "cannot start any token"),
        ("a: !!python/object:os.system {}\n", ":1: not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_contract(load: Callable[[str], RobotContract], text: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        load(text)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContractError, match="cannot be read"):
        load_contract(path)


def test_the_largest_durations(load: Callable[[str], RobotContract], demo_text: str) -> None:
    text = (
        demo_text.replace("sync: {max_skew: 0.05, max_age: 0.25}", "sync: {max_skew: 1, max_age: 5}")
        .replace("open_loop_cap: 0.5", "open_loop_cap: 5").replace("hold_deadline: 1.0", "hold_deadline: 60")
    )
    contract = load(text.replace("lookahead: 0.1", "lookahead: 1.0"))
    assert contract.timeline.open_loop_cap == 5_000_000_000
    assert contract.trajectory_lookahead == 1_000_000_000
    assert load(text.replace(", lookahead: 0.1", "")).trajectory_lookahead == 1_000_000_000


def test_options_off_the_demo(load: Callable[[str], RobotContract], demo_text: str) -> None:
    raw = "{topic: /raw, type: std_msgs/msg/Float64MultiArray}"
    crop_line = "crop: {x: 0, y: 8, width: 32, height: 16}"
    text = (
        demo_text.replace("inference: back_to_back", "inference: 5")
        .replace("control: 50.0", "control: 100")
        .replace("lookahead: 0.1}", f"lookahead: 0.1}}\n  - {raw}")
        .replace("view: base_0_rgb", f"view: base_0_rgb\n    {crop_line}\n    max_age: 1")
        .replace("unit: m, ", "unit: m, sign: -1, scale: 25, offset: 1, policy_name: gripper.pos, ")
    )
    contract = load(text)
    assert contract.rates.inference_period == 200_000_000
    assert contract.rates.control_period == 10_000_000
    assert contract.outputs[1].type is OutputType.FLOAT64_MULTI_ARRAY
    assert contract.streams["base_camera"].max_age == 1_000_000_000
    assert contract.streams["wrist_camera"].max_age == 250_000_000
    crop = contract.streams["base_camera"].crop
    assert crop is not None
    assert (crop.y, crop.width) == (8, 32)
    gripper = contract.joints["gripper"]
    assert (gripper.gain, gripper.offset, gripper.policy_name) == (-25.0, 1.0, "gripper.pos")
    assert contract == load(text)
    assert contract != load(demo_text)


def test_every_camera_optional_leaves_nothing_to_look_at(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    text = demo_text.replace("    qos: {reliability: best_effort, depth: 5}", "    optional: true")
    with pytest.raises(ContractError, match="every image stream is optional: at least one must be there"):
        load(text)


def test_a_gripper_is_the_straight_line_through_its_ends(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    ends = "{closed: 0.0, open: 0.04, policy_closed: 100, policy_open: 0}"
    contract = load(demo_text.replace("limits: {on_", f"grippers: {{gripper: {ends}}}\nlimits: {{on_"))
    mapping = JointMapping([contract.joints["gripper"]])
    np.testing.assert_allclose(mapping.to_policy([[0.0], [0.01], [0.04]]), [[100], [75], [0]], atol=1e-9)
    np.testing.assert_allclose(mapping.to_robot([[100], [75], [0]]), [[0.0], [0.01], [0.04]], atol=1e-12)
    plain = load(demo_text.replace("limits: {on_", "grippers: {elbow: {closed: 1, open: -1}}\nlimits: {on_"))
    assert plain.joints["elbow"].gain == -0.5
    assert plain.joints["elbow"].offset == 0.5


def test_a_grippers_actions_may_have_a_line_of_their_own(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    ends = "{closed: 0.0, open: 0.04, policy_closed: 100, policy_open: 0, action_closed: 1, action_open: -1}"
    contract = load(demo_text.replace("limits: {on_", f"grippers: {{gripper: {ends}}}\nlimits: {{on_"))
    np.testing.assert_allclose(JointMapping([contract.joints["gripper"]]).to_policy([[0.01]]), [[75]])
    action = np.array([[0.0] * 6 + [0.5]])
    np.testing.assert_allclose(contract.actions_to_robot(action)[0, 6], 0.01)
    back = contract.actions_to_policy(contract.actions_to_robot(action))
    np.testing.assert_allclose(back, action, atol=1e-12)


def test_a_gripper_replaces_the_joints_own_numbers(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    text = demo_text.replace("unit: m, ", "unit: m, sign: -1, ").replace(
        "limits: {on_", "grippers: {gripper: {closed: 0, open: 1}}\nlimits: {on_"
    )
    with pytest.raises(ContractError, match=r"gripper \(grippers.gripper\), which replaces its sign: remove"):
        load(text)


def test_units_of_the_policy(load: Callable[[str], RobotContract], demo_text: str) -> None:
    text = demo_text.replace("name: elbow,  ", "name: elbow, policy_unit: deg, sign: -1,")
    contract = load(text.replace("unit: m, ", "unit: m, policy_unit: mm, "))
    assert contract.joints["elbow"].gain == pytest.approx(-180 / np.pi)
    assert contract.joints["gripper"].gain == 1000.0


def test_two_controllers_and_names_of_the_robots_own(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    arm = "shoulder_pan, shoulder_lift, elbow, wrist_1, wrist_2, wrist_3"
    one = "lookahead: 0.1}"
    two = (
        f"lookahead: 0.1, joints: [{arm}], stamp: zero}}\n"
        "  - {topic: hand, type: std_msgs/msg/Float64MultiArray, joints: [gripper]}"
    )
    text = demo_text.replace(one, two).replace("name: gripper, ", "name: gripper, message_name: elbow, ")
    contract = load(text)
    assert contract.outputs[0].joints == tuple(arm.split(", "))
    assert (contract.outputs[0].stamp, contract.outputs[1].joints) == ("zero", ("gripper",))
    assert contract.message_names(("elbow", "gripper")) == ("elbow", "elbow")


def test_watermark_and_real_time_chunking(load: Callable[[str], RobotContract], demo_text: str) -> None:
    text = demo_text.replace("inference: back_to_back", "inference: {watermark: 0.25}")
    contract = load(text.replace("hold_deadline: 1.0", "hold_deadline: 1.0, rtc: {mode: guided, horizon: 8}"))
    assert contract.rates.inference_watermark == 250_000_000
    assert contract.rates.inference_period is None
    rtc = contract.timeline.rtc
    assert (rtc.mode, rtc.schedule, rtc.horizon, rtc.max_guidance) == (RtcMode.GUIDED, "linear", 8, 10.0)
    # To YAML 1.1 a bare `off` is false.
    off = load(demo_text.replace("hold_deadline: 1.0", "hold_deadline: 1.0, rtc: {mode: off}"))
    assert off.timeline.rtc == load(demo_text).timeline.rtc
    assert off.timeline.rtc.mode is RtcMode.OFF


def test_state_from_two_streams(load: Callable[[str], RobotContract], demo_text: str) -> None:
    second = "  more: {topic: more, type: sensor_msgs/msg/JointState}\n\n# policy value"
    arm = "shoulder_pan, shoulder_lift, elbow, wrist_1, wrist_2, wrist_3"
    one = re.search(r"state:\n(.*\n){3}", demo_text)
    assert one is not None
    two = f"state:\n  - {{stream: joint_states, joints: [{arm}]}}\n  - {{stream: more, joints: [gripper]}}\n"
    text = demo_text.replace("\n# policy value", second).replace(one.group(), two)
    contract = load(text)
    assert [source.stream for source in contract.state.sources] == ["joint_states", "more"]
    assert contract.state.width == 7
    unmeasured = text.replace("joints: [gripper]}", "field: velocity, joints: [gripper]}")
    with pytest.raises(ContractError, match="joint gripper is commanded, so a state stream must name it"):
        load(unmeasured)


def test_source_map_falls_back_to_the_enclosing_line() -> None:
    source = SourceMap("f", {(): 1, ("a",): 3})
    assert source.line(("a", "b", 0)) == 3
    assert source.line(("z",)) == 1
    assert str(SourceMap("f").problem(("a",), "text")) == "f: text"


finite = st.floats(-100, 100)


@given(
    values=st.lists(finite, min_size=3, max_size=3),
    signs=st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3),
    scales=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    offsets=st.lists(finite, min_size=3, max_size=3),
    rates=st.booleans(),
)
def test_joint_mapping_and_its_inverse(
    values: list[float], signs: list[int], scales: list[float], offsets: list[float], rates: bool
) -> None:
    joints = [
        JointSpec(f"j{i}", "rad", sign, scale, offset, None, f"j{i}")
        for i, (sign, scale, offset) in enumerate(zip(signs, scales, offsets, strict=True))
    ]
    mapping = JointMapping(joints)
    policy = mapping.to_policy(values, rates=rates)
    for value, joint, mapped in zip(values, joints, policy, strict=True):
        expected = joint.sign * joint.scale * value + (0.0 if rates else joint.offset)
        assert mapped == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(mapping.to_robot(policy, rates=rates), values, atol=1e-9 * 1e4)


def test_actions_to_robot_units(
    demo: RobotContract, load: Callable[[str], RobotContract], demo_text: str
) -> None:
    text = demo_text.replace("unit: m, ", "unit: m, sign: -1, scale: 25, offset: 1, ")
    chunk = np.zeros((3, 7), dtype=np.float32)
    chunk[:, 6] = [0.0, 0.5, 1.0]
    np.testing.assert_allclose(load(text).actions_to_robot(chunk)[:, 6], [0.04, 0.02, 0.0])
    delta = load(text.replace("representation: absolute", "representation: delta"))
    np.testing.assert_allclose(delta.actions_to_robot(chunk)[:, 6], [0.0, -0.02, -0.04])
    with pytest.raises(ChunkError, match=r"expected actions of shape \(horizon, 7\), got \(3, 6\)"):
        demo.actions_to_robot(chunk[:, :6])


def policy(**changes: object) -> SimpleNamespace:
    """What a policy for the demo arm says of itself, with some of it changed."""
    joints = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper")
    fields: dict[str, object] = {
        "views": ("base_0_rgb", "left_wrist_0_rgb"), "state_dim": 7, "action_dim": 7, "state_names": joints,
        "action_names": joints, "action_rate_hz": 50.0, "checkpoint": "models/arm",
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize("changes", [
    {}, {"state_names": None, "action_names": None}, {"action_rate_hz": None}, {"action_rate_hz": 49.99},
    {"action_representation": "absolute"},
])
def test_a_fitting_checkpoint_passes(demo: RobotContract, changes: dict[str, object]) -> None:
    check_policy(demo, policy(**changes))


@pytest.mark.parametrize(("changes", "blame", "text"), [
    ({"views": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")}, "streams:",
     "no stream serves the checkpoint's view right_wrist_0_rgb; the contract has base_0_rgb, left_wrist"),
    ({"views": ("base_0_rgb",)}, "view: left_wrist_0_rgb",
     "view left_wrist_0_rgb is not among the checkpoint's"),
    ({"state_dim": 8, "state_names": None}, "  joints: [",
     "state has 7 joints .*the checkpoint's state has width 8"),
    ({"action_dim": 6, "action_names": None}, "  joints: [", "action has 7 joints .* action has width 6"),
    ({"action_rate_hz": 30.0}, "period: 0.02",
     "action.period 0.02 s is 50 Hz, the checkpoint's actions 30 Hz"),
    ({"action_names": ("shoulder_lift", "shoulder_pan", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper")},
     "  joints: [",
     "action joints are shoulder_pan, .*the checkpoint's are shoulder_lift, .*first at index 0"),
    ({"action_representation": "delta"}, "representation: absolute",
     "action.representation is absolute, the checkpoint's is delta"),
    ({"state_names": ("a", "b")}, "  joints: [", "state joints are .*the checkpoint's are a, b"),
])
def test_each_disagreement_names_line_and_checkpoint(
    demo: RobotContract, demo_text: str, changes: dict[str, object], blame: str, text: str
) -> None:
    with pytest.raises(PolicyMismatchError, match=text) as caught:
        check_policy(demo, policy(**changes))
    (problem,) = caught.value.problems
    assert blame in demo_text.splitlines()[problem.line - 1]
    assert problem.text.endswith("(checkpoint models/arm)")
    assert caught.value.reason is Reason.POLICY_MISMATCH


def test_a_checkpoint_that_names_no_representation_gives_absolute_actions(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    contract = load(demo_text.replace("representation: absolute", "representation: delta"))
    with pytest.raises(PolicyMismatchError, match="representation is delta, the checkpoint's is absolute"):
        check_policy(contract, policy())
    check_policy(contract, policy(action_representation="delta"))


def test_only_velocities_outlive_the_node(load: Callable[[str], RobotContract], demo_text: str) -> None:
    """A trajectory ends, a position is where the arm stays; a velocity goes on."""
    kind = "std_msgs/msg/Float64MultiArray"
    assert load(demo_text).outliving == ()
    positions = demo_text.replace("trajectory_msgs/msg/JointTrajectory, lookahead: 0.1", kind)
    assert load(positions).outliving == ()
    velocities = positions.replace("representation: absolute", "representation: velocity")
    assert load(velocities).outliving == ("arm_controller/joint_trajectory",)


def test_an_optional_camera_cannot_serve_a_needed_view(
    load: Callable[[str], RobotContract], demo_text: str
) -> None:
    contract = load(demo_text.replace("view: base_0_rgb", "view: base_0_rgb\n    optional: true"))
    with pytest.raises(PolicyMismatchError, match="stream base_camera is optional"):
        check_policy(contract, policy())
    check_policy(contract, policy(optional_views=("base_0_rgb",)))


def test_reasons_are_stable_and_described() -> None:
    assert int(Reason.OK) == 0
    assert (int(Reason.NO_MESSAGE), int(Reason.SKEW), int(Reason.CLOCK)) == (101, 104, 105)
    assert (int(Reason.IMAGE_ENCODING), int(Reason.JOINT_NOT_FINITE)) == (201, 205)
    assert (int(Reason.CHUNK_NOT_FINITE), int(Reason.CHUNK_LATE)) == (301, 308)
    assert (int(Reason.INFERENCE_ERROR), int(Reason.WORKER_STOPPED)) == (401, 403)
    texts = [reason.text for reason in Reason]
    assert all(texts)
    assert len(set(texts)) == len(texts)
