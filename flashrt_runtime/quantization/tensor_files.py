"""Tensors in a file that is named by its content, so that whoever reads it can tell it whole from damaged."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..cache import content_digest, put_in_place, remove_abandoned

NAMED_DIGITS = 16  # of the digest, in the name


def named(stem: str, digest: str, suffix: str) -> str:
    """<stem>.<first digits of the digest><suffix>"""
    return f"{stem}.{digest[:NAMED_DIGITS]}{suffix}"


def holds_what_its_name_says(path: Path, suffix: str) -> bool:
    """Whether its digest, of every byte, is that of its name. Raises OSError."""
    return content_digest([path])[:NAMED_DIGITS] == path.name.removesuffix(suffix).rpartition(".")[2]


def write(
    folder: Path,
    stem: str,
    suffix: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, str, bool]:
    """Keep tensors in `folder`, complete or not at all, readable for whom the umask lets; where, the digest
    of all of it, and whether it was not there before. A file of the same content stays as it is. What killed
    writers left is removed once it is an hour old. Raises OSError.
    """
    unfinished = f".{stem}{suffix}."
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, f"{glob.escape(unfinished)}*.part")
    # a directory of its own also holds what safetensors makes on the way, under a name that is not ours
    own = folder / f"{unfinished}{os.getpid()}.{secrets.token_hex(4)}.part"
    own.mkdir()
    try:
        temporary = own / "weights"
        save_file(
            {name: each.detach().cpu().contiguous() for name, each in tensors.items()},
            temporary,
            None if metadata is None else dict(metadata),
        )
        temporary.chmod(own.stat().st_mode & 0o666)  # safetensors makes it private
        digest = content_digest([temporary])
        target = folder / named(stem, digest, suffix)
        new = not _is_whole(target, digest)
        if new:
            put_in_place(temporary, target)
        return target, digest, new
    except SafetensorError as error:
        raise OSError(f"{folder}: tensors could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(own)


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return content_digest([path]) == digest
    except OSError:
        return False
