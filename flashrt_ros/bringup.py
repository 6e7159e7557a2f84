"""The one list of nodes and launch arguments, used by the launch files and by `flashrt_ros.runner`.

Only the standard library is imported here and the syntax is that of Python 3.10: launch files are also read
by tools whose interpreter cannot load this installation's compiled modules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PACKAGE = "flashrt_ros"

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
PRECISIONS = ("", "fp32", "bf16", "fp16", "fp8", "nvfp4")  # the last: the runtime says that it is for later

# Fast DDS's default shared-memory segment (512 KB) cannot hold one 640x480 RGB image, and the segment is the
# publisher's: without a larger one, two thirds of raw camera images are lost.
FASTDDS_PROFILE_VARIABLE = "FASTRTPS_DEFAULT_PROFILES_FILE"
FASTDDS_PROFILE_FILE = os.path.join("config", "fastdds_images.xml")

# Without these, glibc maps and unmaps every image buffer: page faults double the CPU time of each message.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "536870912",
    "MALLOC_TOP_PAD_": "33554432",
}


RESPAWN_DELAY = 2.0  # [s]
RESPAWN_LIMIT = 2  # times: a fault that comes back is for a person, and each time the robot moves


class BringupError(ValueError):
    """Launch arguments that cannot be used: what was expected, what came, what to do."""


@dataclass(frozen=True)
class LaunchArgument:
    """One `name:=value` argument. `choices` empty means any text."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeSpec:
    """One node to start. Parameter files come first, then `parameters`, which win.

    namespace is "" for none; remappings are (from, to); env is added to the inherited environment;
    arguments are passed to the program before `--ros-args`. A required node's end stops all the others; one
    with `respawn` is started again instead, RESPAWN_DELAY after its end, RESPAWN_LIMIT times in all.
    """

    package: str
    executable: str
    name: str
    namespace: str = ""
    parameter_files: tuple[str, ...] = ()
    parameters: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    remappings: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    log_level: str = "info"
    required: bool = True
    respawn: bool = False


TRUTH = ("true", "false")

PI05_ARGUMENTS: tuple[LaunchArgument, ...] = (
    LaunchArgument("checkpoint", "", "directory of the Pi0.5 checkpoint (required)"),
    LaunchArgument("robot", "demo_arm", "robot contract: a name from config/robots, or a YAML file"),
    LaunchArgument("prompt", "", "task prompt; empty: the parameter file's, or wait for ~/set_prompt"),
    LaunchArgument(
        "precision", "", "fp32 | bf16 | fp16 | fp8; empty: the device's default (nvfp4: not supported yet)",
        PRECISIONS,
    ),
    LaunchArgument("hardware", "", "any: refuse to run without a GPU; auto, cpu, …; empty: params_file's"),
    LaunchArgument("namespace", "", "namespace of the node and of every topic in the contract"),
    LaunchArgument("params_file", "", "ROS parameter file; empty: config/pi05.yaml of this package"),
    LaunchArgument("log_level", "info", "debug | info | warn | error | fatal", LOG_LEVELS),
    LaunchArgument("use_sim_time", "false", "take the time from /clock", TRUTH),
    LaunchArgument(
        "dry_run", "", "true: command nothing; empty: true for a shipped real arm, else as in params_file",
        ("", *TRUTH),
    ),
    LaunchArgument("autostart", "true", "configure and activate the node; false: leave that to you", TRUTH),
    LaunchArgument(
        "respawn", "false",
        f"start the node again when it ends, {RESPAWN_LIMIT} times; with autostart the robot moves again",
        TRUTH,
    ),
)

PI0_ARGUMENTS: tuple[LaunchArgument, ...] = (
    LaunchArgument("checkpoint", "", "directory of the Pi0 checkpoint (required)"),
    *PI05_ARGUMENTS[1:],
)
PI0FAST_ARGUMENTS: tuple[LaunchArgument, ...] = (
    LaunchArgument("checkpoint", "", "directory of the Pi0-FAST checkpoint (required)"),
    *PI05_ARGUMENTS[1:],
)

DEMO_PROMPT = "pick up the red block"
# The demo's policy is untrained: with fresh noise every chunk goes elsewhere, and the arm only jitters.
DEMO_SEED = 7

DEMO_ARGUMENTS: tuple[LaunchArgument, ...] = tuple(
    LaunchArgument("prompt", DEMO_PROMPT, "task prompt") if argument.name == "prompt" else argument
    for argument in PI05_ARGUMENTS
)

ARGUMENTS: dict[str, tuple[LaunchArgument, ...]] = {
    "pi05": PI05_ARGUMENTS,
    "pi0": PI0_ARGUMENTS,
    "pi0fast": PI0FAST_ARGUMENTS,
    "demo": DEMO_ARGUMENTS,
}


def share_directory() -> str:
    """This package's share directory: the installed one, else the source tree that this file lies in.

    Raises BringupError when neither has this package's config/.
    """
    source_tree = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.isfile(os.path.join(source_tree, "package.xml")):
        return source_tree
    try:
        from ament_index_python.packages import get_package_share_directory

        return str(get_package_share_directory(PACKAGE))
    except (ImportError, LookupError) as error:
        raise BringupError(
            f"share directory of {PACKAGE} not found ({error}): source the workspace's setup script first"
        ) from error


def resolve_arguments(declared: Sequence[LaunchArgument], given: Mapping[str, str]) -> dict[str, str]:
    """Every declared argument with its value as text; raises BringupError on unknown names and bad values."""
    known = [argument.name for argument in declared]
    for name in given:
        if name not in known:
            raise BringupError(f"unknown launch argument '{name}': expected one of {', '.join(known)}")
    values = {argument.name: str(given.get(argument.name, argument.default)) for argument in declared}
    for argument in declared:
        truth = set(argument.choices) - {""} == set(TRUTH)
        value = values[argument.name].lower() if truth else values[argument.name]
        if argument.choices and value not in argument.choices:
            allowed = ", ".join(choice or "(empty)" for choice in argument.choices)
            raise BringupError(f"launch argument {argument.name}:={value}: expected one of {allowed}")
        values[argument.name] = value
    return values


def pi05_nodes(args: Mapping[str, str]) -> list[NodeSpec]:
    """The policy node alone, for a robot whose drivers already run.

    args: text by name, as in PI05_ARGUMENTS; what is absent takes its default. Raises BringupError.
    """
    values = resolve_arguments(PI05_ARGUMENTS, args)
    return [_policy_node(values)]


def pi0_nodes(args: Mapping[str, str]) -> list[NodeSpec]:
    """As `pi05_nodes`, with a Pi0 checkpoint; args as in PI0_ARGUMENTS. Raises BringupError."""
    return [_policy_node(resolve_arguments(PI0_ARGUMENTS, args), {"config": "pi0"})]


def pi0fast_nodes(args: Mapping[str, str]) -> list[NodeSpec]:
    """As `pi05_nodes`, with a Pi0-FAST checkpoint; args as in PI0FAST_ARGUMENTS. Raises BringupError."""
    return [_policy_node(resolve_arguments(PI0FAST_ARGUMENTS, args), {"config": "pi0fast"})]


def demo_nodes(args: Mapping[str, str]) -> list[NodeSpec]:
    """The simulated robot and the policy node that drives it; args as in DEMO_ARGUMENTS.

    Raises BringupError.
    """
    values = resolve_arguments(DEMO_ARGUMENTS, args)
    robot = NodeSpec(
        package=PACKAGE,
        executable="demo_robot_node",
        name="demo_robot",
        namespace=values["namespace"],
        parameters={"use_sim_time": values["use_sim_time"] == "true"},
        env=node_environment(),
        log_level=values["log_level"],
    )
    # A parameter file of the user's own decides about these itself.
    chosen: dict[str, int | str] = {} if values["params_file"] else {"seed": DEMO_SEED, "config": "auto"}
    return [robot, _policy_node(values, chosen)]


def node_environment() -> dict[str, str]:
    """Environment that camera images need; a Fast DDS profile already chosen by the user is left alone."""
    environment = dict(MALLOC_ENVIRONMENT, PYTHONUNBUFFERED="1")
    chosen = (FASTDDS_PROFILE_VARIABLE, "FASTDDS_DEFAULT_PROFILES_FILE")
    if not any(os.environ.get(variable) for variable in chosen):
        environment[FASTDDS_PROFILE_VARIABLE] = os.path.join(share_directory(), FASTDDS_PROFILE_FILE)
    return environment


def _policy_node(values: Mapping[str, str], extra: Mapping[str, int | str] | None = None) -> NodeSpec:
    parameters: dict[str, bool | int | float | str] = {
        "checkpoint": _existing_directory("checkpoint", values["checkpoint"]),
        "robot": values["robot"],
        "autostart": values["autostart"] == "true",
        "use_sim_time": values["use_sim_time"] == "true",
    }
    parameters.update(extra or {})
    if values["dry_run"]:
        parameters["dry_run"] = values["dry_run"] == "true"
    # An empty text leaves the choice to the parameter file.
    parameters.update({name: values[name] for name in ("prompt", "precision", "hardware") if values[name]})
    return NodeSpec(
        package=PACKAGE,
        executable="policy_node",
        name="policy_node",
        namespace=values["namespace"],
        parameter_files=_parameter_files(values["robot"], values["params_file"]),
        parameters=parameters,
        env=node_environment(),
        log_level=values["log_level"],
        respawn=values["respawn"] == "true",
    )


def _existing_directory(name: str, value: str) -> str:
    if not value.strip():
        raise BringupError(
            f"no {name} given: pass {name}:=DIR, a policy's directory "
            f"(`flashrt make-checkpoint --size tiny --preset demo_arm --out DIR` writes an untrained one)"
        )
    path = os.path.abspath(os.path.expanduser(value))
    if not os.path.isdir(path):
        raise BringupError(
            f"{name}:={value}: no such directory ({path}); pass the directory that holds the model"
        )
    return path


def _parameter_files(robot: str, given: str) -> tuple[str, ...]:
    """Files in the order in which they are read; of those that set a parameter the last one wins.

    A shipped robot's own file comes after ours and before the user's.
    """
    config = os.path.join(share_directory(), "config")
    own = os.path.join(config, "robots", "parameters", f"{robot}.yaml")
    robots = (own,) if os.path.basename(robot) == robot and os.path.isfile(own) else ()
    if not given:
        return (os.path.join(config, "pi05.yaml"), *robots)
    path = os.path.abspath(os.path.expanduser(given))
    if not os.path.isfile(path):
        raise BringupError(f"params_file:={given}: no such file ({path})")
    return (*robots, path)
