"""Synchroniser: per stream a ring buffer, and on demand the newest set of messages that belong together.

Executor threads push (stamp, receipt, reference to the message), the worker selects; nothing is decoded here.
"""

from __future__ import annotations

import threading
from bisect import bisect_right, insort_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .contract_model import RobotContract, StreamSpec
from .metrics import RateMeter
from .reasons import Reason
from .timing import to_s


@dataclass(frozen=True, slots=True)
class Stamped:
    """A message with its header stamp [ns, ROS time] and receipt time [ns, monotonic clock]."""

    stamp: int
    receipt: int
    payload: Any


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One message per stream (optional streams only when they have a fitting one), and their spread [ns]."""

    messages: Mapping[str, Stamped]
    skew: int


@dataclass(frozen=True, slots=True)
class NotReady:
    """No usable set: which stream is to blame, and why."""

    reason: Reason
    stream: str
    message: str


class StreamBuffer:
    """The last messages of one stream, ordered by stamp. Not locked: the Synchroniser does that.

    A stamp older than everything kept by more than `span` means that the clock jumped back (a bag that
    loops): the buffer starts anew, or frames of the old timeline would pass for the newest. A stamp of 0 is
    one that was not set, unless the clock has only just begun: such a message is noted as received, no more.
    """

    def __init__(self, capacity: int = 512, span: int | None = None) -> None:
        """Keeps at most `capacity` messages, received within the last `span` ns (None: no bound)."""
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._span = span
        self._items: list[Stamped] = []
        self._newest: Stamped | None = None
        self._swept = 8  # how many were left when all were last looked at
        self.jumps = 0

    def push(self, stamp_ns: int, receipt_ns: int, payload: Any) -> None:
        """Add a message; equal stamps keep the order of arrival."""
        item = Stamped(stamp_ns, receipt_ns, payload)
        items = self._items
        self._newest = item
        if stamp_ns == 0 and items and self._span is not None and items[-1].stamp > self._span:
            return
        if self._span is not None and items and stamp_ns < items[0].stamp - self._span:
            items.clear()
            self.jumps += 1
        insort_right(items, item, key=_stamp)
        if self._span is not None:
            self._forget(receipt_ns - self._span)
        if len(items) > self._capacity:
            items.pop(0)

    def _forget(self, before: int) -> None:
        """What was received before then goes: at once if its stamp is the oldest, soon if it is not, or what
        is stamped ahead would crowd out the rest in the end."""
        items = self._items
        while items[0].receipt < before:
            items.pop(0)
        if len(items) > 2 * self._swept:
            items[:] = [item for item in items if item.receipt >= before]
            self._swept = max(8, len(items))

    def clear(self) -> None:
        """Forget every message."""
        self._items.clear()
        self._newest = None

    @property
    def received(self) -> Stamped | None:
        """The message that arrived last."""
        return self._newest

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> list[Stamped]:
        """A copy, oldest stamp first."""
        return list(self._items)


def _stamp(item: Stamped) -> int:
    return item.stamp


def newest_within(buffers: Mapping[str, list[Stamped]], max_skew: int) -> dict[str, Stamped] | None:
    """The newest set, one per stream, whose stamps differ by at most `max_skew`; None when there is none.

    Starts from each stream's newest and moves back only what is too new for the oldest of the set, to the
    newest message that could still fit. Since no fitting set can hold anything newer than what is passed
    over, the first that fits is the newest in every stream at once.
    """
    at = {name: len(items) - 1 for name, items in buffers.items()}
    while all(index >= 0 for index in at.values()):
        oldest = min(buffers[name][index].stamp for name, index in at.items())
        too_new = [name for name, index in at.items() if buffers[name][index].stamp > oldest + max_skew]
        if not too_new:
            return {name: buffers[name][index] for name, index in at.items()}
        for name in too_new:
            at[name] = bisect_right(buffers[name], oldest + max_skew, key=_stamp) - 1
    return None


class Synchroniser:
    """Buffers of a contract's streams. Thread-safe: push from executor threads, select from the worker."""

    def __init__(self, contract: RobotContract) -> None:
        self._streams = contract.streams
        self._max_skew = contract.sync.max_skew
        self._lock = threading.Lock()
        self._buffers = {
            name: StreamBuffer(span=stream.max_age + self._max_skew) for name, stream in self._streams.items()
        }
        self._rates = {name: RateMeter() for name in self._streams}

    def push(self, stream: str, stamp_ns: int, receipt_ns: int, payload: Any) -> None:
        """Add a message of a contract stream; keeps a reference only. Raises KeyError for an unknown
        stream."""
        with self._lock:
            self._buffers[stream].push(stamp_ns, receipt_ns, payload)
            self._rates[stream].tick(receipt_ns)

    def clear(self) -> None:
        """Forget every message (activate, clock jump)."""
        with self._lock:
            for buffer in self._buffers.values():
                buffer.clear()

    def newest(self, stream: str) -> Stamped | None:
        """The message of a stream that arrived last."""
        with self._lock:
            return self._buffers[stream].received

    def ages(self, now_mono_ns: int) -> dict[str, int | None]:
        """Time since each stream's last message was received [ns]; None when none came."""
        with self._lock:
            newest = {name: buffer.received for name, buffer in self._buffers.items()}
        return {name: None if item is None else now_mono_ns - item.receipt for name, item in newest.items()}

    def rates(self, now_mono_ns: int) -> dict[str, float]:
        """Received messages per second of each stream."""
        with self._lock:
            return {name: meter.rate(now_mono_ns) for name, meter in self._rates.items()}

    @property
    def clock_jumps(self) -> int:
        """How often a stream's stamps jumped back."""
        with self._lock:
            return sum(buffer.jumps for buffer in self._buffers.values())

    def select(self, now_ros_ns: int, now_mono_ns: int) -> Snapshot | NotReady:
        """The newest set with skew within bounds, every message's age within its stream's by both clocks.

        Streams are judged in the contract's order: NO_MESSAGE, STALE_RECEIPT (monotonic clock), CLOCK
        (stamp in the future), STAMP_UNSET, STALE_STAMP (ROS clock), then SKEW over all of them.
        """
        with self._lock:
            received = {name: buffer.received for name, buffer in self._buffers.items()}
            items = {name: buffer.items() for name, buffer in self._buffers.items()}
        usable: dict[str, list[Stamped]] = {}
        for name, stream in self._streams.items():
            problem = self._judge(stream, received[name], now_ros_ns, now_mono_ns)
            if problem is None:
                latest = now_ros_ns + self._max_skew
                stamped, arrived = now_ros_ns - stream.max_age, now_mono_ns - stream.max_age
                fresh = (item for item in items[name] if item.receipt >= arrived)
                usable[name] = [item for item in fresh if stamped <= item.stamp <= latest]
            elif not stream.optional:
                return problem
        return self._align(usable)

    def _judge(
        self, stream: StreamSpec, newest: Stamped | None, now_ros_ns: int, now_mono_ns: int
    ) -> NotReady | None:
        """The newest message of one stream against the clocks."""
        if newest is None:
            return NotReady(Reason.NO_MESSAGE, stream.name, f"no message on topic {stream.topic} yet")
        limit = f"limit {to_s(stream.max_age):g} s"
        received, age = now_mono_ns - newest.receipt, now_ros_ns - newest.stamp
        if received > stream.max_age:
            text = f"last message on topic {stream.topic} came {to_s(received):.3f} s ago, {limit}"
            return NotReady(Reason.STALE_RECEIPT, stream.name, text)
        if age < -self._max_skew:
            text = f"stamp on topic {stream.topic} is {to_s(-age):.3f} s in the future: check the clocks"
            return NotReady(Reason.CLOCK, stream.name, text)
        if age > stream.max_age and newest.stamp == 0:
            text = (
                f"the header stamp on topic {stream.topic} is not set (it is 0): its driver must fill "
                "header.stamp with the time of capture"
            )
            return NotReady(Reason.STAMP_UNSET, stream.name, text)
        if age > stream.max_age:
            text = f"newest header stamp on topic {stream.topic} is {to_s(age):.3f} s old, {limit}"
            return NotReady(Reason.STALE_STAMP, stream.name, text)
        return None

    def _align(self, usable: dict[str, list[Stamped]]) -> Snapshot | NotReady:
        """The newest aligned set; optional streams that do not fit it are left out rather than hold it up."""
        required = {name: items for name, items in usable.items() if not self._streams[name].optional}
        chosen = newest_within(required, self._max_skew)
        if not chosen:
            return self._skew_problem(required)
        for name in usable.keys() - required.keys():
            fixed = {key: [item] for key, item in chosen.items()}
            chosen = newest_within({**fixed, name: usable[name]}, self._max_skew) or chosen
        ordered = {name: chosen[name] for name in self._streams if name in chosen}
        stamps = [item.stamp for item in ordered.values()]
        return Snapshot(ordered, max(stamps) - min(stamps))

    def _skew_problem(self, items: dict[str, list[Stamped]]) -> NotReady:
        """Blame the stream whose newest stamp lies furthest behind."""
        newest = {name: entries[-1].stamp if entries else 0 for name, entries in items.items()}
        behind = min(newest, key=lambda name: newest[name])
        lag = to_s(max(newest.values()) - newest[behind])
        text = (
            f"newest stamp on topic {self._streams[behind].topic} is {lag:.3f} s behind the newest stream; "
            f"no recent set of messages lies within {to_s(self._max_skew):g} s"
        )
        return NotReady(Reason.SKEW, behind, text)
