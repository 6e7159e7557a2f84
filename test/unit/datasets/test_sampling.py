"""Picks are spread over tasks, episodes and positions, all different and the same every time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_runtime.datasets import Episode, Pick, pick_frames, stratified_sample
from flashrt_runtime.errors import DatasetError

EPISODES = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["pick", "place", "open"])), min_size=1, max_size=12
).map(lambda rows: [Episode(index, length, task) for index, (length, task) in enumerate(rows)])


@given(EPISODES, st.integers(1, 80))
@settings(max_examples=200, deadline=None)
def test_as_many_different_frames_as_there_are(episodes: list[Episode], n: int) -> None:
    frames = sum(episode.length for episode in episodes)
    if not frames:
        with pytest.raises(DatasetError):
            pick_frames(episodes, n)
        return
    picks = pick_frames(episodes, n)
    assert picks == pick_frames(episodes, n)
    assert len(picks) == len(set(picks)) == min(n, frames)
    lengths = {episode.index: episode.length for episode in episodes}
    assert all(0 <= pick.frame < lengths[pick.episode] for pick in picks)


def test_spread() -> None:
    """40 tasks of unequal numbers of episodes, as LIBERO has: every task twice, all over the episodes."""
    episodes = [Episode(index, 250, f"task {index % 40 if index < 1600 else 7}") for index in range(1700)]
    picks = pick_frames(episodes, 80)
    tasks = [episodes[pick.episode].task for pick in picks]
    assert all(tasks.count(f"task {number}") == 2 for number in range(40))
    quarters = [sum(250 * q <= 4 * pick.frame < 250 * (q + 1) for pick in picks) for q in range(4)]
    assert min(quarters) >= 18
    seventh = sorted(pick.frame / 250 for pick in pick_frames(episodes, 64, task_filter="task 7"))
    gaps = [b - a for a, b in itertools.pairwise(seventh)]
    assert max(gaps) < 3 / 64
    assert len({pick.episode for pick in pick_frames(episodes, 64, task_filter="task 7")}) == 64


def test_exclude_and_filter() -> None:
    episodes = [Episode(0, 5, "Open the drawer"), Episode(1, 5, "close it"), Episode(2, 5, "open the door")]
    assert {pick.episode for pick in pick_frames(episodes, 9, "OPEN")} == {0, 2}
    assert {pick.episode for pick in pick_frames(episodes, 9, "open", exclude={2})} == {0}


def test_fewer_frames_than_asked_for_is_a_warning(caplog) -> None:
    assert len(pick_frames([Episode(0, 3, "")], 8)) == 3
    assert "8 samples were asked for, and there are only 3 frames" in caplog.text


def test_stratified_sample_loads_one_at_a_time() -> None:
    loaded: list[Pick] = []

    def load(episode: int, frame: int) -> Pick:
        loaded.append(Pick(episode, frame))
        return loaded[-1]

    found = stratified_sample([Episode(3, 10, "a"), Episode(5, 10, "b")], load, 4)
    assert loaded == []
    assert next(found) == loaded[0]
    assert len(loaded) == 1
    assert list(found) == pick_frames([Episode(3, 10, "a"), Episode(5, 10, "b")], 4)[1:]
