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
    node: Node, contract: RobotContract, synchroniser: Synchroniser, on_image: Callable[[], None]
) -> list[Subscription]:
    """Subscribe every stream to push into `synchroniser`; `on_image` follows each camera message."""
    return [
        node.create_subscription(
            STREAM_MESSAGES[stream.type],
            stream.topic,
            _callback(stream, synchroniser, on_image),
            qos_profile(stream.qos),
        )
        for stream in contract.streams.values()
    ]


def _callback(
    stream: StreamSpec, synchroniser: Synchroniser, on_image: Callable[[], None]
) -> Callable[[Any], None]:
    name, push = stream.name, synchroniser.push

    def on_joints(message: Any) -> None:
        push(name, stamp_to_ns(message.header.stamp), time.monotonic_ns(), message)

    def on_camera(message: Any) -> None:
        push(name, stamp_to_ns(message.header.stamp), time.monotonic_ns(), message)
        on_image()

    return on_camera if stream.is_image else on_joints
