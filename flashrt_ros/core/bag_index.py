"""Where in time a bag holds messages, found by seeking: a recording that was paused, or whose clock was set
meanwhile, has gaps in which there is nothing to sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from .bag_reader import BagReader, RawMessage
from .timing import NS_PER_S

Span = tuple[int, int]  # [first, last] in the recorder's time [ns]

GAP = NS_PER_S  # silence of every topic that counts as a gap [ns]
PROBES = 64
RESOLUTION = 1_000_000  # of a gap's beginning [ns]


def recorded_spans(reader: BagReader, topics: Collection[str]) -> list[Span]:
    """Stretches of time in which these topics carry messages, in order; gaps below a second may go unseen.

    A bag that cannot seek is read once in full.
    """
    if not reader.indexed:
        return _spans_of(message.time for message in reader.read(topics, reader.start, reader.end + 1))
    first = _next_time(reader, topics, reader.start)
    if first is None:
        return []
    spans: list[Span] = []
    begin = known = first  # of the present span; a time at which there is a message
    for probe in np.linspace(first, reader.end, PROBES + 1).astype(np.int64).tolist():
        if probe < known:
            continue
        found = _next_time(reader, topics, probe)
        if found is None:
            return [*spans, (begin, _last_before(reader, topics, known, probe, None))]
        if found - probe > GAP:
            spans.append((begin, _last_before(reader, topics, known, probe, found)))
            begin = found
        known = found
    return [*spans, (begin, max(known, reader.end))]


def _next_time(reader: BagReader, topics: Collection[str], start: int) -> int | None:
    message = next(iter(reader.read(topics, start, reader.end + 1)), None)
    return None if message is None else message.time


def _last_before(
    reader: BagReader, topics: Collection[str], low: int, high: int, following: int | None
) -> int:
    """Time of the last message before the gap that `following` ends; `low` has a message, `high` is in the
    gap."""
    while high - low > RESOLUTION:
        middle = (low + high) // 2
        if _next_time(reader, topics, middle) == following:
            high = middle
        else:
            low = middle
    return low


def _spans_of(times: Iterator[int]) -> list[Span]:
    spans: list[Span] = []
    for time in times:
        if spans and time - spans[-1][1] <= GAP:
            spans[-1] = (spans[-1][0], max(time, spans[-1][1]))
        else:
            spans.append((time, time))
    return spans


def at_fractions(spans: Sequence[Span], fractions: ArrayLike) -> list[int]:
    """Times at these parts (0..1) of the recorded time, gaps left out [ns]."""
    lengths = np.array([last - first + 1 for first, last in spans], dtype=np.float64)
    ends = np.cumsum(lengths)
    times = []
    for position in np.asarray(fractions, dtype=np.float64) * ends[-1]:
        index = min(int(np.searchsorted(ends, position, side="right")), len(spans) - 1)
        offset = position - (ends[index] - lengths[index])
        times.append(min(spans[index][0] + int(offset), spans[index][1]))
    return times


def read_windows(
    reader: BagReader, topics: Collection[str], windows: Sequence[Span]
) -> Iterator[tuple[int, RawMessage]]:
    """(index of the window, message) for disjoint windows in order, both ends included.

    Seeks to each window, or reads the bag once where it cannot seek.
    """
    if reader.indexed:
        for index, (first, last) in enumerate(windows):
            for message in reader.read(topics, first, last + 1):
                yield index, message
        return
    index = 0
    for message in reader.read(topics, windows[0][0], windows[-1][1] + 1):
        while message.time > windows[index][1]:
            index += 1
        if message.time >= windows[index][0]:
            yield index, message


def merged(windows: Sequence[Span]) -> list[Span]:
    """Overlapping windows as one; in order."""
    result: list[Span] = []
    for first, last in sorted(windows):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return result
