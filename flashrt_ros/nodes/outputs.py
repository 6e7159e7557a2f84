"""Messages that leave the policy node: commands of a control tick, and action chunks."""

from __future__ import annotations

import array
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from numpy.typing import NDArray
from rclpy.duration import Duration as RclpyDuration
from std_msgs.msg import Float64MultiArray, Header
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from flashrt_ros.core.commander import Output
from flashrt_ros.core.contract import OutputSpec, OutputType, RobotContract, Stamp
from flashrt_ros.core.timing import NS_PER_S, to_s
from flashrt_ros.core.trajectory import TrajectoryPoints, cut
from flashrt_ros.msg import ActionChunk

if TYPE_CHECKING:
    from rclpy.node import Node
    from rclpy.publisher import Publisher

COMMAND_DEPTH = 10
ARRIVAL_PATIENCE = RclpyDuration(seconds=0.2)  # for the last command to be acknowledged

MESSAGES: dict[OutputType, type] = {
    OutputType.JOINT_TRAJECTORY: JointTrajectory,
    OutputType.FLOAT64_MULTI_ARRAY: Float64MultiArray,
}


def time_message(nanoseconds: int) -> Time:
    """ROS time in ns as builtin_interfaces/Time."""
    seconds, rest = divmod(nanoseconds, NS_PER_S)
    return Time(sec=seconds, nanosec=rest)


def trajectory_message(points: TrajectoryPoints, joints: tuple[str, ...], stamp: int) -> JointTrajectory:
    """JointTrajectory whose first point is due at `stamp` [ns, ROS time]."""
    message = JointTrajectory(header=Header(stamp=time_message(stamp)), joint_names=list(joints))
    rows = zip(points.offsets, points.positions, points.velocities, strict=True)
    message.points = [
        JointTrajectoryPoint(
            positions=_doubles(position),
            velocities=_doubles(velocity),
            time_from_start=_duration(int(offset)),
        )
        for offset, position, velocity in rows
    ]
    return message


def chunk_message(
    actions: NDArray[np.float64],
    contract: RobotContract,
    *,
    due: int,
    prompt: str,
    sequence: int,
    generation: int,
    stamps: Mapping[str, int],
    inference_time: float,
) -> ActionChunk:
    """ActionChunk of actions (horizon, dof) in robot units; `due`: when action 0 is due [ns, ROS time].

    stamps: header stamp [ns, ROS time] of each stream the observation was made of; inference_time [s].
    """
    horizon, dof = actions.shape
    return ActionChunk(
        header=Header(stamp=time_message(due)),
        joint_names=list(contract.action.joints),
        representation=contract.action.representation.code,
        step_period=to_s(contract.action.period),
        horizon=horizon,
        dof=dof,
        data=_doubles(actions),
        prompt=prompt,
        sequence=sequence,
        generation=generation,
        observation_streams=list(stamps),
        observation_stamps=[time_message(stamp) for stamp in stamps.values()],
        inference_time=inference_time,
    )


class Command:
    """What one output of the contract sends: the joints that its controller has, by the robot's names."""

    def __init__(self, spec: OutputSpec, contract: RobotContract) -> None:
        joints = spec.joints or contract.action.joints
        self._spec = spec
        self._names = contract.message_names(joints)
        self._columns = [contract.action.joints.index(name) for name in joints]

    def message(self, output: Output, stamp: int) -> Float64MultiArray | JointTrajectory | None:
        """One tick's command, due at `stamp` [ns, ROS time]; None for silence."""
        if output.values is None:
            return None
        if self._spec.type is OutputType.FLOAT64_MULTI_ARRAY:
            return Float64MultiArray(data=_doubles(output.values[self._columns]))
        if output.trajectory is None:
            return None
        points = cut(output.trajectory, self._spec.lookahead)
        mine = TrajectoryPoints(
            points.offsets, points.positions[:, self._columns], points.velocities[:, self._columns]
        )
        return trajectory_message(mine, self._names, stamp if self._spec.stamp is Stamp.DUE else 0)


class CommandPublisher:
    """The contract's command topics. They have publishers between `open` and `close` only: a node that must
    not command is none of those that do.

    `publish` is for one thread at a time: control, and whoever ended it.
    """

    def __init__(self, node: Node, contract: RobotContract) -> None:
        self._node = node
        self._outputs = contract.outputs
        self._commands = [Command(output, contract) for output in contract.outputs]
        self._publishers: list[Publisher] = []

    def open(self) -> None:
        """Create the publishers. A subscriber that discovery knows gets what is sent first."""
        self._publishers = [
            self._node.create_publisher(MESSAGES[output.type], output.topic, COMMAND_DEPTH)
            for output in self._outputs
        ]

    def publish(self, output: Output, stamp: int) -> None:
        """Send one tick's command, due at `stamp` [ns, ROS time], on every topic; silence sends nothing."""
        if output.values is None:
            return
        for command, publisher in zip(self._commands, self._publishers, strict=False):  # none while closed
            if (message := command.message(output, stamp)) is not None:
                publisher.publish(message)

    def topics(self) -> list[str]:
        """Resolved names of the command topics."""
        return [self._node.resolve_topic_name(output.topic) for output in self._outputs]

    @property
    def opened(self) -> bool:
        """Whether there are publishers."""
        return bool(self._publishers)

    def close(self) -> None:
        """Take the publishers down, once what was sent last has arrived. May be called twice."""
        publishers, self._publishers = self._publishers, []
        for publisher in publishers:
            with contextlib.suppress(Exception):  # the context may be gone; they must come down all the same
                publisher.wait_for_all_acked(ARRIVAL_PATIENCE)
            self._node.destroy_publisher(publisher)


def _doubles(values: NDArray[np.float64]) -> Any:
    # array.array is the only type that rclpy takes without checking every element.
    return array.array("d", np.ascontiguousarray(values, dtype=np.float64).tobytes())


def _duration(nanoseconds: int) -> Duration:
    seconds, rest = divmod(nanoseconds, NS_PER_S)
    return Duration(sec=seconds, nanosec=rest)
