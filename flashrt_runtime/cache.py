"""Where this package keeps what it can make again, and the identity of files on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import OptionError

DIRECTORY_VARIABLES = ("FLASHRT_CACHE_DIR", "FLASH_RT_HOME")  # the first that is set counts
PIECE = 64 << 20
REMEMBERED = 64
ABANDONED_S = 3600.0


def cache_directory() -> Path:
    """$FLASHRT_CACHE_DIR or $FLASH_RT_HOME, else flash_rt in $XDG_CACHE_HOME or ~/.cache; not created.

    Raises OptionError for a user without a home, as services have.
    """
    for variable in DIRECTORY_VARIABLES:
        if named := os.environ.get(variable):
            try:
                return Path(named).expanduser()
            except RuntimeError as error:
                raise OptionError(f"{variable}={named}: {error}: set it to a path without ~") from error
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not xdg.is_absolute():
        home = home_directory()
        if home is None:
            raise OptionError(
                "this user has no home directory, so there is nowhere to keep quantised weights and "
                f"calibrations: set {DIRECTORY_VARIABLES[0]} to a directory that it may write"
            )
        xdg = home / ".cache"
    return xdg / "flash_rt"


def home_directory() -> Path | None:
    """The user's; None for one who has none."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def looked_for(name: str) -> tuple[Path, ...]:
    """Where a file that a user put into the cache may be: there, and in ~/.cache/flash_rt, where it was
    once put whatever the variables said.
    """
    places: list[Path] = []
    with contextlib.suppress(OptionError):
        places.append(cache_directory() / name)
    if (home := home_directory()) is not None:
        places.append(home / ".cache" / "flash_rt" / name)
    return tuple(dict.fromkeys(places))


def obstacle_to(file: Path) -> str | None:
    """What keeps a file of this name from being written, as far as one can tell before; None: nothing.

    Directories that are missing are no obstacle where they can be made.
    """
    folder = next(each for each in file.absolute().parents if each.exists())
    if not folder.is_dir():
        return f"{folder} is no directory"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears under its name complete or not at all, whatever ends the process or the
    machine. Of several writers one wins. What a killed one left behind is removed once it is an hour old.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    remove_abandoned(path.parent, f".{path.name}.*.part")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file that is complete, so that a power cut leaves all of it under its name, or the old one."""
    _sync(temporary)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # where the file system cannot sync a directory
        _sync(path.parent)


def remove_abandoned(directory: Path, *patterns: str) -> None:
    """Remove what killed writers left behind: files and directories of these patterns that nobody touched
    for an hour.
    """
    for pattern in patterns:
        for left in directory.glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
