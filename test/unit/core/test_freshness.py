"""When the next frame is waited for."""

from flashrt_ros.core.freshness import FRESH, next_frame_is_better

MS = 1_000_000
PERIOD = 33 * MS


def test_a_fresh_frame_is_used_at_once() -> None:
    assert not next_frame_is_better(FRESH, PERIOD, 10**9, 40 * MS)


def test_an_old_one_is_left_alone_while_actions_last() -> None:
    assert next_frame_is_better(16 * MS, PERIOD, 200 * MS, 40 * MS)


def test_nothing_is_waited_for_when_actions_would_run_out() -> None:
    assert not next_frame_is_better(16 * MS, PERIOD, 0, 40 * MS)
    assert not next_frame_is_better(16 * MS, PERIOD, 70 * MS, 40 * MS)  # 17 to wait, 60 in reserve


def test_slow_cameras_and_late_frames_are_not_waited_for() -> None:
    assert not next_frame_is_better(16 * MS, 100 * MS, 10**9, 40 * MS)
    assert not next_frame_is_better(70 * MS, PERIOD, 10**9, 40 * MS)


def test_waiting_costs_no_age_on_average() -> None:
    """A robot at every phase of camera and model: how old the world is that its commands are based on."""

    def mean_age(wait: bool, inference: float, period: float = 33.0, step: float = 0.5) -> float:
        chunks, now = [], 0.1  # (published at, of the frame at)
        while now < 20_000.0:
            frame = now // period * period
            if wait and now - frame > 5.0:
                frame = now = frame + period
            chunks.append((now + inference, frame))
            now = max(now + inference, frame + period)
        ages, index = [], 0
        for tick in range(200, 39_000):
            moment = tick * step
            while index + 1 < len(chunks) and chunks[index + 1][0] <= moment:
                index += 1
            ages.append(moment - chunks[index][1])
        return sum(ages) / len(ages)

    for inference in (20.0, 40.0, 55.0, 80.0, 120.0):
        assert mean_age(True, inference) <= mean_age(False, inference) * 1.05 + 1.0, inference
