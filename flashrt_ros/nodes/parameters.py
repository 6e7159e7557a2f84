"""Parameters of the policy node as ROS has them: declared from, and read into, `core.parameters`."""

from __future__ import annotations

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node

from flashrt_ros.core.parameters import PARAMETERS, ParameterSpec, PolicyParameters


def declare(node: Node) -> None:
    """Declare every parameter on the node, with its words and bounds."""
    for spec in PARAMETERS:
        node.declare_parameter(spec.name, spec.default, _descriptor(spec))


def read(node: Node) -> PolicyParameters:
    """The parameters' present values; raises ParameterError for one that is missing or out of its choices."""
    values = {spec.name: node.get_parameter(spec.name).value for spec in PARAMETERS}
    return PolicyParameters.from_values(values)


def _descriptor(spec: ParameterSpec) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(description=spec.description)
    if spec.choices:
        descriptor.additional_constraints = f"one of: {spec.listed}"
    if spec.bounds is not None:
        lower, upper = spec.bounds
        if isinstance(spec.default, int):
            descriptor.integer_range = [IntegerRange(from_value=int(lower), to_value=int(upper))]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=lower, to_value=upper)]
    return descriptor
