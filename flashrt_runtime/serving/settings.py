"""Limits of the server: every one of them bounds memory, time or who may ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..errors import OptionError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """What `flashrt serve` lets through.

    queue_size: observations that may wait for the model; one more is answered 429. deadline_s: from the first
    byte of a request to its answer, 504 beyond it; a request may ask for less. max_body_bytes: of one HTTP
    body or websocket message (413, 1009). max_buffered_bytes: of all bodies being read at once (429).
    receive_timeout_s: for the head of a request, and again for its body (closed, 408). max_pixels: of one
    decoded image. max_connections: openpi's websockets. default_prompt: for requests without one. layout:
    openpi observations are read as this layout ("auto": by their keys). cameras: the key of a view's image in
    an openpi observation, by view, where the layout does not know it. stuck_after_s: an inference that takes
    longer makes /health answer 503. token: what a client must present.
    """

    queue_size: int = 16
    deadline_s: float = 10.0
    max_body_bytes: int = 32 * MEBIBYTE
    max_buffered_bytes: int = 256 * MEBIBYTE
    receive_timeout_s: float = 10.0
    max_pixels: int = 4096 * 4096
    max_connections: int = 64
    default_prompt: str | None = None
    layout: str = "auto"
    cameras: Mapping[str, str] = field(default_factory=dict)
    stuck_after_s: float = 30.0
    token: str | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, (int, float)) and not 0 < value < float("inf"):
                raise OptionError(f"{entry.name} must be more than 0, got {value!r}")
        if self.token is not None and len(self.token) < 8:
            raise OptionError("the server's token is shorter than 8 characters: use a random one")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise OptionError(
                f"max_buffered_bytes={self.max_buffered_bytes} is less than one body of "
                f"{self.max_body_bytes} bytes"
            )
