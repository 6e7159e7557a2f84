"""Stream buffers and the synchroniser."""

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.sync import NotReady, Snapshot, Stamped, StreamBuffer, Synchroniser, newest_within

MS = 1_000_000
NOW = 10_000 * MS  # ROS time of the tests
MONO = 500_000 * MS  # monotonic time at NOW: another epoch, as on a robot


def fill(sync: Synchroniser, ages_ms: dict[str, list[float]], receipt_lag_ms: float = 0.0) -> None:
    """Push messages with these ages at NOW, oldest first, received `receipt_lag_ms` after their stamp."""
    for stream, ages in ages_ms.items():
        for age in sorted(ages, reverse=True):
            stamp = NOW - round(age * MS)
            sync.push(stream, stamp, MONO - round((age - receipt_lag_ms) * MS), f"{stream}@{age}")


def ready(outcome: Snapshot | NotReady) -> Snapshot:
    assert isinstance(outcome, Snapshot), outcome
    return outcome


def not_ready(outcome: Snapshot | NotReady) -> NotReady:
    assert isinstance(outcome, NotReady)
    return outcome


def ages(snapshot: Snapshot) -> dict[str, float]:
    return {name: (NOW - item.stamp) / MS for name, item in snapshot.messages.items()}


def test_takes_the_newest_set_within_the_skew(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    joints = [50, 40, 30, 20, 10, 0]
    fill(sync, {"base_camera": [90, 57, 24], "wrist_camera": [110, 70], "joint_states": joints})
    snapshot = ready(sync.select(NOW, MONO))
    # The wrist camera lags: everything else may be at most 50 ms newer than its newest, 70 ms old.
    assert ages(snapshot) == {"base_camera": 24, "wrist_camera": 70, "joint_states": 20}
    assert snapshot.skew == 50 * MS
    assert snapshot.messages["wrist_camera"].payload == "wrist_camera@70"
    assert list(snapshot.messages) == ["base_camera", "wrist_camera", "joint_states"]


def test_names_the_stream_that_never_came(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [10], "joint_states": [5]})
    problem = not_ready(sync.select(NOW, MONO))
    assert (problem.reason, problem.stream) == (Reason.NO_MESSAGE, "wrist_camera")
    assert problem.message == "no message on topic wrist_camera/image_raw/compressed yet"


def test_receipt_clock_finds_a_stopped_stream_even_with_stamps_in_another_clock(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [10], "wrist_camera": [10], "joint_states": [5]})
    problem = not_ready(sync.select(NOW, MONO + 300 * MS))
    assert (problem.reason, problem.stream) == (Reason.STALE_RECEIPT, "base_camera")
    assert "came 0.310 s ago, limit 0.25 s" in problem.message


def test_stamp_clock_finds_a_frozen_stamp_while_messages_flow(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"wrist_camera": [10], "joint_states": [5]})
    for _ in range(5):
        sync.push("base_camera", NOW - 400 * MS, MONO, "frozen")
    problem = not_ready(sync.select(NOW, MONO))
    assert (problem.reason, problem.stream) == (Reason.STALE_STAMP, "base_camera")


def test_a_driver_that_sets_no_stamp_is_told_so(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"wrist_camera": [10], "joint_states": [5]})
    for _ in range(5):
        sync.push("base_camera", 0, MONO, "unstamped")
    problem = not_ready(sync.select(NOW, MONO))
    assert (problem.reason, problem.stream) == (Reason.STAMP_UNSET, "base_camera")
    assert problem.message == (
        "the header stamp on topic base_camera/image_raw is not set (it is 0): its driver must fill "
        "header.stamp with the time of capture"
    )
    assert sync.clock_jumps == 0


def test_messages_without_a_stamp_among_others_are_no_jump_of_the_clock(demo: RobotContract) -> None:
    """Two publishers on one topic, of which one sets no stamp."""
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [10], "wrist_camera": [10], "joint_states": [45, 35, 25, 15]})
    sync.push("joint_states", 0, MONO, "unstamped")
    assert not_ready(sync.select(NOW, MONO)).reason is Reason.STAMP_UNSET
    sync.push("joint_states", NOW - 5 * MS, MONO, "stamped")
    assert ready(sync.select(NOW, MONO)).messages["joint_states"].payload == "stamped"
    assert sync.clock_jumps == 0
    early = NOW - 60_000 * MS  # and a jump is still seen
    sync.push("joint_states", early, MONO + MS, "again")
    assert sync.clock_jumps == 1


def test_simulated_time_may_begin_at_zero(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    for stream in demo.streams:
        sync.push(stream, 0, MONO, "first")
    assert ready(sync.select(0, MONO)).skew == 0
    for stream in demo.streams:
        sync.push(stream, 20 * MS, MONO + 20 * MS, "second")
    assert {item.payload for item in ready(sync.select(20 * MS, MONO + 20 * MS)).messages.values()} == {
        "second"
    }
    assert sync.clock_jumps == 0


def test_a_stamp_in_the_future_is_a_clock_fault_beyond_the_skew(demo: RobotContract) -> None:
    for ahead, reason in ((40, None), (60, Reason.CLOCK)):
        sync = Synchroniser(demo)
        fill(sync, {"base_camera": [10], "wrist_camera": [10], "joint_states": [5]})
        sync.push("wrist_camera", NOW + ahead * MS, MONO, "early")
        outcome = sync.select(NOW, MONO)
        if reason is None:
            ready(outcome)
        else:
            problem = not_ready(outcome)
            assert (problem.reason, problem.stream) == (reason, "wrist_camera")
            assert "0.060 s in the future" in problem.message


def test_no_set_within_the_skew_blames_the_one_behind(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [150], "wrist_camera": [10], "joint_states": [5]})
    problem = not_ready(sync.select(NOW, MONO))
    assert (problem.reason, problem.stream) == (Reason.SKEW, "base_camera")
    assert "0.145 s behind the newest stream; no recent set of messages lies within 0.05 s" in problem.message


def test_an_aligned_set_that_is_too_old_does_not_count(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [260, 150], "wrist_camera": [260, 10], "joint_states": [260, 5]})
    assert not_ready(sync.select(NOW, MONO)).reason is Reason.SKEW
    old_enough = Synchroniser(demo)
    fill(old_enough, {"base_camera": [240, 150], "wrist_camera": [240, 10], "joint_states": [240, 5]})
    assert set(ages(ready(old_enough.select(NOW, MONO))).values()) == {240}


@pytest.mark.parametrize(("stamp_age", "receipt_age"), [(260, 200), (200, 260)])
def test_each_clock_alone_makes_an_aligned_set_too_old(
    demo: RobotContract, stamp_age: int, receipt_age: int
) -> None:
    """Aligned history is too old by one clock; the newest messages are fresh but do not align."""
    sync = Synchroniser(demo)
    for stream, newest in (("base_camera", 150), ("wrist_camera", 10), ("joint_states", 5)):
        sync.push(stream, NOW - stamp_age * MS, MONO - receipt_age * MS, "old")
        sync.push(stream, NOW - newest * MS, MONO - newest * MS, "new")
    assert not_ready(sync.select(NOW, MONO)).reason is Reason.SKEW


@pytest.fixture
def optional_wrist(tmp_path: Path, demo_text: str) -> RobotContract:
    path = tmp_path / "robot.yaml"
    view = "view: left_wrist_0_rgb"
    path.write_text(demo_text.replace(view, f"{view}\n    optional: true\n    max_age: 0.1"))
    return load_contract(path)


@pytest.mark.parametrize(("wrist", "expected"), [
    ([], None), ([150], None), ([20], 20), ([90], None), ([90, 70], None), ([70, 30], 30),
])
def test_optional_streams_join_only_when_they_fit(
    optional_wrist: RobotContract, wrist: list[float], expected: float | None
) -> None:
    """Its own age limit is 0.1 s; the others are 10 ms old, the skew 50 ms."""
    sync = Synchroniser(optional_wrist)
    fill(sync, {"base_camera": [10], "joint_states": [10], "wrist_camera": wrist})
    assert ages(ready(sync.select(NOW, MONO))).get("wrist_camera") == expected


def test_a_jump_back_of_the_clock_starts_the_buffer_anew(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    fill(sync, {"base_camera": [10], "wrist_camera": [10], "joint_states": [5]})
    early = NOW - 60_000 * MS  # a bag starts over
    for stream in demo.streams:
        sync.push(stream, early, MONO + MS, "again")
    assert sync.clock_jumps == 3
    snapshot = ready(sync.select(early, MONO + MS))
    assert {item.payload for item in snapshot.messages.values()} == {"again"}


def test_ages_rates_newest_and_clear(demo: RobotContract) -> None:
    sync = Synchroniser(demo)
    assert sync.ages(MONO) == dict.fromkeys(demo.streams)
    fill(sync, {"joint_states": [30, 20, 10, 0], "base_camera": [40]})
    assert sync.ages(MONO)["base_camera"] == 40 * MS
    assert sync.rates(MONO) == pytest.approx({"joint_states": 100.0, "base_camera": 0.0, "wrist_camera": 0.0})
    newest = sync.newest("joint_states")
    assert newest is not None
    assert newest.payload == "joint_states@0"
    sync.clear()
    assert sync.newest("joint_states") is None
    assert not_ready(sync.select(NOW, MONO)).reason is Reason.NO_MESSAGE
    with pytest.raises(KeyError):
        sync.push("no_such_stream", 0, 0, None)


def test_stamps_from_the_future_do_not_fill_the_buffer() -> None:
    """A driver that now and then stamps far ahead: what is kept must stay what came of late."""
    buffer = StreamBuffer(capacity=64, span=100 * MS)
    for index in range(300):
        time = index * 30 * MS
        buffer.push(time + 10**15, time, "ahead")
        buffer.push(time + 10 * MS, time + 10 * MS, "right")
        assert "right" in [item.payload for item in buffer.items()]
    assert len(buffer) <= 17
    assert buffer.jumps <= 1


def test_buffer_keeps_what_is_recent_in_order_of_stamps() -> None:
    buffer = StreamBuffer(capacity=3)
    for stamp in (5, 9, 7, 8, 7):
        buffer.push(stamp, stamp, f"at {stamp}")
    assert [item.stamp for item in buffer.items()] == [7, 8, 9]
    assert buffer.received == Stamped(7, 7, "at 7")
    spanned = StreamBuffer(span=10)
    for time in (0, 5, 12, 30):
        spanned.push(time, time, None)
    assert [item.stamp for item in spanned.items()] == [30]
    spanned.push(31, 31, None)
    spanned.push(15, 32, "the clock jumped back")
    assert len(spanned) == spanned.jumps == 1
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        StreamBuffer(0)


stamps = st.lists(st.integers(0, 60), max_size=7)


@settings(max_examples=300, deadline=None)
@given(streams=st.lists(stamps, min_size=1, max_size=3), skew=st.integers(0, 30))
def test_newest_within_equals_exhaustive_search(streams: list[list[int]], skew: int) -> None:
    buffers = {
        str(i): [Stamped(stamp, 0, None) for stamp in sorted(items)] for i, items in enumerate(streams)
    }
    fitting = [
        combination for combination in itertools.product(*(sorted(items) for items in streams))
        if max(combination) - min(combination) <= skew
    ]
    found = newest_within(buffers, skew)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        best = tuple(max(column) for column in zip(*fitting, strict=True))
        assert best in fitting  # one set is the newest in every stream at once
        assert tuple(found[str(i)].stamp for i in range(len(streams))) == best


@settings(max_examples=150, deadline=None)
@given(
    base=st.lists(st.tuples(st.integers(-80, 300), st.integers(-50, 50)), max_size=6),
    wrist=st.lists(st.tuples(st.integers(-80, 300), st.integers(-50, 50)), max_size=6),
    joints=st.lists(st.tuples(st.integers(-80, 300), st.integers(-50, 50)), max_size=8),
)
def test_whatever_is_selected_is_within_every_bound(
    demo: RobotContract, base: list[tuple[int, int]], wrist: list[tuple[int, int]],
    joints: list[tuple[int, int]],
) -> None:
    sync = Synchroniser(demo)
    for stream, items in (("base_camera", base), ("wrist_camera", wrist), ("joint_states", joints)):
        for age, lag in sorted(items, key=lambda item: item[1] - item[0]):
            sync.push(stream, NOW - age * MS, MONO - max(0, age - lag) * MS, None)
    outcome = sync.select(NOW, MONO)
    if isinstance(outcome, NotReady):
        assert outcome.reason in set(Reason) - {Reason.OK}
        assert outcome.stream in demo.streams
        return
    stamped = [item.stamp for item in outcome.messages.values()]
    assert set(outcome.messages) == set(demo.streams)
    assert max(stamped) - min(stamped) == outcome.skew <= demo.sync.max_skew
    for item in outcome.messages.values():
        assert -demo.sync.max_skew <= NOW - item.stamp <= demo.sync.max_age
        assert MONO - item.receipt <= demo.sync.max_age


def test_pushes_from_many_threads_while_selecting(demo: RobotContract) -> None:
    sync = Synchroniser(replace(demo, sync=replace(demo.sync, max_skew=10**12)))
    stop = threading.Event()

    def publish(stream: str) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            sync.push(stream, NOW + count, MONO + count, count)

    threads = [threading.Thread(target=publish, args=(name,)) for name in demo.streams]
    for thread in threads:
        thread.start()
    try:
        selected = 0
        while selected < 200:
            outcome = sync.select(NOW, MONO)
            if isinstance(outcome, Snapshot):
                selected += 1
                assert all(item.stamp - NOW == item.payload for item in outcome.messages.values())
            else:
                assert outcome.reason is Reason.NO_MESSAGE
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def stream(
    sync: Synchroniser, name: str, rate: float, *, offset_ms: float = 0.0, latency_ms: float = 5.0,
    until_ms: float = 0.0, since_ms: float = 400.0,
) -> None:
    """A stream of `rate` Hz from `since_ms` to `until_ms` before NOW, its clock ahead by `offset_ms`, its
    messages received `latency_ms` after they were taken."""
    taken = since_ms
    while taken >= until_ms + latency_ms:
        received = MONO - round((taken - latency_ms) * MS)
        sync.push(name, NOW - round((taken - offset_ms) * MS), received, f"{name}@{taken:g}")
        taken -= 1000.0 / rate


@pytest.mark.parametrize(("offset_ms", "outcome"), [
    (-60.0, None), (-200.0, None), (-270.0, Reason.STALE_STAMP), (30.0, None), (90.0, Reason.CLOCK),
])
def test_a_camera_whose_clock_is_offset(
    demo: RobotContract, offset_ms: float, outcome: Reason | None
) -> None:
    """Behind, it holds the others back as long as it looks fresh enough; ahead, it is found out."""
    sync = Synchroniser(demo)
    stream(sync, "base_camera", 30, offset_ms=offset_ms)
    stream(sync, "wrist_camera", 30)
    stream(sync, "joint_states", 100)
    selected = sync.select(NOW, MONO)
    if outcome is None:
        assert ready(selected).skew <= demo.sync.max_skew
        assert max(ages(ready(selected)).values()) <= 250
    else:
        problem = not_ready(selected)
        assert (problem.reason, problem.stream) == (outcome, "base_camera")


@pytest.mark.parametrize(("latency_ms", "outcome"), [(100.0, None), (300.0, Reason.STALE_STAMP)])
def test_a_camera_that_is_late(demo: RobotContract, latency_ms: float, outcome: Reason | None) -> None:
    """Its newest frame is old when it comes, though it comes steadily: the others are as old as that."""
    sync = Synchroniser(demo)
    stream(sync, "base_camera", 30)
    stream(sync, "wrist_camera", 30, latency_ms=latency_ms, since_ms=600.0)
    stream(sync, "joint_states", 100)
    selected = sync.select(NOW, MONO)
    if outcome is None:
        snapshot = ready(selected)
        assert ages(snapshot)["wrist_camera"] >= latency_ms
        assert ages(snapshot)["joint_states"] >= latency_ms - 50
        assert snapshot.skew <= 50 * MS
    else:
        assert (not_ready(selected).reason, not_ready(selected).stream) == (outcome, "wrist_camera")


def test_one_camera_too_far_behind_the_others_is_skew(demo: RobotContract) -> None:
    """Fresh enough for itself, but nothing of another stream is as old: that one has only just begun."""
    sync = Synchroniser(demo)
    stream(sync, "base_camera", 30, since_ms=60.0)
    stream(sync, "wrist_camera", 30, latency_ms=150.0)
    stream(sync, "joint_states", 100)
    problem = not_ready(sync.select(NOW, MONO))
    assert (problem.reason, problem.stream) == (Reason.SKEW, "wrist_camera")


def test_simulated_time_may_stand_still_or_run_slowly(demo: RobotContract) -> None:
    """Header ages count on the node's clock, receipt ages on the monotonic one; neither replaces one."""
    sync = Synchroniser(demo)
    for name in demo.streams:  # a paused simulator that goes on publishing the same instant
        for age in (300, 200, 100, 1):
            sync.push(name, NOW, MONO - age * MS, f"{name}@{age}")
    assert ages(ready(sync.select(NOW, MONO))) == dict.fromkeys(demo.streams, 0)
    # Paused altogether: stamps are as fresh as ever on the stopped clock, but nothing comes any more.
    assert not_ready(sync.select(NOW, MONO + 400 * MS)).reason is Reason.STALE_RECEIPT
    # A node that was not told to use simulated time sees stamps of long ago.
    assert not_ready(sync.select(NOW + 10**18, MONO)).reason is Reason.STALE_STAMP
