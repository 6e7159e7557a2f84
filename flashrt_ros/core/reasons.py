"""Reason codes: why the node waits, holds, stops or refuses. The numbers are stable, ~/status has them."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Stable numeric reason with a one-line description in `.text`; grouped by hundreds."""

    text: str

    def __new__(cls, value: int, text: str) -> Reason:
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member

    @property
    def concerns_input(self) -> bool:
        """Whether it is about streams or what their messages hold, the 100s and 200s."""
        return 100 <= self < 300

    OK = 0, "nothing to report"

    # 100s: streams
    NO_MESSAGE = 101, "no message of a stream has come yet"
    STALE_RECEIPT = 102, "the newest message of a stream was received too long ago"
    STALE_STAMP = 103, "the newest header stamp of a stream is too old"
    SKEW = 104, "no set of messages lies within the allowed skew"
    CLOCK = 105, "a header stamp lies in the future: the clocks disagree"
    CLOCK_RATE = 106, "the simulated clock does not keep real time; commands go by real time"
    STAMP_UNSET = 107, "the header stamp of a stream is not set"

    # 200s: content of a message
    IMAGE_ENCODING = 201, "an image encoding is not supported or has changed"
    IMAGE_SIZE = 202, "an image's size, step and data do not agree or have changed"
    IMAGE_DECODE = 203, "a compressed image is truncated or cannot be decoded"
    JOINT_MISSING = 204, "a joint of the contract is not in the message"
    JOINT_NOT_FINITE = 205, "a joint value is NaN or infinite"
    JOINT_FIELD = 206, "a joint message has names without values"
    JOINT_DUPLICATE = 207, "a joint message names a joint twice"

    # 300s: chunks and commands
    CHUNK_NOT_FINITE = 301, "a chunk holds NaN or infinite actions and was dropped"
    CHUNK_SHAPE = 302, "a chunk's shape is not (horizon, dof)"
    LIMIT_POSITION = 303, "an action lies outside a joint's position limits"
    LIMIT_VELOCITY = 304, "an action needs more than a joint's velocity limit"
    STARVED = 305, "the actions ran out before a new chunk came: holding"
    HOLD_DEADLINE = 306, "held longer than the hold deadline: commands stopped"
    OLD_GENERATION = 307, "a chunk was computed before the last reset and was dropped"
    CHUNK_LATE = 308, "a chunk came too late: its actions were already due or its observation is too old"
    CHUNK_ORDER = 309, "a chunk's observation is older than that of the chunk being played"
    NO_CHUNK = 310, "no chunk has come yet"
    START_OUTSIDE_LIMITS = 311, "the measured joints lie outside the limits: move them inside before starting"
    CONTROL_STALLED = 312, "control ticks stopped coming for a while: the chunk was dropped, holding"
    HELD = 313, "held on request: call ~/resume to go on"
    COMMAND_CONFLICT = 314, "another node publishes on a command topic"
    RTC_DELAY = 315, "more actions are consumed during an inference than real-time chunking was trained for"
    NO_STOP_TOKEN = 316, "a chunk's action tokens reached their limit without a stop: it was dropped"
    ACTION_TOKENS = 317, "a chunk's action tokens mean no actions: it was dropped"
    LIMIT_ACCELERATION = 320, "an action changes a joint's speed faster than its acceleration limit"

    # 400s: runtime
    INFERENCE_ERROR = 401, "the policy raised an error"
    # 402 was in use once: do not give it again
    WORKER_STOPPED = 403, "the inference worker has been stopped"
    CONTROL_ERROR = 404, "the control callback raised an error"
    OUT_OF_MEMORY = 405, "the device has no memory left"
    DEVICE_LOST = 406, "the GPU is lost to this process: it must be started again"

    # 500s: configuration
    CONTRACT_INVALID = 501, "the robot contract is not valid"
    POLICY_MISMATCH = 502, "the checkpoint does not fit the robot contract"
    CHECKPOINT_INVALID = 503, "the checkpoint cannot be loaded"
    PROMPT_INVALID = 504, "the prompt is empty or too long"
    PARAMETER_INVALID = 505, "a parameter value is not valid"

    # 600s: bags and calibration
    BAG_UNREADABLE = 601, "a bag cannot be read: damaged, truncated, empty or no bag at all"
    BAG_TOPIC_MISSING = 602, "a topic that the contract needs is not in the bag"
    BAG_TOPIC_TYPE = 603, "a topic of the bag has another message type than the contract's"
    BAG_CLOCK_JUMP = 604, "the clocks jump within a bag"
    BAG_FROZEN = 605, "every frame of a camera in a bag is the same"
    BAG_FEW_SAMPLES = 606, "a bag gives fewer observations than were asked for"
    DATASET_INVALID = 607, "a dataset's files are not what their layout promises, or nothing fits"
    CALIBRATION_MISMATCH = 611, "a calibration belongs to another checkpoint, precision or set of views"
    CALIBRATION_CORRUPT = 612, "a calibration file is damaged or of another version"
    CALIBRATION_MISSING = 613, "the node requires a calibration and there is none for this checkpoint"
    CALIBRATION_CANCELLED = 614, "the calibration was cancelled"
    CALIBRATION_FAILED = 615, "the calibration could not be completed"
    CALIBRATING = 616, "calibrating: nothing is commanded until it is done"
    CALIBRATION_REFUSED = 617, "a calibration was asked for while the node drives the robot: refused"
