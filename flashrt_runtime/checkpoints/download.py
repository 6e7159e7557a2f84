"""Fetches PaliGemma's tokenizer and checks that it is the published file."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..cache import write_atomically
from ..errors import TokenizerNotFoundError
from ..progress import report

BUCKET_PATH = "big_vision/paligemma_tokenizer.model"
URL = f"https://storage.googleapis.com/{BUCKET_PATH}"
SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
SIZE = 4_264_023


class TokenizerDownloadError(TokenizerNotFoundError):
    """The tokenizer could not be fetched, or what came is not the published file."""


def is_published(file: Path) -> bool:
    """Whether a file is PaliGemma's tokenizer, byte for byte."""
    return file.is_file() and file.stat().st_size == SIZE and _digest(file.read_bytes()) == SHA256


def download_tokenizer(target: Path, url: str = URL, timeout_s: float = 60.0) -> bool:
    """Put the tokenizer at `target` unless it is there already; True when it was fetched.

    A file of other content at `target` is replaced only by a checked download. Raises TokenizerDownloadError.
    """
    if is_published(target):
        return False

    def read() -> bytes:
        content = bytearray()
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            while len(content) <= SIZE and (block := reply.read(1 << 16)):
                content += block
                report(len(content), SIZE)
        return bytes(content)

    _store(target, url, read)
    return True


def download_with_gcsfs(target: Path) -> Path:
    """The same through gcsfs, as openpi does. Raises TokenizerDownloadError."""

    def read() -> bytes:
        filesystem: Any = import_module("gcsfs").GCSFileSystem(token="anon")
        content: bytes = filesystem.cat_file(BUCKET_PATH)
        return content

    if not is_published(target):
        _store(target, f"gs://{BUCKET_PATH}", read)
    return target


def _store(target: Path, source: str, read: Callable[[], bytes]) -> None:
    try:
        content = read()
    except Exception as error:  # the libraries below raise types of their own
        reason = str(error) or type(error).__name__
        raise TokenizerDownloadError(f"{source} could not be fetched: {reason}") from error
    digest = _digest(content)
    if digest != SHA256:
        raise TokenizerDownloadError(
            f"{source} is not PaliGemma's tokenizer: sha256 {digest}, {len(content)} bytes; "
            f"expected {SHA256}, {SIZE} bytes. Nothing was written"
        )
    write_atomically(target, content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
