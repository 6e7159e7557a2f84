"""Reads rosbag2 files: which topics, from when to when, and the serialised messages of any stretch of time.

Two readers behind one protocol: `rosbag2_py` where a ROS installation has it, else the `rosbags` package.
Neither decodes messages; a header stamp is read from the first bytes.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .errors import BagError
from .reasons import Reason
from .timing import NS_PER_S

STORAGE_SUFFIXES = (".mcap", ".db3")
# Type name and serialised bytes -> an object with the attributes of the ROS message.
Decoder = Callable[[str, bytes], Any]


class RawMessage(NamedTuple):
    """One recorded message; `time` is when the recorder received it [ns]."""

    topic: str
    type: str
    time: int
    data: bytes


class BagReader(Protocol):
    """An open bag. `start` and `end`: recorder's time of the first and last message [ns]."""

    path: Path
    types: Mapping[str, frozenset[str]]  # by topic; more than one where nodes disagreed
    start: int
    end: int
    indexed: bool  # a stretch is read without reading what comes before it

    def read(self, topics: Collection[str], start: int, stop: int) -> Iterator[RawMessage]:
        """Messages of these topics with start <= time < stop, in that order. Raises BagError."""
        ...

    def close(self) -> None: ...


def header_stamp(data: bytes) -> int:
    """Stamp of a serialised message that begins with a Header or a Time [ns]; Raises BagError when it is too
    short."""
    if len(data) < 12:
        raise BagError(Reason.BAG_UNREADABLE, f"a message of {len(data)} bytes is too short for a header")
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return int(sec) * NS_PER_S + int(nanosec)


def open_bag(path: str | Path, backend: str = "auto") -> BagReader:
    """Open a bag: its directory, or a single .mcap or .db3 file.

    backend: auto, rosbag2_py or rosbags. Raises BagError (BAG_UNREADABLE) that says what is wrong and what
    to do.
    """
    path = Path(path).expanduser()
    _check_path(path)
    if backend == "auto":
        backend = "rosbag2_py" if importlib.util.find_spec("rosbag2_py") else "rosbags"
    if importlib.util.find_spec(backend) is None:
        text = f"{path}: reading a bag needs rosbag2_py (a ROS installation has it) or `pip install rosbags`"
        raise BagError(Reason.BAG_UNREADABLE, text)
    reader = _Rosbag2PyReader(path) if backend == "rosbag2_py" else _RosbagsReader(path)
    if reader.end < reader.start:
        reader.close()
        raise BagError(Reason.BAG_UNREADABLE, f"{path}: the bag holds no messages")
    return reader


def rosbags_decoder() -> Decoder:
    """Decodes the standard ROS messages with the `rosbags` package. Raises BagError without it."""
    try:
        from rosbags.typesys import Stores, get_typestore
    except ImportError:
        text = "decoding messages without ROS needs the rosbags package: pip install rosbags"
        raise BagError(Reason.BAG_UNREADABLE, text) from None
    store = get_typestore(Stores.ROS2_JAZZY)
    return lambda type_name, data: store.deserialize_cdr(data, type_name)


def _check_path(path: Path) -> None:
    """What neither library would say so that it helps."""
    text = ""
    if not path.exists():
        text = "no such bag"
    elif path.is_dir() and not (path / "metadata.yaml").is_file():
        files = sorted(file.name for file in path.iterdir() if file.suffix in STORAGE_SUFFIXES)
        text = "no metadata.yaml in this directory"
        if files:
            text += f": the recorder did not finish. Run `ros2 bag reindex {path}`, or pass {path / files[0]}"
        else:
            text += f", nor a {' or '.join(STORAGE_SUFFIXES)} file: it is no rosbag2"
    elif path.is_file() and path.suffix not in STORAGE_SUFFIXES:
        suffixes = " or ".join(STORAGE_SUFFIXES)
        text = f"not a bag: expected a directory with metadata.yaml, or a {suffixes} file"
    if text:
        raise BagError(Reason.BAG_UNREADABLE, f"{path}: {text}")


def _unreadable(path: Path, error: Exception) -> BagError:
    """A library's error about damaged data, of whatever type, with the way out."""
    what = str(error).strip() or type(error).__name__
    text = (
        f"{path}: cannot be read, it may be truncated or damaged ({type(error).__name__}: {what}). "
        "Record it again, or repair it with `ros2 bag reindex` (sqlite3) or `mcap recover` (mcap)"
    )
    return BagError(Reason.BAG_UNREADABLE, text)


class _RosbagsReader:
    """BagReader over the `rosbags` package."""

    def __init__(self, path: Path) -> None:
        from rosbags.rosbag2 import Reader

        self.path = path
        try:
            self._reader = Reader(path)
            self._reader.open()
        except Exception as error:  # damaged bytes raise anything: struct, yaml, sqlite, zstd errors …
            raise _unreadable(path, error) from error
        types: dict[str, set[str]] = {}
        for connection in self._reader.connections:
            if connection.msgcount:
                types.setdefault(connection.topic, set()).add(connection.msgtype)
        self.types: Mapping[str, frozenset[str]] = {key: frozenset(value) for key, value in types.items()}
        self.start, self.end = self._reader.start_time, self._reader.end_time - 1
        # Only an MCAP file without chunks has to be read from its beginning each time.
        storages = getattr(self._reader.storage, "storages", [self._reader.storage])
        self.indexed = all(getattr(storage, "chunks", True) for storage in storages)

    def read(self, topics: Collection[str], start: int, stop: int) -> Iterator[RawMessage]:
        connections = [item for item in self._reader.connections if item.topic in topics]
        if not connections:
            return
        messages = self._reader.messages(connections, start, stop)
        while True:
            try:
                connection, time, data = next(messages)
            except StopIteration:
                return
            except Exception as error:  # as in __init__
                raise _unreadable(self.path, error) from error
            yield RawMessage(connection.topic, connection.msgtype, time, data)

    def close(self) -> None:
        with suppress(Exception):  # only files that were read from
            self._reader.close()


class _Rosbag2PyReader:
    """BagReader over ROS's own rosbag2_py."""

    indexed = True

    def __init__(self, path: Path) -> None:
        import rosbag2_py

        self._library = rosbag2_py
        self.path = path
        storage = {".mcap": "mcap", ".db3": "sqlite3"}.get(path.suffix, "") if path.is_file() else ""
        try:
            metadata = rosbag2_py.Info().read_metadata(str(path), storage)
            self._storage = metadata.storage_identifier or storage
            compressed = bool(metadata.compression_format)
            self._reader = (
                rosbag2_py.SequentialCompressionReader() if compressed else rosbag2_py.SequentialReader()
            )
            options = rosbag2_py.StorageOptions(uri=str(path), storage_id=self._storage)
            self._reader.open(options, rosbag2_py.ConverterOptions("", ""))
            types: dict[str, set[str]] = {}
            for topic in metadata.topics_with_message_count:
                if topic.message_count:
                    types.setdefault(topic.topic_metadata.name, set()).add(topic.topic_metadata.type)
            self.start = int(metadata.starting_time.nanoseconds)
            self.end = self.start + int(metadata.duration.nanoseconds) if metadata.message_count else -1
        except Exception as error:  # damaged bytes raise RuntimeError and YAML errors alike
            raise _unreadable(path, error) from error
        self.types: Mapping[str, frozenset[str]] = {key: frozenset(value) for key, value in types.items()}

    def read(self, topics: Collection[str], start: int, stop: int) -> Iterator[RawMessage]:
        try:
            self._reader.set_filter(self._library.StorageFilter(topics=sorted(topics)))
            self._reader.seek(start)
            while self._reader.has_next():
                topic, data, time = self._reader.read_next()
                if time >= stop:
                    return
                if time >= start:
                    yield RawMessage(topic, min(self.types[topic]), time, data)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _unreadable(self.path, error) from error

    def close(self) -> None:
        self._reader = None
