"""Real bags, written by `rosbags`: what is sampled, and what is said about bags that are no good."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from benchmarks.synthetic_bag import (
    MS,
    START,
    STORE,
    TRANSPORT,
    Entry,
    image_message,
    joint_values,
    pattern,
    stamped,
    write_bag,
)
from flashrt_ros.core import bag_index
from flashrt_ros.core.bag_reader import header_stamp, open_bag
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.contract import RobotContract, StreamType
from flashrt_ros.core.errors import BagError
from flashrt_ros.core.reasons import Reason

S = 1000 * MS
KINDS = [("mcap", ""), ("mcap", "storage"), ("mcap", "message"), ("sqlite3", ""), ("sqlite3", "file")]


@pytest.fixture
def bag(tmp_path: Path, demo: RobotContract) -> Callable[..., Path]:
    """bag(seconds, …) writes a bag for the demo arm; keywords of write_bag."""

    def write(seconds: float = 4.0, **keywords: Any) -> Path:
        return write_bag(tmp_path / f"bag{len(list(tmp_path.iterdir()))}", demo, seconds, **keywords)

    return write


def reasons(source: BagSource) -> list[Reason]:
    return [warning.reason for warning in source.warnings]


def unindexed(path: Path, contract: RobotContract, entries: list[Entry]) -> Path:
    """An MCAP file without chunks and index, as a recorder that optimises for writing leaves it."""

    def text(value: str) -> bytes:
        return len(value.encode()).to_bytes(4, "little") + value.encode()

    def record(code: int, content: bytes) -> bytes:
        return bytes([code]) + len(content).to_bytes(8, "little") + content

    magic = b"\x89MCAP0\r\n"
    parts = [magic, record(1, text("ros2") + text("test"))]
    identity = {name: (index + 1).to_bytes(2, "little") for index, name in enumerate(contract.streams)}
    for name, stream in contract.streams.items():
        definition, _ = STORE.generate_msgdef(stream.type.value, ros_version=2)
        parts.append(record(3, identity[name] + text(stream.type.value) + text("ros2msg") + text(definition)))
        channel = identity[name] * 2 + text("/" + stream.topic) + text("cdr") + bytes(4)
        parts.append(record(4, channel))
    for name, _, stamp, time, data in entries:
        head = identity[name] + bytes(4) + time.to_bytes(8, "little") * 2
        parts.append(record(5, head + stamped(data, stamp)))
    path.write_bytes(b"".join([*parts, record(2, bytes(20)), magic]))
    return path


@pytest.mark.parametrize(("storage", "compression"), KINDS)
def test_every_storage_gives_the_same_observations(bag, demo, storage: str, compression: str) -> None:
    with BagSource(bag(storage=storage, compression=compression), demo, samples=8) as source:
        observations = list(source)
    assert source.used == len(observations) == 8
    assert source.warnings == []
    for part, observation in enumerate(observations):
        stamps = observation.stamps
        since = stamps["joint_states"] - START
        expected = joint_values(len(demo.joints), since / S)[::-1]  # recorded in reverse order
        np.testing.assert_array_equal(observation.state, expected.astype(np.float32))
        index = round((stamps["base_camera"] - START) * 30 / S)
        seed = sum(map(ord, "base_camera")) % 7
        np.testing.assert_array_equal(observation.images["base_0_rgb"], pattern((64, 48), index % 16, seed))
        assert part * S // 2 - 50 * MS <= since <= (part + 1) * S // 2


def test_one_sample_from_each_part_and_another_for_another_seed(bag, demo) -> None:
    path = bag()
    taken = []
    for seed in (0, 0, 1):
        with BagSource(path, demo, samples=10, seed=seed) as source:
            taken.append([item.stamps["joint_states"] for item in source])
            assert [item.stamps["joint_states"] for item in source] == taken[-1]
    assert taken[0] == taken[1] != taken[2]
    assert taken[0] == sorted(taken[0])


def test_a_file_alone_and_one_without_index(bag, demo, tmp_path: Path) -> None:
    entries: list[Entry] = []
    path = bag(2.0, change=lambda entry: entries.append(entry) or entry)
    plain = unindexed(tmp_path / "plain.mcap", demo, entries)
    taken = []
    for source_path in (path, next(path.glob("*.mcap")), plain):
        with BagSource(source_path, demo, samples=6) as source:
            taken.append([(item.stamps, item.images["base_0_rgb"].tobytes()) for item in source])
    assert open_bag(plain).indexed is False
    assert taken[0] == taken[1] == taken[2]


def test_reads_a_part_of_a_long_bag_only(bag, demo, monkeypatch) -> None:
    """Four samples of 40 s: a fraction of the messages is read, two images and one state each decoded."""
    path = bag(40.0, size=(16, 12))
    decoded, read = [], [0]
    with BagSource(path, demo, samples=4) as source:
        decode, read_messages = source.decode, source.reader.read

        def counted(*arguments: Any) -> Any:
            for message in read_messages(*arguments):
                read[0] += 1
                yield message

        monkeypatch.setattr(source.reader, "read", counted)
        monkeypatch.setattr(source, "decode", lambda *a: decoded.append(a[0]) or decode(*a))
        assert len(list(source)) == 4
    assert len(decoded) == 12
    assert read[0] < 40 * 160 / 10


def test_topics_in_a_namespace_and_renamed(bag, demo) -> None:
    streams = {
        name: replace(stream, topic=f"left/{stream.topic}") for name, stream in demo.streams.items()
    }
    path = write_bag(bag().parent / "named", replace(demo, streams=MappingProxyType(streams)), 2.0)
    with pytest.raises(BagError, match="give the namespace /left") as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_TOPIC_MISSING
    renamed = {name: f"/left/{stream.topic}" for name, stream in demo.streams.items()}
    for keywords in ({"namespace": "/left"}, {"namespace": "left/"}, {"topics": renamed}):
        with BagSource(path, demo, samples=3, **keywords) as source:
            assert len(list(source)) == 3


def test_missing_topic_and_topic_without_messages(bag, demo) -> None:
    path = bag(change=lambda entry: None if entry[0] == "wrist_camera" else entry)
    with pytest.raises(BagError, match=r"wrist_camera.*demo_arm\); the bag has .*base_camera") as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_TOPIC_MISSING


def test_an_optional_stream_may_be_missing(bag, demo) -> None:
    path = bag(change=lambda entry: None if entry[0] == "wrist_camera" else entry)
    optional = replace(demo.streams["wrist_camera"], optional=True)
    contract = replace(demo, streams=MappingProxyType({**demo.streams, "wrist_camera": optional}))
    with BagSource(path, contract, samples=3) as source:
        assert [list(item.images) for item in source] == [["base_0_rgb"]] * 3


def test_wrong_message_type(bag, demo) -> None:
    streams = dict(demo.streams)
    streams["wrist_camera"] = replace(streams["wrist_camera"], type=StreamType.IMAGE)
    path = write_bag(bag().parent / "raw", replace(demo, streams=MappingProxyType(streams)), 1.0)
    with pytest.raises(BagError, match=r"holds sensor_msgs/msg/Image.*expects .*CompressedImage") as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_TOPIC_TYPE


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_truncated_file(bag, demo, storage: str) -> None:
    path = bag(storage=storage)
    file = next(path.glob("bag*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(BagError, match="truncated") as caught, BagSource(path, demo, samples=8) as source:
        list(source)
    assert caught.value.reason is Reason.BAG_UNREADABLE


def test_damage_in_the_middle(bag, demo) -> None:
    """Compressed data that is overwritten: the index is intact, the messages are not."""
    path = bag(2.0, storage="mcap", compression="message")
    file = next(path.glob("*.mcap"))
    content = bytearray(file.read_bytes())
    middle = len(content) // 4
    content[middle : middle + 20000] = bytes(20000)
    file.write_bytes(content)
    with pytest.raises(BagError) as caught, BagSource(path, demo, samples=8) as source:
        list(source)
    assert caught.value.reason is Reason.BAG_UNREADABLE


def test_no_metadata(bag, demo) -> None:
    path = bag()
    (path / "metadata.yaml").unlink()
    with pytest.raises(BagError, match=r"no metadata\.yaml.*ros2 bag reindex.*\.mcap") as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_UNREADABLE


@pytest.mark.parametrize("content", ["", "rosbag2_bagfile_information: [", "rosbag2_bagfile_information: {}"])
def test_bad_metadata(bag, demo, content: str) -> None:
    path = bag()
    (path / "metadata.yaml").write_text(content)
    with pytest.raises(BagError) as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_UNREADABLE


def test_no_bag_at_all(demo, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path, words in ((tmp_path / "absent", "no such bag"), (tmp_path / "notes.txt", "not a bag")):
        with pytest.raises(BagError, match=words):
            BagSource(path, demo)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BagError, match="it is no rosbag2"):
        BagSource(tmp_path / "empty", demo)


def test_empty_bag(bag, demo) -> None:
    with pytest.raises(BagError, match="holds no messages"):
        BagSource(bag(0.0), demo)


def test_a_clock_set_during_recording(bag, demo) -> None:
    """A computer without a battery clock starts in 1970: the bag seems to last for decades."""
    early = 5 * S

    def shift(entry: Entry) -> Entry:
        name, index, stamp, time, data = entry
        first = time < START + 2 * S
        return (name, index, stamp - START + early, time - START + early, data) if first else entry

    with BagSource(bag(4.0, change=shift), demo, samples=16) as source:
        taken = [item.stamps["joint_states"] for item in source]
    assert source.used == 16
    assert sum(stamp < START for stamp in taken) in range(6, 11)
    assert reasons(source) == [Reason.BAG_CLOCK_JUMP]
    assert "2.000 s into the bag" in str(source.warnings[0]) or "1.99" in str(source.warnings[0])


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_header_stamps_that_jump(bag, demo, jump: int) -> None:
    """From then on they disagree with the recorder's clock: not used, and said."""

    def shift(entry: Entry) -> Entry:
        name, index, stamp, time, data = entry
        return (name, index, stamp + jump * S * (time > START + 2 * S), time, data)

    with BagSource(bag(4.0, change=shift), demo, samples=16) as source:
        taken = [item.stamps["joint_states"] for item in source]
    assert 0 < len(taken) < 12
    assert all(START <= stamp <= START + 2 * S for stamp in taken)
    assert {Reason.BAG_CLOCK_JUMP, Reason.BAG_FEW_SAMPLES} == set(reasons(source))
    assert set(source.skipped) <= {Reason.STALE_STAMP, Reason.CLOCK, Reason.SKEW}


def test_simulated_time(bag, demo) -> None:
    """Stamps that begin at 0 are judged by /clock, and an error names the way where that was not asked."""
    clock_type = "rosgraph_msgs/msg/Clock"

    def record_clock(writer: Any) -> None:
        connection = writer.add_connection("/clock", clock_type, typestore=STORE)
        for tick in range(0, 4 * S, 10 * MS):
            writer.write(connection, START + tick, stamped(bytes([0, 1, 0, 0] + [0] * 8), tick))

    def shift(entry: Entry) -> Entry:
        name, index, stamp, time, data = entry
        return (name, index, stamp - START, time, data)

    path = bag(4.0, change=shift, extra=record_clock)
    with pytest.raises(BagError, match="use_sim_time") as caught, BagSource(path, demo) as source:
        list(source)
    assert caught.value.reason is Reason.STALE_STAMP
    with BagSource(path, demo, samples=8, use_sim_time=True) as source:
        assert len(list(source)) == 8
    assert source.warnings == []
    with pytest.raises(BagError, match="/clock was not recorded"):
        BagSource(bag(change=shift), demo, use_sim_time=True)


def test_frozen_cameras(bag, demo) -> None:
    first: dict[str, bytes] = {}

    def freeze(entry: Entry, names: tuple[str, ...]) -> Entry:
        name, index, stamp, time, data = entry
        return (name, index, stamp, time, first.setdefault(name, data) if name in names else data)

    one = bag(change=lambda entry: freeze(entry, ("base_camera",)))
    with BagSource(one, demo, samples=6) as source:
        assert len(list(source)) == 6
    assert reasons(source) == [Reason.BAG_FROZEN]
    assert "base_0_rgb" in str(source.warnings[0])
    both = bag(change=lambda entry: freeze(entry, ("base_camera", "wrist_camera")))
    with BagSource(both, demo, samples=6) as source:
        mappings = source.mappings("wave")
        for _ in range(5):
            next(mappings)
        with pytest.raises(BagError, match="frozen") as caught:  # who takes six is told before the sixth
            next(mappings)
    assert caught.value.reason is Reason.BAG_FROZEN


def test_fewer_observations_than_asked_for(bag, demo) -> None:
    with BagSource(bag(0.5), demo, samples=64) as source:
        count = len(list(source))
    assert 5 < count <= 29  # no pair of frames twice
    assert reasons(source) == [Reason.BAG_FEW_SAMPLES]
    assert f"{count} different observations, 64 were asked for" in str(source.warnings[0])


def test_nothing_usable_names_the_cause(bag, demo) -> None:
    def apart(entry: Entry) -> Entry | None:
        name, index, stamp, time, data = entry
        late = 10 * S if name == "wrist_camera" else 0
        return (name, index, stamp + late, time + late, data)

    with pytest.raises(BagError, match=r"no observation could be made.*NO_MESSAGE") as caught:  # noqa: SIM117
        with BagSource(bag(2.0, change=apart), demo, samples=4) as source:
            list(source)
    assert caught.value.reason in (Reason.NO_MESSAGE, Reason.STALE_RECEIPT)


def test_a_changed_encoding_is_not_mixed_in(bag, demo) -> None:
    gray = image_message(pattern((64, 48), 1), "mono8")

    def change(entry: Entry) -> Entry:
        name, index, stamp, time, data = entry
        return (name, index, stamp, time, gray if name == "base_camera" and index >= 60 else data)

    with BagSource(bag(4.0, change=change), demo, samples=8) as source:
        taken = list(source)
    assert 0 < len(taken) < 8
    assert source.skipped[Reason.IMAGE_ENCODING] > 0
    assert Reason.BAG_FEW_SAMPLES in reasons(source)


def test_mappings_are_what_calibrate_takes(bag, demo) -> None:
    with BagSource(bag(), demo, samples=2) as source:
        for mapping in source.mappings("wave"):
            assert mapping["prompt"] == "wave"
            assert list(mapping["images"]) == ["base_0_rgb", "left_wrist_0_rgb"]
            assert mapping["state"].shape == (7,)
    with pytest.raises(ValueError, match="samples"):
        BagSource(bag(), demo, samples=0)


def test_observe_sees_what_had_come_until_then(bag, demo) -> None:
    with BagSource(bag(2.0), demo) as source:
        begin = START + TRANSPORT
        early, late = source.observe([begin - 1, begin + S])
        assert early.problem is not None
        assert early.problem.reason is Reason.NO_MESSAGE
        assert late.observation is not None
        assert late.observation.stamps["joint_states"] == START + S


def test_header_stamp_of_both_byte_orders() -> None:
    little = bytes([0, 1, 0, 0]) + (7).to_bytes(4, "little") + (9).to_bytes(4, "little")
    big = bytes([0, 0, 0, 0]) + (7).to_bytes(4, "big") + (9).to_bytes(4, "big")
    assert header_stamp(little) == header_stamp(big) == 7 * S + 9
    with pytest.raises(BagError, match="too short"):
        header_stamp(little[:11])


def test_recorded_spans_finds_a_pause(bag, demo) -> None:
    def pause(entry: Entry) -> Entry:
        name, index, stamp, time, data = entry
        late = 30 * S * (time > START + 3 * S)
        return (name, index, stamp + late, time + late, data)

    path = bag(4.0, change=pause)
    topics = [f"/{stream.topic}" for stream in demo.streams.values()]
    reader = open_bag(path)
    (first, last), (again, end) = bag_index.recorded_spans(reader, topics)
    assert (first, end) == (reader.start, reader.end)
    assert START + 3 * S - 20 * MS <= last <= START + 3 * S + 5 * MS
    assert again == min(message.time for message in reader.read(topics, last + S, end + 1))
    shutil.rmtree(path)


def test_sqlite_without_its_index_table(bag, demo) -> None:
    path = bag(storage="sqlite3")
    with sqlite3.connect(next(path.glob("*.db3"))) as database:
        database.execute("DROP TABLE topics")
    with pytest.raises(BagError) as caught:
        BagSource(path, demo)
    assert caught.value.reason is Reason.BAG_UNREADABLE
