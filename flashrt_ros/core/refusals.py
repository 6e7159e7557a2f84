"""Messages that cannot be used, counted by stream and reason; looked at as they arrive, without decoding."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from .contract_model import RobotContract, StreamSpec
from .errors import IngestError
from .images import check_image
from .ingest import NamedValues, measuring_stream
from .reasons import Reason


class RefusedMessages:
    """Counts by stream and reason; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Reason]] = {}

    def count(self, stream: str, reason: Reason) -> None:
        """One more message of `stream` was refused for `reason`."""
        with self._lock:
            self._counts.setdefault(stream, Counter())[reason] += 1

    def counts(self) -> dict[str, Counter[Reason]]:
        """A copy, streams and reasons in order."""
        with self._lock:
            return {name: Counter(dict(sorted(self._counts[name].items()))) for name in sorted(self._counts)}


class MessageInspector:
    """Judges every message once, on arrival. Messages are not withheld: which set is used, and what is
    reported while none can be, is the synchroniser's and ingest's business.

    What only decoding shows is counted by Ingest, for the messages that come to be used.
    """

    def __init__(self, contract: RobotContract, refused: RefusedMessages, *, exotic: bool = False) -> None:
        """exotic: whether there is a decoder for uncommon image encodings."""
        self.refused = refused
        self._streams = contract.streams
        self._max_skew = contract.sync.max_skew
        self._exotic = exotic
        self._readers: dict[str, list[NamedValues]] = {}
        for source in contract.state.sources:
            names = contract.message_names(source.joints)
            reader = NamedValues(names, source.field, source.stream)
            self._readers.setdefault(source.stream, []).append(reader)
        commanded: dict[str, list[str]] = {}
        for name in contract.action.joints:
            commanded.setdefault(measuring_stream(contract, name), []).append(name)
        for stream, joints in commanded.items():
            reader = NamedValues(contract.message_names(joints), "position", stream)
            self._readers.setdefault(stream, []).append(reader)

    def inspect(self, stream: str, stamp_ns: int, now_ros_ns: int, message: Any) -> Reason:
        """OK, or why this message cannot be used, which is counted. Never raises for a bad message.

        Content comes before stamps: a malformed message with a bad stamp is malformed.
        """
        reason = self._content(self._streams[stream], message) or self._stamp(
            self._streams[stream], stamp_ns, now_ros_ns
        )
        if reason:
            self.refused.count(stream, reason)
        return reason

    def _content(self, stream: StreamSpec, message: Any) -> Reason:
        try:
            if stream.is_image:
                order = stream.colour_order
                check_image(message, stream=stream.name, colour_order=order, exotic=self._exotic)
            else:
                for reader in self._readers.get(stream.name, ()):
                    reader.read(message)
        except IngestError as error:
            return error.reason
        return Reason.OK

    def _stamp(self, stream: StreamSpec, stamp_ns: int, now_ros_ns: int) -> Reason:
        if stamp_ns > now_ros_ns + self._max_skew:
            return Reason.CLOCK
        if stamp_ns >= now_ros_ns - stream.max_age:
            return Reason.OK
        return Reason.STALE_STAMP if stamp_ns else Reason.STAMP_UNSET
