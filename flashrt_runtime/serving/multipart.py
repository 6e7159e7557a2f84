"""multipart/form-data and the content-type header."""

from __future__ import annotations

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header

from .refusals import Refusal, invalid

MAX_PARTS = 32
MAX_FIELD_BYTES = 1 << 16


def media_type(header: str) -> tuple[str, dict[str, str]]:
    """Type in lower case and its parameters; an unreadable header is an empty type."""
    try:
        kind, options = parse_options_header(header)
        return kind.decode("latin-1"), {
            key.decode("latin-1"): value.decode("latin-1") for key, value in options.items()
        }
    except (ValueError, AssertionError, UnicodeError):
        return "", {}


def parts_of(boundary: str | None, body: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Fields and files of a body, each by name. Raises Refusal (400 for bytes that are no such body)."""
    if not boundary:
        raise _malformed("the content-type names no boundary")
    parts = _Parts()
    limits = {
        "MAX_MEMORY_FILE_SIZE": len(body) + 1,  # never a temporary file
        "MAX_FIELDS": MAX_PARTS,
        "MAX_FIELD_SIZE": MAX_FIELD_BYTES,
    }
    try:
        parser = FormParser(
            "multipart/form-data",
            parts.on_field,
            parts.on_file,
            parts.on_end,
            boundary=boundary.encode("latin-1"),
            config=limits,
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise _malformed(str(error)) from error
    if not parts.complete:
        raise _malformed("it ends before its closing boundary")
    try:
        return {name: content.decode("utf-8") for name, content in parts.fields.items()}, parts.files
    except UnicodeDecodeError as error:
        raise _malformed(f"a field is not UTF-8: {error}") from error


def _malformed(reason: str) -> Refusal:
    return Refusal(400, "malformed_body", f"not a multipart/form-data body: {reason}")


class _Parts:
    """What the parser finds."""

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.complete = False

    def on_field(self, part: Any) -> None:
        self._keep(self.fields, part.field_name, part.value or b"")

    def on_file(self, file: Any) -> None:
        stream = file.file_object
        stream.seek(0)
        self._keep(self.files, file.field_name, stream.read())
        file.close()

    def on_end(self) -> None:
        self.complete = True

    def _keep(self, target: dict[str, bytes], name: bytes | None, content: bytes) -> None:
        text = (name or b"").decode("utf-8", "replace")
        if text in self.fields or text in self.files:
            raise invalid(f"{text[:60]!r} was sent twice")
        if len(self.fields) + len(self.files) >= MAX_PARTS:
            raise invalid(f"more than {MAX_PARTS} parts")
        target[text] = content
