"""Turns the node list of `flashrt_ros.bringup` into actions of `launch` and `launch_ros`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from flashrt_ros.bringup import RESPAWN_DELAY, RESPAWN_LIMIT, LaunchArgument, NodeSpec

if TYPE_CHECKING:
    from launch import LaunchContext


def describe(
    arguments: Sequence[LaunchArgument], nodes: Callable[[Mapping[str, str]], list[NodeSpec]]
) -> LaunchDescription:
    """The launch description of `nodes` with its declared arguments."""

    def start(context: LaunchContext) -> list[Any]:
        names = [argument.name for argument in arguments]
        values = {name: LaunchConfiguration(name).perform(context) for name in names}
        return [node_action(spec) for spec in nodes(values)]

    declared = [
        DeclareLaunchArgument(argument.name, default_value=argument.default, description=argument.description)
        for argument in arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=start)])


def node_action(spec: NodeSpec) -> Node:
    """One node as a launch action; the end of a required node shuts the launch down, unless it is started
    again."""
    options: dict[str, Any] = {"namespace": spec.namespace} if spec.namespace else {}
    if spec.respawn:
        options |= {
            "respawn": True, "respawn_delay": RESPAWN_DELAY, "respawn_max_retries": RESPAWN_LIMIT,
        }
    elif spec.required:
        options["on_exit"] = Shutdown(reason=f"{spec.name} ended")
    return Node(
        package=spec.package,
        executable=spec.executable,
        name=spec.name,
        parameters=[*spec.parameter_files, dict(spec.parameters)],
        remappings=list(spec.remappings),
        additional_env=dict(spec.env),
        arguments=list(spec.arguments),
        ros_arguments=["--log-level", spec.log_level],
        output="screen",
        **options,
    )
