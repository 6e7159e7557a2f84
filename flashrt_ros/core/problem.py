"""Why something is not as it should be, in the form that ~/status and /diagnostics say it."""

from __future__ import annotations

from dataclasses import dataclass

from .reasons import Reason


@dataclass(frozen=True, slots=True)
class Problem:
    """A reason and its words; `stream` is empty unless one stream is to blame."""

    reason: Reason
    stream: str
    message: str

    def __str__(self) -> str:
        return f"{self.stream}: {self.message}" if self.stream else self.message


NONE = Problem(Reason.OK, "", "")
