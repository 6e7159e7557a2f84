"""Contradictions within a contract: problems that need more than one key to see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .contract_model import OutputType, Representation, StreamType
from .contract_yaml import YamlPath
from .timing import NS_PER_S, period_ratio, to_ns

# Policy units in one robot unit, by (robot's, policy's).
UNIT_SCALES = {("rad", "rad"): 1.0, ("rad", "deg"): 180.0 / math.pi, ("m", "m"): 1.0, ("m", "mm"): 1000.0}

Problem = tuple[YamlPath, str]


def contradictions(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems that need more than one key to see; `data` has passed the schema."""
    yield from _check_streams(data["streams"])
    yield from _check_joints(data["joints"])
    yield from _check_grippers(data.get("grippers", {}), data["joints"])
    yield from _check_state(data)
    yield from _check_action(data)
    yield from _check_outputs(data)
    yield from _check_times(data)


def _check_streams(streams: Mapping[str, Any]) -> Iterator[Problem]:
    views: dict[str, str] = {}
    required = False
    for name, stream in streams.items():
        view = stream.get("view")
        if stream["type"] == StreamType.JOINT_STATE:
            for key in ("view", "crop", "colour_order"):
                if stream.get(key) is not None:
                    yield ("streams", name, key), f"stream {name} is a JointState and cannot have a {key}"
            continue
        required = required or not stream.get("optional", False)
        if view is None:
            yield ("streams", name), f"image stream {name} needs `view`, the policy's name for this camera"
        elif view in views:
            yield ("streams", name, "view"), f"view {view} is already served by stream {views[view]}"
        else:
            views[view] = name
    if not views:
        yield ("streams",), "no image stream: a policy needs at least one view"
    elif not required:
        yield ("streams",), "every image stream is optional: at least one must be there for an observation"


def _check_joints(joints: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    for key in ("name", "policy_name"):
        names = [joint.get(key, joint["name"]) for joint in joints]
        yield from _duplicates(names, ("joints",), f"joint {key}")
    for index, joint in enumerate(joints):
        if "limits" in joint:
            lower, upper = joint["limits"]["position"]
            if lower >= upper:
                text = f"joint {joint['name']}: lower position limit {lower} is not below the upper, {upper}"
                yield ("joints", index, "limits", "position"), text
        unit, policy_unit = joint["unit"], joint.get("policy_unit", joint["unit"])
        if (unit, policy_unit) not in UNIT_SCALES:
            fitting = ", ".join(theirs for ours, theirs in UNIT_SCALES if ours == unit)
            text = f"joint {joint['name']}: unit {unit} cannot become {policy_unit}; expected {fitting}"
            yield ("joints", index, "policy_unit"), text
        if "policy_unit" in joint and "scale" in joint:
            text = f"joint {joint['name']}: policy_unit and scale say the same thing: give one of them"
            yield ("joints", index, "scale"), text


def _check_grippers(grippers: Mapping[str, Any], joints: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    known = {joint["name"]: index for index, joint in enumerate(joints)}
    for name, gripper in grippers.items():
        path: YamlPath = ("grippers", name)
        if name not in known:
            yield path, f"unknown joint {name}; joints are {', '.join(known)}"
            continue
        for key in ("sign", "scale", "offset", "policy_unit"):
            if key in joints[known[name]]:
                text = f"joint {name} is a gripper (grippers.{name}), which replaces its {key}: remove it"
                yield ("joints", known[name], key), text
        if gripper["closed"] == gripper["open"]:
            yield (*path, "open"), f"gripper {name}: closed and open are both {gripper['open']}"
        ends = gripper.get("policy_closed", 0.0), gripper.get("policy_open", 1.0)
        if ends[0] == ends[1]:
            yield path, f"gripper {name}: policy_closed and policy_open are both {ends[0]}"
        if ("action_closed" in gripper) != ("action_open" in gripper):
            yield path, f"gripper {name}: action_closed and action_open come together: give both or none"
        elif "action_open" in gripper and gripper["action_closed"] == gripper["action_open"]:
            text = f"gripper {name}: action_closed and action_open are both {gripper['action_open']}"
            yield path, text


def _duplicates(names: Sequence[str], path: YamlPath, what: str) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield (*path, index), f"{what} {name} is given twice"
        seen.add(name)


def _check_names(
    names: Sequence[str], path: YamlPath, joints: Sequence[Mapping[str, Any]]
) -> Iterator[Problem]:
    known = [joint["name"] for joint in joints]
    for index, name in enumerate(names):
        if name not in known:
            yield (*path, index), f"unknown joint {name}; joints are {', '.join(known)}"
    yield from _duplicates(names, path, "joint")


def state_sources(data: Mapping[str, Any]) -> list[tuple[YamlPath, Mapping[str, Any]]]:
    state = data["state"]
    if isinstance(state, list):
        return [(("state", index), source) for index, source in enumerate(state)]
    return [(("state",), state)]


def _check_state(data: Mapping[str, Any]) -> Iterator[Problem]:
    streams = data["streams"]
    joint_streams = [name for name, stream in streams.items() if stream["type"] == StreamType.JOINT_STATE]
    for path, source in state_sources(data):
        name = source["stream"]
        if name not in joint_streams:
            what = "is not a JointState stream" if name in streams else "is unknown"
            text = f"stream {name} {what}; JointState streams: {', '.join(joint_streams) or 'none'}"
            yield (*path, "stream"), text
        elif streams[name].get("optional", False):
            yield (*path, "stream"), f"stream {name} carries the state and cannot be optional"
        yield from _check_names(source["joints"], (*path, "joints"), data["joints"])


def _check_action(data: Mapping[str, Any]) -> Iterator[Problem]:
    names = data["action"]["joints"]
    joints = {joint["name"]: index for index, joint in enumerate(data["joints"])}
    yield from _check_names(names, ("action", "joints"), data["joints"])
    if (dof := data["action"].get("dof", len(names))) != len(names):
        yield ("action", "dof"), f"action.dof is {dof}, but action.joints names {len(names)}"
    for name in names:
        index = joints.get(name)
        if index is not None and "limits" not in data["joints"][index]:
            wanted = "limits: {position: [lower, upper], velocity: v}"
            yield ("joints", index), f"joint {name} is commanded (action.joints) and needs {wanted}"
    sources = state_sources(data)
    positions = [source for _, source in sources if source.get("field", "position") == "position"]
    measured = {name for source in positions for name in source["joints"]}
    if len({source["stream"] for _, source in sources}) > 1:
        for index, name in enumerate(names):
            if name in joints and name not in measured:
                text = f"joint {name} is commanded, so a state stream must name it, with field: position"
                yield ("action", "joints", index), text


def _check_outputs(data: Mapping[str, Any]) -> Iterator[Problem]:
    action, timeline = data["action"], data["timeline"]
    topics: set[str] = set()
    for index, output in enumerate(data["outputs"]):
        path: YamlPath = ("outputs", index)
        if output["topic"] in topics:
            yield (*path, "topic"), f"topic {output['topic']} is already an output"
        topics.add(output["topic"])
        if "joints" in output:
            yield from _check_output_joints(output["joints"], (*path, "joints"), action["joints"])
        if "stamp" in output and output["type"] == OutputType.FLOAT64_MULTI_ARRAY:
            yield (*path, "stamp"), "stamp is for JointTrajectory; a Float64MultiArray has no header"
        lookahead = output.get("lookahead")
        if output["type"] == OutputType.FLOAT64_MULTI_ARRAY:
            if lookahead is not None:
                text = "lookahead is for JointTrajectory; a Float64MultiArray holds one command"
                yield (*path, "lookahead"), text
            continue
        if action["representation"] == Representation.VELOCITY:
            text = "velocity actions have no positions for a JointTrajectory: use Float64MultiArray"
            yield (*path, "type"), text
        if lookahead is not None and lookahead < action["period"]:
            text = f"lookahead {lookahead} s is shorter than one action period, {action['period']} s"
            yield (*path, "lookahead"), text
        if lookahead is not None and lookahead > timeline["open_loop_cap"]:
            text = f"lookahead {lookahead} s is longer than open_loop_cap, {timeline['open_loop_cap']} s"
            yield (*path, "lookahead"), text


    yield from _check_commanded(data)


def _check_output_joints(
    names: Sequence[str], path: YamlPath, commanded: Sequence[str]
) -> Iterator[Problem]:
    for index, name in enumerate(names):
        if name not in commanded:
            text = f"joint {name} is not commanded; action.joints are {', '.join(commanded)}"
            yield (*path, index), text
    yield from _duplicates(names, path, "joint")


def _check_commanded(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Every action reaches a controller, and no controller is given one name twice."""
    commanded = data["action"]["joints"]
    reached = {name for output in data["outputs"] for name in output.get("joints", commanded)}
    for index, name in enumerate(commanded):
        if name not in reached:
            yield ("action", "joints", index), f"joint {name} is commanded, but no output has it"
    in_messages = {joint["name"]: joint.get("message_name", joint["name"]) for joint in data["joints"]}
    for index, output in enumerate(data["outputs"]):
        names = [in_messages[name] for name in output.get("joints", commanded) if name in in_messages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            text = f"one output would command {', '.join(twice)} twice: split it by `joints`, one per arm"
            yield ("outputs", index), text


def _check_times(data: Mapping[str, Any]) -> Iterator[Problem]:
    action_period, control = data["action"]["period"], data["rates"]["control"]
    try:
        period_ratio(to_ns(action_period), round(NS_PER_S / control))
    except ValueError as error:
        yield ("rates", "control"), f"rates.control {control} Hz and action.period {action_period} s: {error}"
    cap = data["timeline"]["open_loop_cap"]
    if to_ns(cap) < to_ns(action_period):
        text = f"open_loop_cap {cap} s is shorter than one action period, {action_period} s"
        yield ("timeline", "open_loop_cap"), text
    inference = data["rates"]["inference"]
    if isinstance(inference, Mapping) and inference["watermark"] > cap:
        text = f"watermark {inference['watermark']} s is above open_loop_cap, {cap} s: use back_to_back"
        yield ("rates", "inference", "watermark"), text
