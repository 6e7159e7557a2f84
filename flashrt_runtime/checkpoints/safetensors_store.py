"""Safetensors files as a tensor store: one file or shards, memory-mapped, every kind of damage named.

Format: 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache import put_in_place
from ..errors import CheckpointError
from ..progress import tracked
from .stats import read_json_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMAT_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


# Linux on x86-64 and arm64; Python names it from 3.13 on.
MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: dtype name, shape and byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors file's header, checked against the file's length.

    Raises CheckpointError naming the file, and the first tensor that lies beyond its end when it is
    truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: not a safetensors file or truncated: {size} bytes, but its header needs "
                f"{length + 8}"
            )
        try:
            header = json.loads(file.read(length))
            start = 8 + length
            entries = {
                name: Entry(
                    str(item["dtype"]), tuple(item["shape"]), *(start + at for at in item["data_offsets"])
                )
                for name, item in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        _check_entry(path, name, entry, size)
    return entries


def _check_entry(path: Path, name: str, entry: Entry, size: int) -> None:
    """A tensor must lie within the file and have the bytes of its shape."""
    if entry.end > size:
        raise CheckpointError(
            f"{path}: truncated: {name!r} ends at byte {entry.end}, the file has {size}; fetch it again"
        )
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is not None and entry.end - entry.begin != prod(entry.shape) * dtype.itemsize:
        raise CheckpointError(
            f"{path}: {name!r} has {entry.end - entry.begin} bytes, not those of {entry.dtype} {entry.shape}"
        )


class SafetensorsStore:
    """Tensors of one or several safetensors files, mapped and never copied.

    The pages of a tensor are given back to the kernel when the next one is asked for, so that reading a whole
    checkpoint holds little of it in memory; a tensor that is still in use is simply read again.
    """

    def __init__(self, locations: Mapping[str, Path]) -> None:
        """locations: the file of every tensor. Raises CheckpointError when one is not as promised."""
        self.locations = dict(locations)
        self.files = tuple(sorted(set(self.locations.values())))
        headers = {file: read_header(file) for file in self.files}
        self.entries: dict[str, Entry] = {}
        for name, file in self.locations.items():
            if name not in headers[file]:
                raise CheckpointError(f"{file}: missing key {name!r}, which {INDEX_FILE} says is here")
            entry = headers[file][name]
            if entry.dtype not in TORCH_DTYPES:
                raise CheckpointError(
                    f"{file}: {name!r} is stored as {entry.dtype}, expected one of {', '.join(TORCH_DTYPES)}"
                )
            self.entries[name] = entry
        self.maps = {file: _map(file) for file in self.files}
        self._read: tuple[mmap.mmap, int, int] | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Storage dtype of every tensor."""
        return {name: TORCH_DTYPES[entry.dtype] for name, entry in self.entries.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, a view of the mapped file; what is written into it is lost."""
        if not self.maps:
            raise CheckpointError(f"{self.files[0]}: the checkpoint was closed")
        entry, mapped = self.entries[key], self.maps[self.locations[key]]
        self._give_back()
        dtype, count = TORCH_DTYPES[entry.dtype], prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        self._read = (mapped, entry.begin, entry.end)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.begin).view(entry.shape)

    def _give_back(self) -> None:
        """Drop the whole pages of the tensor handed out last from this process; the page cache keeps them."""
        if self._read is None:
            return
        mapped, begin, end = self._read
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, first, length)
        self._read = None

    def close(self) -> None:
        """Forget the mappings; tensors handed out keep theirs."""
        self._read = None
        self.maps.clear()


def _map(file: Path) -> mmap.mmap:
    """The whole file, privately and without reserving memory: torch wants writable memory even to read it."""
    with file.open("rb") as opened:
        return mmap.mmap(
            opened.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def open_store(directory: Path) -> SafetensorsStore:
    """The store of a directory: `model.safetensors`, or the shards its index names."""
    single = directory / WEIGHTS_FILE
    if single.is_file():
        return SafetensorsStore(dict.fromkeys(read_header(single), single))
    index = directory / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected an object under 'weight_map'")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{index}: weight_map[{name!r}] is {file!r}, expected a file name in this directory"
            )
        if not (directory / file).is_file():
            raise CheckpointError(f"{index}: shard {file!r}, which holds {name!r}, is not in {directory}")
    return SafetensorsStore({name: directory / file for name, file in weight_map.items()})


def find_non_finite(store: SafetensorsStore, keys: Iterable[str]) -> str | None:
    """The first of `keys` whose tensor holds NaN or infinity, or None.

    A sum is NaN or infinite if any term is; only such tensors are looked at element by element (a finite
    float16 sum may overflow). One pass at memory bandwidth, no copies.
    """
    wanted = list(keys)
    for key in tracked(wanted, len(wanted)):
        tensor = store.tensor(key)
        if not torch.isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
            return key
    return None


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, in any order and from several threads, without holding it
    in memory.

    The file appears under its name only when `finish` is called: a reader never sees half of it.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        # Wider dtypes first keeps every tensor aligned to its element size.
        order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self.offsets: dict[str, int] = {}
        position = 0
        for name in order:
            dtype, shape = tensors[name]
            end = position + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": FORMAT_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            self.offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.data_start = 8 + len(text)
        self.descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(self.descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self.descriptor, self.data_start + position)

    def write(self, name: str, data: torch.Tensor, byte_offset: int = 0) -> int:
        """Write `data` (already in the tensor's dtype, contiguous) at an offset into the tensor; the offset
        after it."""
        raw = memoryview(np.asarray(data.contiguous().view(-1).view(torch.uint8).numpy()))
        start = self.data_start + self.offsets[name] + byte_offset
        done = 0
        while done < len(raw):
            done += os.pwrite(self.descriptor, raw[done:], start + done)
        return byte_offset + len(raw)

    def finish(self) -> None:
        """Give the file its name, once all of it is on the disk: it begins as a hole of zeros."""
        os.close(self.descriptor)
        try:
            put_in_place(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def abort(self) -> None:
        """Remove what was written so far."""
        os.close(self.descriptor)
        self.temporary.unlink(missing_ok=True)
