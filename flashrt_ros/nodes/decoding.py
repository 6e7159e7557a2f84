"""Serialised messages of a bag as real ROS messages."""

from __future__ import annotations

from typing import Any

from rclpy.serialization import deserialize_message

from flashrt_ros.core.bag_reader import Decoder


def ros_decoder() -> Decoder:
    """Decodes every message type that is installed here; raises ValueError or ImportError for any other."""
    kinds: dict[str, Any] = {}

    def decode(type_name: str, data: bytes) -> Any:
        if type_name not in kinds:
            kinds[type_name] = _message_class(type_name)
        return deserialize_message(data, kinds[type_name])

    return decode


def _message_class(type_name: str) -> Any:
    package, kind, name = type_name.split("/")
    return getattr(__import__(f"{package}.{kind}", fromlist=[name]), name)
