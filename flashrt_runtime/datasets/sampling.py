"""Which frames of a dataset stand for it: spread over tasks, episodes and positions within an episode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import DatasetError, OptionError

logger = logging.getLogger(__name__)

GOLDEN = 0.6180339887498949  # its multiples spread most evenly over [0, 1)


@dataclass(frozen=True)
class Episode:
    """One episode: its index in the dataset, its number of frames and what the robot was told."""

    index: int
    length: int
    task: str


@dataclass(frozen=True)
class Pick:
    """One frame of one episode, counted from 0."""

    episode: int
    frame: int


class Counted[T](Iterator[T]):
    """An iterator that tells `operator.length_hint` how many are to come; count: -1 where nobody knows."""

    def __init__(self, items: Iterable[T], count: int) -> None:
        self._items, self._left = iter(items), count

    def __next__(self) -> T:
        item = next(self._items)
        self._left -= 1
        return item

    def __length_hint__(self) -> int:
        return self._left if self._left >= 0 else NotImplemented


def stratified_sample[T](
    metadata: Sequence[Episode],
    load_fn: Callable[[int, int], T],
    n: int,
    task_filter: str | None = None,
    exclude: Collection[int] = (),
) -> Iterator[T]:
    """`load_fn(episode, frame)` of what `pick_frames` picks, one at a time as they are asked for."""
    picks = pick_frames(metadata, n, task_filter, exclude)
    return Counted((load_fn(pick.episode, pick.frame) for pick in picks), len(picks))


def pick_frames(
    metadata: Sequence[Episode], n: int, task_filter: str | None = None, exclude: Collection[int] = ()
) -> list[Pick]:
    """n different frames, the same every time.

    Tasks take turns; within a task the picks are spread over its episodes; the position within an episode
    runs through [0, 1) by multiples of the golden ratio, so that it goes with neither task nor episode.
    task_filter: only tasks that hold this text, in any case. exclude: indices of episodes to leave out. A
    warning where the episodes have fewer than n frames. Raises DatasetError where nothing is left and
    OptionError for n below 1.
    """
    if n < 1:
        raise OptionError(f"at least one sample is needed, got n={n}")
    by_task: dict[str, list[Episode]] = {}
    for episode in metadata:
        wanted = task_filter is None or task_filter.lower() in episode.task.lower()
        if wanted and episode.index not in exclude and episode.length > 0:
            by_task.setdefault(episode.task, []).append(episode)
    if not by_task:
        raise DatasetError(_nothing_left(metadata, task_filter, exclude))
    frames = sum(episode.length for episodes in by_task.values() for episode in episodes)
    if frames < n:
        logger.warning("%d samples were asked for, and there are only %d frames: all are used", n, frames)
    taken: dict[int, set[int]] = {}
    picks = []
    queues = list(by_task.values())
    for number in range(min(n, frames)):
        turn, task = divmod(number, len(queues))
        turns = -(-(min(n, frames) - task) // len(queues))
        episodes = queues[task]
        start = int((turn + 0.5) / turns * len(episodes))
        picks.append(_free_frame(episodes, start, ((number + 0.5) * GOLDEN) % 1.0, taken, queues))
    return picks


def _free_frame(
    episodes: Sequence[Episode],
    start: int,
    position: float,
    taken: dict[int, set[int]],
    queues: Sequence[Sequence[Episode]],
) -> Pick:
    """The frame at this position of episode `start`, or the nearest to it that is not taken: in this
    episode, else in the next of the task, else in any.
    """
    others = [episode for queue in queues for episode in queue]
    for episode in [*episodes[start:], *episodes[:start], *others]:
        used = taken.setdefault(episode.index, set())
        if len(used) >= episode.length:
            continue
        wanted = int(position * episode.length)
        for distance in range(episode.length):
            for frame in (wanted + distance, wanted - distance):
                if 0 <= frame < episode.length and frame not in used:
                    used.add(frame)
                    return Pick(episode.index, frame)
    raise AssertionError("no frame is left")  # pick_frames never asks for more than there are


def _nothing_left(metadata: Sequence[Episode], task_filter: str | None, exclude: Collection[int]) -> str:
    if not metadata:
        return "the dataset has no episodes"
    left = [episode for episode in metadata if episode.index not in exclude]
    if not left:
        return f"all {len(metadata)} episodes are excluded"
    tasks = sorted({episode.task for episode in left})
    shown = "; ".join(map(repr, tasks[:5])) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
    return f"no episode with frames has {task_filter!r} in its task; the tasks are {shown}"
