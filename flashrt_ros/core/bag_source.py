"""Observations of a bag, spread over its time, by the code that serves the live topics: contract,
synchroniser, ingest.

A bag is seen as the node would have seen it: at a moment in the recorder's time, from the messages received
until then. Only the stretches before the moments looked at are read, and only the messages that become part
of an observation are decoded.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any

import numpy as np

from .bag_index import Span, at_fractions, merged, read_windows, recorded_spans
from .bag_reader import BagReader, Decoder, RawMessage, header_stamp, open_bag, rosbags_decoder
from .contract_model import RobotContract
from .errors import BagError, IngestError
from .images import FallbackDecoder
from .ingest import Ingest
from .observation import Observation
from .reasons import Reason
from .sync import NotReady, Snapshot, Synchroniser
from .timing import NS_PER_S, to_s

DEFAULT_SAMPLES = 64
ATTEMPTS = 4  # moments tried in a stretch of the bag before it is given up
JUMP = NS_PER_S  # change of (header stamp - recorder's time) that is a jump of a clock [ns]
CLOCK_TOPIC = "/clock"


@dataclass(frozen=True, slots=True)
class Warned:
    """Something about a bag that does not stop its use."""

    reason: Reason
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Moment:
    """What the bag gives at `time` (recorder's, ns): an observation, or the reason why there is none."""

    time: int
    observation: Observation | None
    problem: NotReady | None


class BagSource:
    """An open bag, checked against a contract; a context manager.

    Iterating gives at most `samples` different observations, one from each of as many equal parts of the
    recorded time, in passes from its beginning to its end. `warnings` and `used` are complete afterwards.
    Nothing is random but for `seed`: where in its part each observation is taken.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        contract: RobotContract,
        *,
        samples: int = DEFAULT_SAMPLES,
        namespace: str = "",
        topics: Mapping[str, str] | None = None,
        use_sim_time: bool = False,
        decode: Decoder | None = None,
        fallback_decoder: FallbackDecoder | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        """topics: the bag's topic of a stream, by stream name, where it is not namespace + the contract's.
        use_sim_time: judge header stamps by the bag's /clock. decode: as rosbags_decoder's, the default.
        fallback_decoder: see image_from_message. Raises BagError: BAG_UNREADABLE, BAG_TOPIC_MISSING,
        BAG_TOPIC_TYPE, or ValueError for samples below 1.
        """
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, got {samples}")
        self.samples = samples
        self.used = 0
        self.warnings: list[Warned] = []
        self.skipped: Counter[Reason] = Counter()
        self.namespace = namespace
        self._contract = contract
        self.decode = decode or rosbags_decoder()
        self._use_sim_time = use_sim_time
        self._seed = seed
        self._ingest = Ingest(contract, fallback_decoder)
        self._offsets: dict[str, int] = {}  # header stamp - recorder's time of each stream [ns]
        self._jumped: set[str] = set()
        self._last_problem: NotReady | None = None
        self._spans: list[Span] | None = None
        self.reader: BagReader = open_bag(fspath(path), backend)
        try:
            self.topics = self._check_topics(namespace, topics or {})
        except BaseException:
            self.reader.close()
            raise
        self._streams = {topic: name for name, topic in self.topics.items()}
        sync = contract.sync
        self._window = max(stream.max_age for stream in contract.streams.values()) + sync.max_skew

    def __enter__(self) -> BagSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the bag's files."""
        self.reader.close()

    def _check_topics(self, namespace: str, topics: Mapping[str, str]) -> dict[str, str]:
        """Topic in the bag of every stream that is there; a missing one is an error unless optional."""
        found: dict[str, str] = {}
        for name, stream in self._contract.streams.items():
            topic = topics.get(name) or absolute_topic(stream.topic, namespace)
            if topic not in self.reader.types:
                if stream.optional:
                    continue
                raise BagError(Reason.BAG_TOPIC_MISSING, self._missing(name, topic))
            if (types := self.reader.types[topic]) != {stream.type.value}:
                text = f"{self.reader.path}: topic {topic} holds {', '.join(sorted(types))}; stream {name} "
                text += f"of the contract of {self._contract.robot} expects {stream.type.value}"
                raise BagError(Reason.BAG_TOPIC_TYPE, text)
            found[name] = topic
        if self._use_sim_time and CLOCK_TOPIC not in self.reader.types:
            text = f"{self.reader.path}: use_sim_time is set, but {CLOCK_TOPIC} was not recorded"
            raise BagError(Reason.BAG_TOPIC_MISSING, text)
        return found

    def _missing(self, name: str, topic: str) -> str:
        text = f"{self.reader.path}: no messages on topic {topic} (stream {name} of the contract of "
        text += f"{self._contract.robot}); the bag has {', '.join(sorted(self.reader.types)) or 'no topics'}"
        tail = "/" + self._contract.streams[name].topic.lstrip("/")
        similar = [other for other in self.reader.types if other.endswith(tail)]
        if similar:
            text += f". If {similar[0]} is meant, give the namespace {similar[0].removesuffix(tail) or '/'}"
        return text

    # Sampling

    def __iter__(self) -> Iterator[Observation]:
        """See the class. Raises BagError: no observation at all, every camera frozen, or damaged data."""
        seen: dict[tuple[int, ...], None] = {}
        frames: dict[str, set[int]] = {}
        self.used, self.warnings, self.skipped = 0, [], Counter()
        self._jumped.clear()
        self._ingest.reset()
        random = np.random.default_rng(self._seed)
        pending = list(range(self.samples))
        spans = self.recorded
        self.warnings += self._gaps(spans)
        for _ in range(ATTEMPTS):
            jitter = random.random(len(pending))
            wanted = at_fractions(spans, (np.array(pending) + jitter) / self.samples) if pending else []
            failed: list[int] = []
            for part, moment in zip(list(pending), self.observe(wanted), strict=True):
                observation = moment.observation
                if observation is None or (key := self._camera_stamps(observation)) in seen:
                    failed.append(part)
                    continue
                seen[key] = None
                for view, image in observation.images.items():
                    frames.setdefault(view, set()).add(zlib.crc32(np.ascontiguousarray(image)))
                self.used += 1
                yield observation
            pending = failed
        self._judge(frames)

    def mappings(self, prompt: str) -> Iterator[dict[str, Any]]:
        """The observations as Policy.calibrate takes them; raises as iterating does.

        The last one is given once the bag has been judged, to be of use to who takes `samples` and no more.
        """
        waiting: list[dict[str, Any]] = []
        for observation in self:
            yield from waiting
            waiting = [
                {"images": observation.policy_images, "state": observation.state, "prompt": prompt}
            ]
        yield from waiting

    @property
    def recorded(self) -> list[Span]:
        """Stretches of time that hold messages; found at the first use."""
        if self._spans is None:
            self._spans = recorded_spans(self.reader, list(self._streams))
        return self._spans

    def _gaps(self, spans: Sequence[Span]) -> list[Warned]:
        """A recording that was paused, or whose clock was set meanwhile."""
        return [
            Warned(
                Reason.BAG_CLOCK_JUMP,
                f"{self.reader.path}: nothing was recorded for {to_s(after - before):.1f} s, "
                f"{self._at(before)}: the recording was paused or the clock was set",
            )
            for (_, before), (after, _) in pairwise(spans)
        ]

    def observe(self, times: Sequence[int]) -> Iterator[Moment]:
        """What the node would have seen at these times, which must rise [ns, recorder's time].

        Reads each message once. Raises BagError for damaged data.
        """
        if not times:
            return
        windows = merged([(time - self._window, time) for time in times])
        waiting = iter(times)
        due: int | None = next(waiting)
        topics = [*self._streams, *([CLOCK_TOPIC] if self._use_sim_time else [])]
        synchroniser, window, clock = Synchroniser(self._contract), 0, 0
        for index, message in read_windows(self.reader, topics, windows):
            while due is not None and message.time > due:
                yield self._moment(synchroniser, due, clock)
                due = next(waiting, None)
            if index != window:
                synchroniser, window = Synchroniser(self._contract), index
            if message.topic == CLOCK_TOPIC:
                clock = header_stamp(message.data)
            else:
                self._push(synchroniser, message)
        while due is not None:
            yield self._moment(synchroniser, due, clock)
            due = next(waiting, None)

    def _push(self, synchroniser: Synchroniser, message: RawMessage) -> None:
        name, stamp = self._streams[message.topic], header_stamp(message.data)
        synchroniser.push(name, stamp, message.time, message)
        offset = stamp - message.time
        change = offset - self._offsets.setdefault(name, offset)
        if abs(change) > JUMP and not self._use_sim_time and stamp and name not in self._jumped:
            self._jumped.add(name)
            text = f"{self.reader.path}: header stamps of topic {message.topic} jump by {to_s(change):+.3f} "
            text += f"s against the time of recording, {self._at(message.time)}"
            self.warnings.append(Warned(Reason.BAG_CLOCK_JUMP, text))

    def _at(self, time: int) -> str:
        return f"{to_s(time - self.reader.start):.3f} s into the bag"

    def _moment(self, synchroniser: Synchroniser, time: int, clock: int) -> Moment:
        selected = synchroniser.select(clock if self._use_sim_time else time, time)
        if isinstance(selected, Snapshot):
            try:
                return Moment(time, self._ingest.observe(self._decoded(selected)), None)
            except IngestError as error:
                selected = NotReady(error.reason, error.stream, error.message)
        self.skipped[selected.reason] += 1
        self._last_problem = selected
        return Moment(time, None, selected)

    def _decoded(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with messages for serialised bytes."""
        messages = {}
        for name, item in snapshot.messages.items():
            raw: RawMessage = item.payload
            try:
                messages[name] = replace(item, payload=self.decode(raw.type, raw.data))
            except Exception as error:  # a decoder given damaged bytes may raise anything
                what = f"topic {raw.topic}, {self._at(raw.time)}: {type(error).__name__}: {error}"
                text = f"{self.reader.path}: damaged message on {what}"
                raise BagError(Reason.BAG_UNREADABLE, text) from error
        return Snapshot(MappingProxyType(messages), snapshot.skew)

    def _camera_stamps(self, observation: Observation) -> tuple[int, ...]:
        return tuple(observation.stamps.get(stream.name, -1) for stream in self._contract.image_streams)

    def _judge(self, frames: Mapping[str, set[int]]) -> None:
        """What can only be said at the end."""
        path, problem = self.reader.path, self._last_problem
        counts = ", ".join(f"{count} x {reason.name}" for reason, count in self.skipped.most_common())
        last = f" ({counts}; last: {problem.stream}: {problem.message})" if problem is not None else ""
        if not self.used:
            reason = self.skipped.most_common(1)[0][0]
            hint = _SIM_TIME_HINT if reason in (Reason.STALE_STAMP, Reason.CLOCK) else ""
            raise BagError(reason, f"{path}: no observation could be made at any moment tried{last}{hint}")
        frozen = [view for view, kinds in frames.items() if len(kinds) == 1] if self.used > 1 else []
        if frozen:
            text = f"{path}: all {self.used} frames of {', '.join(frozen)} are the same"
            if len(frozen) == len(frames):
                text += ": the cameras were frozen. Record the robot at work"
                raise BagError(Reason.BAG_FROZEN, text)
            self.warnings.append(Warned(Reason.BAG_FROZEN, text))
        if self.used < self.samples:
            text = f"{path}: {self.used} different observations, {self.samples} were asked for{last}"
            self.warnings.append(Warned(Reason.BAG_FEW_SAMPLES, text))


_SIM_TIME_HINT = (
    ". Header stamps and time of recording disagree: where the robot ran on simulated time, record /clock "
    "too and set use_sim_time"
)


def absolute_topic(topic: str, namespace: str) -> str:
    """A contract's topic as ROS resolves it in a namespace ("" or "/" for none)."""
    if topic.startswith("/"):
        return topic
    return "/".join(["", *filter(None, namespace.split("/")), topic])


def calibration_sample(observation: Observation, prompt: str) -> dict[str, Any]:
    """An observation as Policy.calibrate takes it."""
    return {"images": observation.policy_images, "state": observation.state, "prompt": prompt}
