"""Parameters of the policy node: one table gives names, types, defaults, bounds and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import IntegerRange, ParameterDescriptor
from rclpy.node import Node

from flashrt_ros.bringup import PRECISIONS


class ParameterError(ValueError):
    """A parameter's value cannot be used: what was expected, what came, what to do."""


@dataclass(frozen=True)
class ParameterSpec:
    """One ROS parameter; all are read at configure and cannot change while the node runs."""

    name: str
    default: bool | int | str
    description: str
    choices: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None


PARAMETERS: tuple[ParameterSpec, ...] = (
    ParameterSpec("checkpoint", "", "directory of the policy's checkpoint"),
    ParameterSpec("robot", "", "robot contract: a name from config/robots or the path of a YAML file"),
    ParameterSpec("prompt", "", "task prompt; empty: wait for ~/set_prompt"),
    ParameterSpec("framework", "torch", "torch, or jax for an Orbax checkpoint", choices=("torch", "jax")),
    ParameterSpec("config", "pi05", "policy family of the checkpoint; auto reads it from the checkpoint"),
    ParameterSpec("precision", "", "empty: the device's default", choices=PRECISIONS),
    ParameterSpec("hardware", "auto", "auto | cpu | any, or the name of a GPU architecture"),
    ParameterSpec("num_steps", 0, "denoise steps; 0: the checkpoint's own number", bounds=(0, 100)),
    ParameterSpec("seed", -1, "noise seed of every chunk; -1: fresh noise", bounds=(-1, 2**31 - 1)),
    ParameterSpec("autostart", False, "configure and activate itself; end when that fails"),
    ParameterSpec("dry_run", False, "compute and publish chunks, but send no command"),
)

# Together with the clock, on which everything that is configured depends.
READ_AT_CONFIGURE = frozenset(spec.name for spec in PARAMETERS) | {"use_sim_time"}


@dataclass(frozen=True)
class PolicyParameters:
    """Values of PARAMETERS, in the types that the node uses (None for "the default")."""

    checkpoint: str
    robot: str
    prompt: str
    framework: str
    config: str
    precision: str | None
    hardware: str
    num_steps: int | None
    seed: int | None
    autostart: bool
    dry_run: bool


def declare(node: Node) -> None:
    """Declare every parameter of PARAMETERS on the node."""
    for spec in PARAMETERS:
        descriptor = ParameterDescriptor(description=spec.description)
        if spec.choices:
            descriptor.additional_constraints = f"one of: {_listed(spec.choices)}"
        if spec.bounds is not None:
            descriptor.integer_range = [IntegerRange(from_value=spec.bounds[0], to_value=spec.bounds[1])]
        node.declare_parameter(spec.name, spec.default, descriptor)


def read(node: Node) -> PolicyParameters:
    """The parameters' present values; raises ParameterError for one that is missing or out of its choices."""
    values: dict[str, Any] = {spec.name: node.get_parameter(spec.name).value for spec in PARAMETERS}
    for spec in PARAMETERS:
        if spec.choices and values[spec.name] not in spec.choices:
            allowed, value = _listed(spec.choices), values[spec.name]
            raise ParameterError(f"parameter {spec.name}: expected one of {allowed}, got '{value}'")
    for name in ("checkpoint", "robot"):
        if not values[name].strip():
            raise ParameterError(f"parameter {name} is not set: pass {name}:=… ({_spec(name).description})")
    values["precision"] = values["precision"] or None
    values["num_steps"] = values["num_steps"] or None
    values["seed"] = None if values["seed"] < 0 else values["seed"]
    return PolicyParameters(**values)


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(choice or "(empty)" for choice in choices)


def _spec(name: str) -> ParameterSpec:
    return next(spec for spec in PARAMETERS if spec.name == name)
