"""Subscriptions of the contract's streams. Callbacks note the times and keep a reference to the message."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, JointState

from flashrt_ros.core.contract import Qos, RobotContract, StreamSpec, StreamType
from flashrt_ros.core.refusals import MessageInspector
from flashrt_ros.core.sync import Synchroniser
from flashrt_ros.core.timing import stamp_to_ns

STREAM_MESSAGES: dict[StreamType, type] = {
    StreamType.IMAGE: Image,
    StreamType.COMPRESSED_IMAGE: CompressedImage,
    StreamType.JOINT_STATE: JointState,
}


def qos_profile(qos: Qos) -> QoSProfile:
    """A contract's quality of service as a profile of rclpy."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=qos.depth,
        reliability=ReliabilityPolicy[qos.reliability.upper()],
        durability=DurabilityPolicy[qos.durability.upper()],
    )


def subscribe(
    node: Node, contract: RobotContract, synchroniser: Synchroniser, on_image: Callable[[], None],
    inspector: MessageInspector | None = None,
) -> list[Subscription]:
    """Subscribe every stream to push into `synchroniser`; `on_image` follows each camera message.

    `inspector` counts the messages that cannot be used.
    """
    clock = node.get_clock()
    return [
        node.create_subscription(
            STREAM_MESSAGES[stream.type],
            stream.topic,
            stream_callback(stream, synchroniser, on_image, inspector, lambda: clock.now().nanoseconds),
            qos_profile(stream.qos),
        )
        for stream in contract.streams.values()
    ]


def stream_callback(
    stream: StreamSpec, synchroniser: Synchroniser, on_image: Callable[[], None],
    inspector: MessageInspector | None, now_ros_ns: Callable[[], int],
) -> Callable[[Any], None]:
    """What is done with each message of a stream; never raises for what a message holds."""
    name = stream.name

    def on_joints(message: Any) -> None:
        stamp = stamp_to_ns(message.header.stamp)
        synchroniser.push(name, stamp, time.monotonic_ns(), message)
        if inspector is not None:
            inspector.inspect(name, stamp, now_ros_ns(), message)

    def on_camera(message: Any) -> None:
        on_joints(message)
        on_image()

    return on_camera if stream.is_image else on_joints
