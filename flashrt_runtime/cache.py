"""Where this package keeps what it can make again, and the identity of files on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DIRECTORY_VARIABLE = "FLASHRT_CACHE_DIR"
PIECE = 64 << 20
REMEMBERED = 64


def cache_directory() -> Path:
    """$FLASHRT_CACHE_DIR, or ~/.cache/flash_rt; not created."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "flash_rt"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears under its name complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def content_digest(files: Sequence[Path], remember: Path | None = None) -> str:
    """SHA-256 over every byte of `files`, as a hash of the hashes of 64 MiB pieces (several cores).

    remember: a JSON file of digests by path, size, modification time and inode: an unchanged file is read
    once.
    """
    known = _read_digests(remember)
    digests = []
    for file in files:
        state = file.stat()
        identity = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
        digest = known.pop(identity, None) or _file_digest(file, state.st_size)
        known[identity] = digest  # last: the most recently used survive
        digests.append(digest)
    if remember is not None:
        recent = dict(list(known.items())[-REMEMBERED:])
        with contextlib.suppress(OSError):  # a read-only home costs the time of hashing, no more
            write_atomically(remember, json.dumps(recent, indent=1).encode())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_digest(file: Path, size: int) -> str:
    def piece(offset: int) -> bytes:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            stream.seek(offset)
            remaining = min(PIECE, size - offset)
            while remaining > 0:
                block = stream.read(min(1 << 20, remaining))
                if not block:
                    break
                digest.update(block)
                remaining -= len(block)
        return digest.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, max(size, 1), PIECE)))).hexdigest()


def _read_digests(remember: Path | None) -> dict[str, str]:
    if remember is None:
        return {}
    try:
        content = json.loads(remember.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}
