"""Data model of a robot contract: frozen dataclasses, times in int nanoseconds, no parsing.

Joint mapping, used everywhere: with gain = sign * scale,

    policy value = gain * robot value + offset          (positions)
    policy value = gain * robot value                   (velocities and increments)

so `scale` turns the robot's rad or m into the policy's unit (180/pi for degrees). A gripper is given by its
two ends instead:

    policy value = policy_closed + (robot value - closed) / (open - closed) * (policy_open - policy_closed)

which is the same straight line with gain = (policy_open - policy_closed) / (open - closed). Where actions
have another line than the state (openpi's ALOHA), action_closed and action_open give it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .contract_yaml import SourceMap
from .errors import ChunkError
from .reasons import Reason

FloatArray = NDArray[np.float64]


class Representation(StrEnum):
    """What the numbers of an action mean."""

    ABSOLUTE = "absolute"  # joint positions
    DELTA = "delta"        # increments per action
    VELOCITY = "velocity"  # joint velocities

    @property
    def code(self) -> int:
        """ActionChunk.REPRESENTATION_* constant."""
        return list(Representation).index(self)


class StreamType(StrEnum):
    """Message types that a stream may carry."""

    IMAGE = "sensor_msgs/msg/Image"
    COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
    JOINT_STATE = "sensor_msgs/msg/JointState"


class OutputType(StrEnum):
    """Message types that commands may go out as."""

    JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
    FLOAT64_MULTI_ARRAY = "std_msgs/msg/Float64MultiArray"


class Stamp(StrEnum):
    """header.stamp of a JointTrajectory."""

    DUE = "due"    # when its first point is due
    ZERO = "zero"  # 0, which controllers take for "on arrival"


class ColourOrder(StrEnum):
    """What a camera's three or four channels are."""

    DECLARED = "declared"  # what the message says
    RGB = "rgb"
    BGR = "bgr"


class RtcMode(StrEnum):
    """Real-time chunking: how the previous chunk's remainder enters the next inference."""

    OFF = "off"
    GUIDED = "guided"
    TRAINED = "trained"


class OnViolation(StrEnum):
    """What happens to a command beyond a limit."""

    CLAMP = "clamp"
    REJECT = "reject"


@dataclass(frozen=True)
class Qos:
    """Quality of service of a subscription, in ROS's words."""

    reliability: str = "best_effort"
    durability: str = "volatile"
    depth: int = 5


@dataclass(frozen=True)
class Crop:
    """Rectangle kept of a camera image [pixels]."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class StreamSpec:
    """One subscribed topic; `view` is the policy's name for a camera, None for joint states."""

    name: str
    topic: str
    type: StreamType
    view: str | None
    qos: Qos
    optional: bool
    crop: Crop | None
    max_age: int
    colour_order: ColourOrder = ColourOrder.DECLARED

    @property
    def is_image(self) -> bool:
        return self.type is not StreamType.JOINT_STATE


@dataclass(frozen=True)
class JointLimits:
    """Bounds of a joint in the robot's unit: position [rad or m], speed [rad/s or m/s], acceleration
    [rad/s² or m/s²], None for no bound."""

    lower: float
    upper: float
    velocity: float
    acceleration: float | None = None


@dataclass(frozen=True)
class JointSpec:
    """One joint; sign, scale and offset as in the module's formula. message_name: its name in ROS messages,
    "" where it is `name`. action_line: gain and offset of its actions, None where they are the state's."""

    name: str
    unit: str
    sign: int
    scale: float
    offset: float
    limits: JointLimits | None
    policy_name: str
    message_name: str = ""
    action_line: tuple[float, float] | None = None

    @property
    def in_messages(self) -> str:
        """Its name in JointState and JointTrajectory messages."""
        return self.message_name or self.name

    @property
    def gain(self) -> float:
        return self.sign * self.scale

    @property
    def commanded(self) -> JointSpec:
        """This joint with the sign, scale and offset of its actions."""
        if self.action_line is None:
            return self
        gain, offset = self.action_line
        return replace(self, sign=-1 if gain < 0 else 1, scale=abs(gain), offset=offset, action_line=None)


class JointMapping:
    """Robot units to policy units and back for an ordered list of joints. Arrays (..., joints) float64."""

    def __init__(self, joints: Sequence[JointSpec]) -> None:
        self._gain = np.array([joint.gain for joint in joints], dtype=np.float64)
        self._offset = np.array([joint.offset for joint in joints], dtype=np.float64)

    def to_policy(self, values: ArrayLike, *, rates: bool = False) -> FloatArray:
        """gain * robot value + offset; `rates`: velocities or increments, no offset."""
        scaled = np.asarray(values, dtype=np.float64) * self._gain
        return scaled if rates else scaled + self._offset

    def to_robot(self, values: ArrayLike, *, rates: bool = False) -> FloatArray:
        """(policy value - offset) / gain; `rates`: velocities or increments, no offset."""
        array = np.asarray(values, dtype=np.float64)
        return (array if rates else array - self._offset) / self._gain


@dataclass(frozen=True)
class StateSource:
    """Part of the state vector: these joints' `field` (position or velocity) of one JointState stream."""

    stream: str
    field: str
    joints: tuple[str, ...]


@dataclass(frozen=True)
class StateSpec:
    """The state vector: its sources' joints, one after the other."""

    sources: tuple[StateSource, ...]

    @property
    def width(self) -> int:
        return sum(len(source.joints) for source in self.sources)


@dataclass(frozen=True)
class ActionSpec:
    """The action vector: meaning, time between two actions [ns], joints in the policy's order."""

    representation: Representation
    period: int
    joints: tuple[str, ...]


@dataclass(frozen=True)
class OutputSpec:
    """One command topic; `lookahead` [ns] is how far a JointTrajectory reaches, 0 for Float64MultiArray.

    joints: those that its controller has, in its order; empty for all of the action's.
    """

    topic: str
    type: OutputType
    lookahead: int
    joints: tuple[str, ...] = ()
    stamp: Stamp = Stamp.DUE


@dataclass(frozen=True)
class SyncSpec:
    """Largest difference of stamps within one observation, and default largest age of its messages [ns]."""

    max_skew: int
    max_age: int


@dataclass(frozen=True)
class RatesSpec:
    """Period of commands [ns]; inference by a period [ns] or when less than `inference_watermark` [ns] is
    left to play; back to back when both are None."""

    control_period: int
    inference_period: int | None
    inference_watermark: int | None = None


@dataclass(frozen=True)
class RtcSpec:
    """Real-time chunking. horizon: actions over which the previous chunk pulls; schedule: zeros, ones, linear
    or exp, its weights there."""

    mode: RtcMode = RtcMode.OFF
    schedule: str = "linear"
    horizon: int = 10
    max_guidance: float = 10.0


@dataclass(frozen=True)
class TimelineSpec:
    """How long a chunk may be followed [ns], actions blended at a seam, how long a hold may last [ns]."""

    open_loop_cap: int
    blend_steps: int
    hold_deadline: int
    rtc: RtcSpec = RtcSpec()


@dataclass(frozen=True)
class RobotContract:
    """Everything the node knows about a robot; built by `load_contract` from a file of config/robots/."""

    robot: str
    streams: Mapping[str, StreamSpec]
    joints: Mapping[str, JointSpec]
    state: StateSpec
    action: ActionSpec
    outputs: tuple[OutputSpec, ...]
    on_violation: OnViolation
    sync: SyncSpec
    rates: RatesSpec
    timeline: TimelineSpec
    source: SourceMap = field(default_factory=SourceMap, compare=False, repr=False)

    @property
    def dof(self) -> int:
        """Width of the action vector."""
        return len(self.action.joints)

    @property
    def action_joints(self) -> tuple[JointSpec, ...]:
        """Specs of the commanded joints, in action order, with the mapping of actions."""
        return tuple(self.joints[name].commanded for name in self.action.joints)

    def message_names(self, joints: Sequence[str]) -> tuple[str, ...]:
        """The names that these joints of the contract have in ROS messages."""
        return tuple(self.joints[name].in_messages for name in joints)

    @property
    def shares_message_names(self) -> bool:
        """Whether different joints of the state have one name in messages (two arms, each on its topic), so
        that one message cannot hold both."""
        found: dict[str, str] = {}
        measured = [(source.stream, name) for source in self.state.sources for name in source.joints]
        streams = {name: stream for stream, name in measured}
        for _, name in measured:
            other = found.setdefault(self.joints[name].in_messages, name)
            if other != name and streams[other] != streams[name]:
                return True
        return False

    @property
    def image_streams(self) -> tuple[StreamSpec, ...]:
        """Streams that carry a view, in file order."""
        return tuple(stream for stream in self.streams.values() if stream.is_image)

    @property
    def views(self) -> tuple[str, ...]:
        """View names, in file order."""
        return tuple(stream.view for stream in self.image_streams if stream.view is not None)

    @property
    def trajectory_lookahead(self) -> int:
        """Longest lookahead among the outputs [ns]; 0 when none is a JointTrajectory."""
        return max(output.lookahead for output in self.outputs)

    @property
    def outliving(self) -> tuple[str, ...]:
        """Topics whose last command goes on moving the robot if this node dies: velocities."""
        velocity = self.action.representation is Representation.VELOCITY
        return tuple(output.topic for output in self.outputs) if velocity else ()

    def actions_to_robot(self, actions: ArrayLike) -> FloatArray:
        """Policy actions (horizon, dof) in the policy's units -> (horizon, dof) float64 in the robot's units.

        Raises ChunkError (CHUNK_SHAPE) for any other shape.
        """
        shape = np.shape(actions)
        if len(shape) != 2 or shape[1] != self.dof:
            text = f"expected actions of shape (horizon, {self.dof}), got {shape}"
            raise ChunkError(Reason.CHUNK_SHAPE, text)
        mapping = JointMapping(self.action_joints)
        return mapping.to_robot(actions, rates=self.action.representation is not Representation.ABSOLUTE)

    def actions_to_policy(self, actions: FloatArray) -> FloatArray:
        """Actions (n, dof) in the robot's units -> (n, dof) float64 in the policy's units."""
        mapping = JointMapping(self.action_joints)
        return mapping.to_policy(actions, rates=self.action.representation is not Representation.ABSOLUTE)
