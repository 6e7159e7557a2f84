"""The cache's place, atomic writes, and digests of files that are read once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashrt_runtime import cache
from flashrt_runtime.cache import cache_directory, content_digest, write_atomically
from flashrt_runtime.checkpoints.safetensors_store import SafetensorsWriter
from flashrt_runtime.quantization.weight_cache import WeightCache


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in (*cache.DIRECTORY_VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_where_it_is(no_variables: pytest.MonkeyPatch) -> None:
    assert cache_directory() == Path.home() / ".cache" / "flash_rt"
    no_variables.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    assert cache_directory() == Path.home() / ".cache" / "flash_rt"
    no_variables.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == Path("/xdg/flash_rt")
    no_variables.setenv("FLASH_RT_HOME", "~/robot")
    assert cache_directory() == Path.home() / "robot"
    no_variables.setenv("FLASHRT_CACHE_DIR", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")


def test_atomic_write_removes_only_what_is_abandoned(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_atomically(file, b"one")
    old, young = (file.with_name(f".file.{pid}.aa.part") for pid in (1, 2))
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


def write_checkpoint(path: Path) -> None:
    writer = SafetensorsWriter(path, {"w": (torch.float32, (4,))}, {})
    writer.write("w", torch.ones(4))
    writer.finish()


def write_quantised(path: Path) -> None:
    kept = WeightCache.__new__(WeightCache)
    kept.folder, kept.key = path.parent, path.stem
    kept.save(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "write", [write_checkpoint, write_quantised, lambda path: write_atomically(path, b"content")]
)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave zeros under it, and zeros are weights."""
    synced = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, list(tmp_path.glob("w*"))))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "w.safetensors")
    (file,) = tmp_path.iterdir()
    assert (file.stat().st_ino, []) in synced


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "PIECE", 1 << 12)
    file = tmp_path / "weights"
    file.write_bytes(os.urandom((1 << 14) + 5))
    return file


@pytest.mark.parametrize("position", [0, 1 << 12, (1 << 13) + 3, (1 << 14) + 4])
def test_every_byte_counts(weights: Path, position: int) -> None:
    before = content_digest([weights])
    content = bytearray(weights.read_bytes())
    content[position] ^= 1
    weights.write_bytes(content)
    assert content_digest([weights]) != before
    content[position] ^= 1
    weights.write_bytes(content)
    assert content_digest([weights]) == before


def test_pieces_and_files_cannot_change_places(tmp_path: Path, weights: Path) -> None:
    content, other = weights.read_bytes(), tmp_path / "other"
    swapped = content[1 << 12 : 1 << 13] + content[: 1 << 12] + content[1 << 13 :]
    other.write_bytes(swapped)
    digests = {
        content_digest([weights]),
        content_digest([other]),
        content_digest([weights, other]),
        content_digest([other, weights]),
    }
    assert len(digests) == 4


def test_an_unchanged_file_is_read_once(weights, tmp_path, monkeypatch) -> None:
    remember = tmp_path / "digests.json"
    read: list[Path] = []
    real = cache._file_digest

    def counted(file: Path, size: int) -> str:
        read.append(file)
        return real(file, size)

    monkeypatch.setattr(cache, "_file_digest", counted)
    first = content_digest([weights], remember)
    assert content_digest([weights], remember) == first
    assert len(read) == 1

    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # by modification time
    assert content_digest([weights], remember) == first
    assert len(read) == 2

    stat = weights.stat()
    copy = tmp_path / "copy"  # by inode: another file under the name, of the same size and time
    copy.write_bytes(weights.read_bytes()[::-1])
    copy.replace(weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digest([weights], remember) != first
    assert len(read) == 3

    stat = weights.stat()
    with weights.open("ab") as stream:  # by size
        stream.write(b"x")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    content_digest([weights], remember)
    assert len(read) == 4

    weights.rename(tmp_path / "moved")  # by path
    content_digest([tmp_path / "moved"], remember)
    assert len(read) == 5


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_a_damaged_memory_costs_the_time_of_reading(weights: Path, tmp_path: Path, content: bytes) -> None:
    remember = tmp_path / "digests.json"
    remember.write_bytes(content)
    assert content_digest([weights], remember) == content_digest([weights])
    assert len(cache._read_digests(remember)) == 1
