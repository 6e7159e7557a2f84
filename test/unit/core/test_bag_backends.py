"""The reader over ROS's rosbag2_py, and the size of a bag that sampling must cope with.

No wheel has rosbag2_py: a module with the part of its interface that is used stands in for it, over the same
files. It shows that the calls fit together, not that ROS's own would answer so.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rosbags.rosbag2 import Reader

from benchmarks import bench_bag
from benchmarks.synthetic_bag import write_bag
from flashrt_ros.core.bag_reader import open_bag
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.errors import BagError
from flashrt_ros.core.reasons import Reason


class StandInReader:
    """rosbag2_py.SequentialReader and SequentialCompressionReader."""

    def open(self, storage: SimpleNamespace, converter: tuple[str, str]) -> None:
        assert converter == ("", "")
        self._reader = Reader(storage.uri)
        self._reader.open()
        self._topics: list[str] = []
        self._waiting: list[tuple[str, bytes, int]] = []

    def set_filter(self, wanted: SimpleNamespace) -> None:
        self._topics = wanted.topics

    def seek(self, time: int) -> None:
        connections = [item for item in self._reader.connections if item.topic in self._topics]
        found = self._reader.messages(connections, time)
        self._waiting = [(connection.topic, data, at) for connection, at, data in found][::-1]

    def has_next(self) -> bool:
        return bool(self._waiting)

    def read_next(self) -> tuple[str, bytes, int]:
        return self._waiting.pop()


class StandInInfo:
    """rosbag2_py.Info."""

    def read_metadata(self, uri: str, storage_id: str) -> SimpleNamespace:
        try:
            with Reader(uri) as reader:
                topics = [
                    SimpleNamespace(
                        topic_metadata=SimpleNamespace(name=item.topic, type=item.msgtype),
                        message_count=item.msgcount,
                    )
                    for item in reader.connections
                ]
                return SimpleNamespace(
                    storage_identifier="mcap",
                    compression_format=reader.compression_format or "",
                    topics_with_message_count=topics,
                    starting_time=SimpleNamespace(nanoseconds=reader.start_time),
                    duration=SimpleNamespace(nanoseconds=reader.end_time - 1 - reader.start_time),
                    message_count=reader.message_count,
                )
        except Exception as error:  # as ROS has it for whatever is wrong
            raise RuntimeError(str(error)) from error


@pytest.fixture
def rosbag2_py(monkeypatch) -> ModuleType:
    module = ModuleType("rosbag2_py")
    module.__spec__ = importlib.machinery.ModuleSpec("rosbag2_py", None)
    module.Info = StandInInfo
    module.SequentialReader = module.SequentialCompressionReader = StandInReader
    module.StorageOptions = SimpleNamespace
    module.ConverterOptions = lambda *formats: formats
    module.StorageFilter = SimpleNamespace
    monkeypatch.setitem(sys.modules, "rosbag2_py", module)
    return module


@pytest.mark.parametrize("compression", ["", "message"])
def test_rosbag2_py_is_preferred_and_gives_the_same(tmp_path, demo, rosbag2_py, compression) -> None:
    path = write_bag(tmp_path / "bag", demo, 2.0, compression=compression, size=(16, 12))
    taken = {}
    for backend in ("auto", "rosbags"):
        with BagSource(path, demo, samples=6, backend=backend) as source:
            taken[type(source.reader).__name__] = [
                (item.stamps, item.images["base_0_rgb"].tobytes(), item.state.tobytes()) for item in source
            ]
        assert source.warnings == []
    first, second = taken.values()
    assert len(taken) == 2
    assert first == second


def test_rosbag2_py_on_a_bag_of_no_use(tmp_path, demo, rosbag2_py) -> None:
    path = write_bag(tmp_path / "bag", demo, 1.0, size=(16, 12))
    file = next(path.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BagError, match="truncated") as caught:
        open_bag(path)
    assert caught.value.reason is Reason.BAG_UNREADABLE
    with pytest.raises(BagError, match="holds no messages"):
        open_bag(write_bag(tmp_path / "empty", demo, 0.0))


def test_without_any_reader(tmp_path, demo, monkeypatch) -> None:
    path = write_bag(tmp_path / "bag", demo, 0.5, size=(16, 12))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BagError, match="pip install rosbags"):
        open_bag(path)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_minute_of_raw_cameras_takes_seconds_and_little_memory(tmp_path: Path, storage: str) -> None:
    """3.3 GB, evicted from the page cache as far as the system lets us; on two cores that are free."""
    figures = bench_bag.run(tmp_path, storage, "", 60.0, 64)
    assert figures["bag_mb"] > 3000
    assert figures["used"] == 64
    assert figures["peak_mb"] <= bench_bag.GOAL_MB
    assert figures["seconds"] <= bench_bag.GOAL_SECONDS
