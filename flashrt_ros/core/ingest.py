"""From a synchronised set of messages to an Observation: decode images, read joints by name, map units.

The same code serves live topics and bags. Nothing is resized here: the runtime does that, by the policy's
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract_model import FloatArray, JointMapping, RobotContract, StateSource, StreamSpec, StreamType
from .errors import DamagedImageError, IngestError
from .images import FallbackDecoder, RgbImage, crop_image, image_from_message
from .observation import Observation
from .reasons import Reason
from .sync import Snapshot, Synchroniser
from .timing import to_s

__all__ = [
    "Ingest", "JointReader", "MeasuredPositions", "NamedValues", "image_from_message", "measuring_stream",
]

DECODER_THREADS = 3  # with the worker's own, four cameras at a time


class NamedValues:
    """Reads one field of JointState messages for a fixed list of joints, by name, whatever their order."""

    def __init__(self, names: Sequence[str], field: str = "position", stream: str = "") -> None:
        self._names = tuple(names)
        self._field = field
        self._stream = stream
        # Names of the last message and where ours stand in it; one attribute, so that two threads may read.
        self._found: tuple[list[str], list[int]] = ([], [])

    def read(self, message: Any) -> FloatArray:
        """Values (len(names),) float64 in the message's units.

        Raises IngestError: JOINT_MISSING, JOINT_DUPLICATE, JOINT_FIELD (names without values),
        JOINT_NOT_FINITE.
        """
        names, indices = self._found
        if message.name != names or not indices:
            names = list(message.name)
            indices = self._find(names)
            self._found = names, indices
        values = getattr(message, self._field)
        if len(values) != len(names):
            text = f"{len(names)} joint names, but {len(values)} values of {self._field}"
            raise IngestError(Reason.JOINT_FIELD, self._stream, text)
        read = np.array([values[index] for index in indices], dtype=np.float64)
        for index in np.flatnonzero(~np.isfinite(read)):
            text = f"{self._field} of joint {self._names[index]} is {read[index]}"
            raise IngestError(Reason.JOINT_NOT_FINITE, self._stream, text)
        return read

    def _find(self, names: list[str]) -> list[int]:
        index = {name: position for position, name in enumerate(names)}
        if missing := [name for name in self._names if name not in index]:
            text = f"joint {', '.join(missing)} is not in the message, which has {', '.join(names) or 'none'}"
            raise IngestError(Reason.JOINT_MISSING, self._stream, text)
        if twice := [name for name in self._names if names.count(name) > 1]:
            text = f"joint {', '.join(twice)} is named more than once"
            raise IngestError(Reason.JOINT_DUPLICATE, self._stream, text)
        return [index[name] for name in self._names]


class JointReader:
    """The policy's state vector from JointState messages."""

    def __init__(self, contract: RobotContract, *, contract_names: bool = False) -> None:
        """contract_names: messages name joints as the contract does, rather than as the robot's drivers."""
        self._parts = [
            (
                source,
                NamedValues(
                    source.joints if contract_names else contract.message_names(source.joints),
                    source.field,
                    source.stream,
                ),
                JointMapping([contract.joints[name] for name in source.joints]),
            )
            for source in contract.state.sources
        ]

    def state(self, messages: Mapping[str, Any]) -> NDArray[np.float32]:
        """State (state_dim,) float32 in the policy's units and order, from messages by stream name.

        Raises IngestError as NamedValues.read does.
        """
        return np.concatenate([
            self._part(source, reader, mapping, messages[source.stream])
            for source, reader, mapping in self._parts
        ])

    def state_from_message(self, message: Any) -> NDArray[np.float32]:
        """As `state`, for a contract whose state comes from one stream."""
        return self.state({source.stream: message for source, _, _ in self._parts})

    @staticmethod
    def _part(
        source: StateSource, reader: NamedValues, mapping: JointMapping, message: Any
    ) -> NDArray[np.float32]:
        values = mapping.to_policy(reader.read(message), rates=source.field == "velocity")
        with np.errstate(over="ignore"):
            state = values.astype(np.float32)
        if not np.isfinite(state).all():
            name = source.joints[int(np.flatnonzero(~np.isfinite(state))[0])]
            text = f"{source.field} of joint {name} is beyond what a policy can take"
            raise IngestError(Reason.JOINT_NOT_FINITE, source.stream, text)
        return state


class Ingest:
    """Snapshots to Observations. Not thread-safe: it belongs to the worker.

    Remembers each camera's encoding and size from its first good message until `reset`: a change in the
    running system means a reconfigured camera, and is refused rather than shown to the policy.
    """

    def __init__(
        self, contract: RobotContract, fallback_decoder: FallbackDecoder | None = None,
        on_refused: Callable[[str, Reason], None] = lambda _stream, _reason: None,
    ) -> None:
        """`fallback_decoder`: see image_from_message. on_refused(stream, reason): told once of each message
        that only decoding, or comparison with those before, has shown to be bad."""
        self._contract = contract
        self._joints = JointReader(contract)
        self._fallback_decoder = fallback_decoder
        self._on_refused = on_refused
        self._told: dict[str, Any] = {}  # the last message of each stream that on_refused was told of
        self._formats: dict[str, tuple[str, tuple[int, int]]] = {}

    def reset(self) -> None:
        """Accept any camera format anew (activate)."""
        self._formats.clear()

    def observe(self, snapshot: Snapshot) -> Observation:
        """Decode a set of messages, several compressed cameras at a time.

        Raises IngestError naming the stream and what is wrong with its message. An optional camera whose
        image is refused is absent, as if it were silent.
        """
        payloads = {name: item.payload for name, item in snapshot.messages.items()}
        state = self._joints.state(payloads)
        sent = [stream for stream in self._contract.image_streams if stream.name in payloads]
        decoded = self._decoded(sent, payloads)
        present = [stream for stream in sent if stream.name in decoded]
        images = {stream.view: decoded[stream.name] for stream in present if stream.view}
        refused = {stream.name for stream in sent} - decoded.keys()
        stamps = {name: item.stamp for name, item in snapshot.messages.items() if name not in refused}
        newest = max((stamps[stream.name] for stream in present), default=0)
        absent = tuple(view for view in self._contract.views if view not in images)
        return Observation(images, state, stamps, newest, absent)

    def _decoded(self, streams: Sequence[StreamSpec], payloads: Mapping[str, Any]) -> dict[str, RgbImage]:
        """Images by stream, without optional ones that were refused; compressed ones beyond the first on the
        pool's threads."""
        packed = [stream for stream in streams if stream.type is StreamType.COMPRESSED_IMAGE]
        waiting = {
            stream.name: decoder_pool().submit(self._decode, stream, payloads[stream.name])
            for stream in packed[1:]
        }
        found: dict[str, RgbImage] = {}
        try:
            for stream in streams:
                message, pending = payloads[stream.name], waiting.get(stream.name)
                try:
                    whole = self._decode(stream, message) if pending is None else pending.result()
                    found[stream.name] = self._checked(stream, message, whole)
                except IngestError as error:
                    if isinstance(error, DamagedImageError):
                        self._tell(stream.name, error.reason, message)
                    if not stream.optional:
                        raise
        finally:
            wait(waiting.values())  # none may still read a message once this has returned
        return found

    def _decode(self, stream: StreamSpec, message: Any) -> RgbImage:
        return image_from_message(
            message, stream=stream.name, fallback_decoder=self._fallback_decoder,
            colour_order=stream.colour_order,
        )

    def _checked(self, stream: StreamSpec, message: Any, whole: RgbImage) -> RgbImage:
        """Cropped; refused where it is another format than the camera had."""
        encoding = str(getattr(message, "encoding", None) or getattr(message, "format", ""))
        height, width = whole.shape[:2]
        known_encoding, known_size = self._formats.setdefault(stream.name, (encoding, (height, width)))
        if encoding != known_encoding:
            text = f"encoding changed from {known_encoding!r} to {encoding!r}: activate anew to accept it"
            self._tell(stream.name, Reason.IMAGE_ENCODING, message)
            raise IngestError(Reason.IMAGE_ENCODING, stream.name, text)
        if (height, width) != known_size:
            old = f"{known_size[1]} x {known_size[0]}"
            text = f"size changed from {old} to {width} x {height} pixels: activate anew to accept it"
            self._tell(stream.name, Reason.IMAGE_SIZE, message)
            raise IngestError(Reason.IMAGE_SIZE, stream.name, text)
        try:
            return whole if stream.crop is None else crop_image(whole, stream.crop, stream.name)
        except IngestError as error:
            self._tell(stream.name, error.reason, message)
            raise

    def _tell(self, stream: str, reason: Reason, message: Any) -> None:
        if self._told.get(stream) is not message:
            self._told[stream] = message
            self._on_refused(stream, reason)


@cache
def decoder_pool() -> ThreadPoolExecutor:
    """Threads that decode images, for the whole process; the decoders release the GIL."""
    return ThreadPoolExecutor(max_workers=DECODER_THREADS, thread_name_prefix="decode")


class MeasuredPositions:
    """Where the action joints are now, from the newest joint messages: the start that commands are limited
    from."""

    def __init__(self, contract: RobotContract, synchroniser: Synchroniser) -> None:
        self._synchroniser = synchroniser
        self._streams = contract.streams
        order: dict[str, list[int]] = {}
        for index, name in enumerate(contract.action.joints):
            order.setdefault(measuring_stream(contract, name), []).append(index)
        joints = contract.message_names(contract.action.joints)
        self._parts = [
            (stream, indices, NamedValues([joints[index] for index in indices], "position", stream))
            for stream, indices in order.items()
        ]
        self._dof = contract.dof

    def __call__(self, now_mono_ns: int) -> FloatArray:
        """Positions (dof,) float64 in robot units.

        Raises IngestError: NO_MESSAGE, STALE_RECEIPT (older than the stream's max_age), or as
        NamedValues.read.
        """
        positions = np.empty(self._dof)
        for stream, indices, reader in self._parts:
            newest = self._synchroniser.newest(stream)
            if newest is None:
                raise IngestError(Reason.NO_MESSAGE, stream, "no joint positions yet")
            if (age := now_mono_ns - newest.receipt) > self._streams[stream].max_age:
                raise IngestError(Reason.STALE_RECEIPT, stream, f"joint positions are {to_s(age):.3f} s old")
            positions[indices] = reader.read(newest.payload)
        return positions


def measuring_stream(contract: RobotContract, joint: str) -> str:
    """The state stream that measures a joint's position; with one stream it may carry joints beyond the
    state's."""
    for source in contract.state.sources:
        if source.field == "position" and joint in source.joints:
            return source.stream
    return contract.state.sources[0].stream
