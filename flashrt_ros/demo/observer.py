"""The demo's observer: a node that subscribes to all that robot and policy publish, and records it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState
from trajectory_msgs.msg import JointTrajectory

from flashrt_ros.core.contract import OutputType, RobotContract, StreamSpec, StreamType
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.ingest import NamedValues, image_from_message
from flashrt_ros.core.timing import NS_PER_S, stamp_to_ns
from flashrt_ros.msg import ActionChunk, PolicyStatus

from .recording import ChunkSeen, FrameSeen, Recording, RobotView
from .spinning import SpinningNode, qos_profile, reliable
from .trajectory import CommandError, trajectory_from_message

MESSAGE_TYPES: dict[str, type] = {
    StreamType.IMAGE: Image,
    StreamType.COMPRESSED_IMAGE: CompressedImage,
    StreamType.JOINT_STATE: JointState,
}
POLL_PERIOD = 0.02  # [s]
STATE_NAMES = {
    getattr(PolicyStatus, name): name.removeprefix("STATE_").lower()
    for name in dir(PolicyStatus)
    if name.startswith("STATE_")
}


class Observer(SpinningNode):
    """Records what goes over the topics of `contract`, in a thread of its own, from start() to stop().

    policy_node: name of the node whose ~/action_chunk and ~/status are read. robot_name: the robot's name in
    /diagnostics. frame_period: one image per camera is kept every so many seconds.
    """

    def __init__(
        self,
        contract: RobotContract,
        policy_node: str = "policy_node",
        robot_name: str = "demo_robot",
        frame_period: float = 2.0,
    ) -> None:
        super().__init__("demo_observer")
        self.recording = Recording()
        self.robot = RobotView.from_contract(contract)
        self._robot_name = robot_name
        self._frame_period = round(frame_period * NS_PER_S)
        self._next_frame = {stream.name: 0 for stream in contract.image_streams}
        self._handlers: list[tuple[Subscription, Callable[[Any, dict[str, Any]], None]]] = []
        for stream in contract.streams.values():
            self._subscribe_stream(stream)
        for output in contract.outputs:
            if output.type is OutputType.JOINT_TRAJECTORY:
                self._subscribe(JointTrajectory, output.topic, self._on_command, reliable(50))
        self._subscribe(ActionChunk, f"{policy_node}/action_chunk", self._on_chunk, reliable(50))
        self._subscribe(PolicyStatus, f"{policy_node}/status", self._on_status, reliable(10))
        self._subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, reliable(10))

    def _subscribe(
        self,
        message_type: type,
        topic: str,
        handle: Callable[[Any, dict[str, Any]], None],
        qos: QoSProfile,
        raw: bool = False,
    ) -> None:
        def unused(_message: Any) -> None:
            """Messages are taken by polling."""

        subscription = self.node.create_subscription(message_type, topic, unused, qos, raw=raw)
        self._handlers.append((subscription, handle))

    def _receive(self) -> None:
        # An executor builds a wait set per message: four times the CPU time, taken from the nodes observed.
        while not self._stopping.wait(POLL_PERIOD):
            for subscription, handle in self._handlers:
                while (taken := self._take(subscription)) is not None:
                    handle(*taken)

    @staticmethod
    def _take(subscription: Subscription) -> tuple[Any, dict[str, Any]] | None:
        with subscription.handle:
            taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        return None if taken is None else (taken[0], taken[1])

    def _subscribe_stream(self, stream: StreamSpec) -> None:
        message_type, qos = MESSAGE_TYPES[stream.type], qos_profile(stream.qos)
        qos.depth = max(qos.depth, 50)  # what one late poll may find waiting
        if stream.is_image:
            # Serialised: only the few images kept for the contact sheet are worth deserialising.
            def on_image(data: bytes, _info: dict[str, Any], name: str = stream.name) -> None:
                self._on_image(name, message_type, data)

            self._subscribe(message_type, stream.topic, on_image, qos, raw=True)
        else:
            reader = NamedValues(self.robot.joint_names, stream=stream.name)

            def on_joints(message: JointState, _info: dict[str, Any], name: str = stream.name) -> None:
                self._on_joints(name, reader, message)

            self._subscribe(message_type, stream.topic, on_joints, qos)

    def _on_image(self, stream: str, message_type: type, data: bytes) -> None:
        now, stamp = self.now(), stamp_of_serialised(data)
        self.recording.add_arrival(stream, now, stamp)
        if now < self._next_frame[stream]:
            return
        self._next_frame[stream] = now + self._frame_period
        try:
            image = image_from_message(deserialize_message(data, message_type))
        except IngestError as error:
            self.node.get_logger().warning(f"{stream}: {error}", throttle_duration_sec=5.0)
            return
        self.recording.frames.append(FrameSeen(stream, stamp, np.array(image)))

    def _on_joints(self, stream: str, reader: NamedValues, message: JointState) -> None:
        stamp = stamp_to_ns(message.header.stamp)
        self.recording.add_arrival(stream, self.now(), stamp)
        try:
            positions = reader.read(message)
        except IngestError as error:
            self.node.get_logger().warning(str(error), throttle_duration_sec=5.0)
            return
        self.recording.joint_times.append(stamp)
        self.recording.joint_positions.append(positions)

    def _on_command(self, message: JointTrajectory, info: dict[str, Any]) -> None:
        published = info["source_timestamp"] or self.now()
        try:
            trajectory = trajectory_from_message(message, self.robot.joint_names, published)
        except CommandError as error:
            self.recording.bad_commands.append(str(error))
            return
        self.recording.commands.append((published, trajectory))

    def _on_chunk(self, message: ActionChunk, info: dict[str, Any]) -> None:
        images = [
            stamp_to_ns(stamp)
            for name, stamp in zip(message.observation_streams, message.observation_stamps, strict=True)
            if name in self._next_frame
        ]
        self.recording.chunks.append(
            ChunkSeen(
                published=info["source_timestamp"] or self.now(),
                due=stamp_to_ns(message.header.stamp),
                sequence=message.sequence,
                inference_time=message.inference_time,
                newest_image_stamp=max(images, default=None),
                prompt=message.prompt,
            )
        )

    def _on_status(self, message: PolicyStatus, _info: dict[str, Any]) -> None:
        fields = {name: getattr(message, name) for name in message.get_fields_and_field_types()}
        fields["state_name"] = STATE_NAMES.get(message.state, str(message.state))
        self.recording.statuses.append(fields)

    def _on_diagnostics(self, message: DiagnosticArray, _info: dict[str, Any]) -> None:
        for status in message.status:
            if status.name == self._robot_name:
                self.recording.robot = {item.key: item.value for item in status.values}


def stamp_of_serialised(data: bytes) -> int:
    """Header stamp [ns] of a serialised message that begins with a std_msgs/Header.

    CDR: two bytes of encapsulation kind (the second odd for little endian), two of options, sec, nanosec.
    """
    order = "<" if data[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", data, 4)
    return int(seconds) * NS_PER_S + int(nanoseconds)
