"""The policy node's parameters: this dataclass is the one source of names, types, defaults, bounds and words.

The node declares what stands here, and docs/node.md has its table from here (scripts/node_tables.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flashrt_ros.bringup import PRECISIONS

from .contract_yaml import YamlPath
from .latch import DEFAULT_MAX_FAILURES

Value = bool | int | float | str
FIXED = "read at configure: deactivate and clean up first"


class ParameterError(ValueError):
    """A parameter's value cannot be used: what was expected, what came, what to do."""


@dataclass(frozen=True)
class ParameterSpec:
    """One ROS parameter. `unset`: the value that stands for None. dynamic: may change while configured.
    contract: the key of the robot contract that a value replaces."""

    name: str
    default: Value
    description: str
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    unset: Value | None = None
    dynamic: bool = False
    contract: YamlPath | None = None

    def checked(self, value: Value) -> Value | None:
        """The value as the node uses it; raises ParameterError when it is of no use."""
        if self.unset is not None and value == self.unset:
            return None
        if self.choices and value not in self.choices:
            raise ParameterError(f"parameter {self.name}: expected one of {self.listed}, got '{value}'")
        if self.bounds is not None:
            lower, upper = self.bounds
            number = float(value)
            if not (math.isfinite(number) and lower <= number <= upper):
                text = f"expected a number from {lower:g} to {upper:g}, got {value}"
                raise ParameterError(f"parameter {self.name}: {text}")
        return value

    @property
    def listed(self) -> str:
        return ", ".join(choice or "(empty)" for choice in self.choices)


def _parameter(default: Value, description: str, *, name: str = "", **more: Any) -> Any:
    """A field of PolicyParameters; `name` where the parameter is not called as the field is."""
    return field(default=default, metadata={"name": name, "description": description, **more})


@dataclass(frozen=True)
class PolicyParameters:
    """Every parameter, in the type that the node uses: None for "the default" or "the contract's"."""

    checkpoint: str = _parameter("", "directory of the policy's checkpoint")
    robot: str = _parameter("", "robot contract: a name from config/robots or the path of a YAML file")
    prompt: str = _parameter("", "task prompt; empty: wait for ~/set_prompt or ~/prompt")
    framework: str = _parameter("torch", "torch, or jax for an Orbax checkpoint", choices=("torch", "jax"))
    config: str = _parameter("pi05", "policy family of the checkpoint; auto reads it from the checkpoint")
    precision: str | None = _parameter(
        "", "empty: the device's default; nvfp4: in a later version", choices=PRECISIONS, unset=""
    )
    expert: str = _parameter(
        "auto", "how the denoise steps run on a GPU; auto: the fastest that serves (docs/performance.md)",
        choices=("auto", "fused", "chain", "loop"),
    )
    hardware: str = _parameter(
        "auto",
        "auto: a GPU, or the CPU where NVIDIA's driver is not; any: a GPU; cpu; or a GPU architecture's name",
    )
    calibration: str = _parameter(
        "auto",
        "fp8 only. auto: without an artifact in the cache, an activation first calibrates from 8 live "
        "observations and saves them; required: no configuration without one; or a calibration file",
    )
    num_steps: int | None = _parameter(
        0, "denoise steps; 0: the checkpoint's own number", bounds=(0, 100), unset=0
    )
    asset_id: str | None = _parameter(
        "", "which assets/ID of the checkpoint holds the statistics; empty: the only one", unset=""
    )
    action_horizon: int | None = _parameter(
        0, "actions a chunk; 0: what the checkpoint's files say", bounds=(0, 1000), unset=0
    )
    delta_actions: str | None = _parameter(
        "", "true,…,false: which actions are offsets to the state; empty: what the checkpoint's files say",
        unset="",
    )
    rules: str | None = _parameter(
        "", "name=value,…: rules of the checkpoint to override (docs/checkpoints.md)", unset=""
    )
    decode_cuda_graph: bool = _parameter(
        False, "pi0fast: every decode step in one CUDA graph; false: one graph a step, none behind the stop"
    )
    decode_graph_steps: int = _parameter(
        80, "pi0fast: the most tokens of a chunk; without a stop among them it is an error", bounds=(1, 512)
    )
    seed: int | None = _parameter(
        -1, "noise seed of every chunk; -1: fresh noise", bounds=(-1, 2**31 - 1), unset=-1
    )
    autostart: bool = _parameter(False, "configure and activate itself; end when that fails")
    dry_run: bool = _parameter(False, "compute and publish chunks, but send no command")
    allow_other_publishers: bool = _parameter(
        False, "activate, and go on, although another node publishes on a command topic", dynamic=True
    )
    max_policy_failures: int = _parameter(
        DEFAULT_MAX_FAILURES, "failed inferences in a row that latch a fault", bounds=(1, 10000), dynamic=True
    )
    wait_for_frame: bool = _parameter(
        True, "begin inferences with a fresh camera frame, not at once with an older one", dynamic=True
    )
    on_violation: str | None = _parameter(
        "", "what happens to a command beyond a limit; empty: the contract's", name="limits.on_violation",
        choices=("", "clamp", "reject"), unset="", dynamic=True, contract=("limits", "on_violation"),
    )
    velocity_scale: float = _parameter(
        1.0, "share of the contract's velocity limits that commands may use", name="limits.velocity_scale",
        bounds=(0.01, 1.0), dynamic=True,
    )
    open_loop_cap: float | None = _parameter(
        0.0, "how long a chunk may be followed [s]; 0: the contract's", name="timeline.open_loop_cap",
        unset=0.0, dynamic=True, contract=("timeline", "open_loop_cap"),
    )
    blend_steps: int | None = _parameter(
        -1, "actions over which a new chunk is blended in; -1: the contract's", name="timeline.blend_steps",
        unset=-1, dynamic=True, contract=("timeline", "blend_steps"),
    )
    hold_deadline: float | None = _parameter(
        -1.0, "how long a starved robot is held before silence [s]; -1: the contract's",
        name="timeline.hold_deadline", unset=-1.0, dynamic=True, contract=("timeline", "hold_deadline"),
    )
    rtc_mode: str | None = _parameter(
        "", "real-time chunking, how a chunk goes on from the one being played; empty: the contract's",
        name="rtc.mode", choices=("", "off", "guided", "trained"), unset="",
        contract=("timeline", "rtc", "mode"),
    )
    rtc_schedule: str | None = _parameter(
        "", "weights between frozen actions and horizon, guided mode; empty: the contract's",
        name="rtc.schedule", choices=("", "zeros", "ones", "linear", "exp"), unset="", dynamic=True,
        contract=("timeline", "rtc", "schedule"),
    )
    rtc_horizon: int | None = _parameter(
        0, "actions that the chunk being played pulls, guided mode; 0: the contract's", name="rtc.horizon",
        bounds=(0, 1000), unset=0, dynamic=True, contract=("timeline", "rtc", "horizon"),
    )
    rtc_max_guidance: float | None = _parameter(
        0.0, "largest guidance weight, guided mode; 0: the contract's", name="rtc.max_guidance",
        bounds=(0.0, 1000.0), unset=0.0, dynamic=True, contract=("timeline", "rtc", "max_guidance"),
    )
    inference_rate: float | None = _parameter(
        -1.0, "inferences per second [Hz]; 0: back to back; -1: the contract's", name="rates.inference",
        unset=-1.0, dynamic=True, contract=("rates", "inference"),
    )

    @classmethod
    def from_values(cls, given: Mapping[str, Value]) -> PolicyParameters:
        """From values by parameter name, each declared one present. Raises ParameterError."""
        values = {field_name: spec.checked(given[spec.name]) for field_name, spec in _SPECS.items()}
        for name in ("checkpoint", "robot"):
            if not str(values[name]).strip():
                text = f"parameter {name} is not set: pass {name}:=… ({_SPECS[name].description})"
                raise ParameterError(text)
        return cls(**values)  # type: ignore[arg-type]

    def changed(self, changes: Mapping[str, Value]) -> PolicyParameters:
        """These parameters with `changes` by parameter name. Raises ParameterError for a bad value."""
        new = {key: spec.checked(changes[spec.name]) for key, spec in _SPECS.items() if spec.name in changes}
        return replace(self, **new)  # type: ignore[arg-type]

    @property
    def calibration_file(self) -> str | None:
        """The calibration that was named; None for the cache's."""
        return None if self.calibration in ("auto", "required") else self.calibration

    @property
    def contract_overrides(self) -> dict[YamlPath, Value]:
        """What replaces values of the robot contract: key -> value as the file would have it."""
        found: dict[YamlPath, Value] = {}
        for key, spec in _SPECS.items():
            value = getattr(self, key)
            if spec.contract is not None and value is not None:
                back_to_back = spec.contract == ("rates", "inference") and value == 0.0
                found[spec.contract] = "back_to_back" if back_to_back else value
        return found


_SPECS: dict[str, ParameterSpec] = {
    item.name: ParameterSpec(**{
        **item.metadata, "name": item.metadata["name"] or item.name, "default": item.default,
    })
    for item in fields(PolicyParameters)
}
PARAMETERS: tuple[ParameterSpec, ...] = tuple(_SPECS.values())
# Together with the clock, on which everything that is configured depends.
READ_AT_CONFIGURE = frozenset(spec.name for spec in PARAMETERS if not spec.dynamic) | {"use_sim_time"}


def markdown_table(specs: Iterable[ParameterSpec] = PARAMETERS) -> str:
    """The table of docs/node.md."""
    lines = ["| parameter | type | default | while configured | meaning |", "|---|---|---|---|---|"]
    for spec in specs:
        default = f"`{spec.default!r}`".replace("'", '"').replace("True", "true").replace("False", "false")
        meaning = spec.description
        if spec.choices:
            meaning += f" ({' \\| '.join(choice or '\"\"' for choice in spec.choices)})"
        if spec.bounds is not None:
            meaning += f" ({spec.bounds[0]:g} to {spec.bounds[1]:g})"
        kind = {"str": "string", "bool": "bool", "int": "integer", "float": "double"}[
            type(spec.default).__name__
        ]
        may = "may change" if spec.dynamic else "fixed"
        lines.append(f"| `{spec.name}` | {kind} | {default} | {may} | {meaning} |")
    return "\n".join(lines) + "\n"
