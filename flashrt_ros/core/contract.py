"""Load a robot contract: find the file, have its shape and its meaning checked, build the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .contract_checks import UNIT_SCALES, contradictions, state_sources
from .contract_model import (
    ActionSpec,
    ColourOrder,
    Crop,
    JointLimits,
    JointMapping,
    JointSpec,
    OnViolation,
    OutputSpec,
    OutputType,
    Qos,
    RatesSpec,
    Representation,
    RobotContract,
    RtcMode,
    RtcSpec,
    Stamp,
    StateSource,
    StateSpec,
    StreamSpec,
    StreamType,
    SyncSpec,
    TimelineSpec,
)
from .contract_yaml import SourceMap, YamlPath, read_contract_yaml
from .errors import ContractError, ContractNotFoundError, ContractProblem
from .policy_check import PolicySpecLike, check_policy
from .timing import NS_PER_S, to_ns

__all__ = [
    "ActionSpec", "ColourOrder", "Crop", "JointLimits", "JointMapping", "JointSpec", "OnViolation",
    "OutputSpec", "OutputType", "PolicySpecLike", "Qos", "RatesSpec", "Representation", "RobotContract",
    "RtcMode", "RtcSpec", "Stamp", "StateSource", "StateSpec", "StreamSpec", "StreamType", "SyncSpec",
    "TimelineSpec", "check_policy", "default_search_path", "known_contracts", "load_contract",
]

MAX_LOOKAHEAD = NS_PER_S  # as in the schema; also bounds the default, the open-loop cap


def load_contract(
    path_or_name: str | PathLike[str],
    search_path: Sequence[str | PathLike[str]] | None = None,
    overrides: Mapping[YamlPath, Any] = MappingProxyType({}),
) -> RobotContract:
    """Load the contract of a path, or of a shipped robot's name ("demo_arm").

    `overrides` replace values of the file, as the file would have them, before anything is checked.

    A value that has a suffix .yaml/.yml or a directory part is a path; anything else is a name, looked up as
    NAME.yaml in `search_path` (default: `default_search_path()`).
    Raises ContractNotFoundError (names the known robots) or ContractError (a `file:line: text` per problem).
    """
    path = _locate(fspath(path_or_name), search_path)
    data, source = read_contract_yaml(path, overrides)
    problems = [source.problem(where, text) for where, text in contradictions(data)]
    if problems:
        raise ContractError(sorted(problems, key=lambda problem: problem.line))
    return _build(data, source)


def default_search_path() -> tuple[Path, ...]:
    """Directories with shipped contracts: of the source tree, and the share directory of an install."""
    here = Path(__file__).absolute()
    candidates = [here.parents[2] / "config" / "robots"]
    candidates += [parent / "share" / "flashrt_ros" / "config" / "robots" for parent in here.parents]
    return tuple(path for path in candidates if path.is_dir())


def known_contracts(search_path: Sequence[str | PathLike[str]] | None = None) -> tuple[str, ...]:
    """Names that `load_contract` accepts, sorted."""
    directories = default_search_path() if search_path is None else [Path(entry) for entry in search_path]
    return tuple(sorted({file.stem for directory in directories for file in directory.glob("*.yaml")}))


def _locate(path_or_name: str, search_path: Sequence[str | PathLike[str]] | None) -> Path:
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ContractNotFoundError([ContractProblem(str(path), 0, "no such robot contract file")])
    directories = default_search_path() if search_path is None else [Path(entry) for entry in search_path]
    for directory in directories:
        if path_or_name and (candidate := directory / f"{path_or_name}.yaml").is_file():
            return candidate
    known = ", ".join(known_contracts(search_path)) or "none"
    looked = ", ".join(map(str, directories)) or "nowhere: no directory with contracts was found"
    text = f"no robot contract of this name; known: {known} (looked in {looked}); or give a YAML file's path"
    raise ContractNotFoundError([ContractProblem(path_or_name or "''", 0, text)])


def _build(data: Mapping[str, Any], source: SourceMap) -> RobotContract:
    sync = SyncSpec(to_ns(data["sync"]["max_skew"]), to_ns(data["sync"]["max_age"]))
    action, timeline = data["action"], data["timeline"]
    cap = to_ns(timeline["open_loop_cap"])
    grippers = data.get("grippers", {})
    return RobotContract(
        robot=data["robot"],
        streams=MappingProxyType({name: _stream(name, spec, sync) for name, spec in data["streams"].items()}),
        joints=MappingProxyType({
            spec["name"]: _joint(spec, grippers.get(spec["name"])) for spec in data["joints"]
        }),
        state=StateSpec(tuple(
            StateSource(spec["stream"], spec.get("field", "position"), tuple(spec["joints"]))
            for _, spec in state_sources(data)
        )),
        action=ActionSpec(
            Representation(action["representation"]), to_ns(action["period"]), tuple(action["joints"])
        ),
        outputs=tuple(_output(spec, min(cap, MAX_LOOKAHEAD)) for spec in data["outputs"]),
        on_violation=OnViolation(data["limits"]["on_violation"]),
        sync=sync,
        rates=_rates(data["rates"]),
        timeline=TimelineSpec(
            cap,
            timeline.get("blend_steps", 4),
            to_ns(timeline["hold_deadline"]),
            _rtc(timeline.get("rtc", {})),
        ),
        source=source,
    )


def _stream(name: str, spec: Mapping[str, Any], sync: SyncSpec) -> StreamSpec:
    crop = spec.get("crop")
    return StreamSpec(
        name=name,
        topic=spec["topic"],
        type=StreamType(spec["type"]),
        view=spec.get("view"),
        qos=Qos(**spec.get("qos", {})),
        optional=spec.get("optional", False),
        crop=None if crop is None else Crop(**crop),
        max_age=to_ns(spec["max_age"]) if "max_age" in spec else sync.max_age,
        colour_order=ColourOrder(spec.get("colour_order", "declared")),
    )


def _joint(spec: Mapping[str, Any], gripper: Mapping[str, Any] | None) -> JointSpec:
    limits = None
    if "limits" in spec:
        lower, upper = spec["limits"]["position"]
        acceleration = spec["limits"].get("acceleration")
        limits = JointLimits(
            float(lower), float(upper), float(spec["limits"]["velocity"]),
            None if acceleration is None else float(acceleration),
        )
    gain, offset = _straight_line(spec) if gripper is None else _gripper_line(gripper)
    return JointSpec(
        name=spec["name"],
        unit=spec["unit"],
        sign=-1 if gain < 0 else 1,
        scale=abs(gain),
        offset=offset,
        limits=limits,
        policy_name=spec.get("policy_name", spec["name"]),
        message_name=spec.get("message_name", ""),
        action_line=None if gripper is None else _gripper_action_line(gripper),
    )


def _straight_line(spec: Mapping[str, Any]) -> tuple[float, float]:
    """(gain, offset) of a joint that is no gripper."""
    unit = spec["unit"]
    scale = float(spec.get("scale", UNIT_SCALES[unit, spec.get("policy_unit", unit)]))
    return spec.get("sign", 1) * scale, float(spec.get("offset", 0.0))


def _gripper_line(gripper: Mapping[str, Any]) -> tuple[float, float]:
    """(gain, offset) through a gripper's two ends, as in contract_model."""
    return _line(gripper, float(gripper.get("policy_closed", 0.0)), float(gripper.get("policy_open", 1.0)))


def _gripper_action_line(gripper: Mapping[str, Any]) -> tuple[float, float] | None:
    """(gain, offset) of its actions; None where they are those of its state."""
    if "action_closed" not in gripper:
        return None
    return _line(gripper, float(gripper["action_closed"]), float(gripper["action_open"]))


def _line(gripper: Mapping[str, Any], policy_closed: float, policy_open: float) -> tuple[float, float]:
    closed = float(gripper["closed"])
    gain = (policy_open - policy_closed) / (float(gripper["open"]) - closed)
    return gain, policy_closed - gain * closed


def _rates(rates: Mapping[str, Any]) -> RatesSpec:
    control, inference = round(NS_PER_S / rates["control"]), rates["inference"]
    if inference == "back_to_back":
        return RatesSpec(control, None)
    if isinstance(inference, Mapping):
        return RatesSpec(control, None, to_ns(inference["watermark"]))
    return RatesSpec(control, round(NS_PER_S / inference))


def _rtc(spec: Mapping[str, Any]) -> RtcSpec:
    return RtcSpec(
        mode=RtcMode(spec.get("mode", "off")),
        schedule=spec.get("schedule", "linear"),
        horizon=spec.get("horizon", 10),
        max_guidance=float(spec.get("max_guidance", 10.0)),
    )


def _output(spec: Mapping[str, Any], lookahead: int) -> OutputSpec:
    kind, joints = OutputType(spec["type"]), tuple(spec.get("joints", ()))
    if kind is OutputType.FLOAT64_MULTI_ARRAY:
        return OutputSpec(spec["topic"], kind, 0, joints)
    lookahead = to_ns(spec["lookahead"]) if "lookahead" in spec else lookahead
    return OutputSpec(spec["topic"], kind, lookahead, joints, Stamp(spec.get("stamp", "due")))
