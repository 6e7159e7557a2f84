"""Typed access to the entries of a JSON object; every mismatch names file and entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .stats import read_json_object


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and the file it came from; `prefix` is its place in there."""

    file: Path
    values: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, file: Path) -> JsonObject:
        """The object in a file. Raises CheckpointError when there is none."""
        return cls(file, read_json_object(file))

    def _typed(self, name: str, kinds: type | tuple[type, ...], described: str) -> Any:
        value = self.values.get(name)
        if value is None:
            return None
        accepts_bool = kinds is bool
        if not isinstance(value, kinds) or (isinstance(value, bool) and not accepts_bool):
            raise CheckpointError(f"{self.file}: {self.prefix}{name} is {value!r}, expected {described}")
        return value

    def integer(self, name: str) -> int | None:
        """An integer, or None when it is absent."""
        value: int | None = self._typed(name, int, "an integer")
        return value

    def required_integer(self, name: str) -> int:
        """A positive integer that must be there."""
        value = self.integer(name)
        if value is None:
            raise CheckpointError(f"{self.file}: no {self.prefix}{name}, which tensors do not tell")
        if value < 1:
            raise CheckpointError(f"{self.file}: {self.prefix}{name} is {value}, expected a positive integer")
        return value

    def number(self, name: str) -> float | None:
        """A number, or None."""
        value = self._typed(name, (int, float), "a number")
        return None if value is None else float(value)

    def text(self, name: str) -> str | None:
        """A string, or None."""
        value: str | None = self._typed(name, str, "a string")
        return value

    def flag(self, name: str) -> bool | None:
        """A boolean, or None."""
        value: bool | None = self._typed(name, bool, "true or false")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """An object, empty when it is absent."""
        value = self._typed(name, dict, "an object")
        return {} if value is None else dict(value)

    def names(self, name: str) -> tuple[str, ...] | None:
        """A list of distinct names, or None."""
        value = self._typed(name, list, "a list of names")
        if value is None:
            return None
        if not value or not all(isinstance(item, str) and item for item in value):
            raise CheckpointError(f"{self.file}: {self.prefix}{name} is {value!r}, expected a list of names")
        if len(set(value)) != len(value):
            raise CheckpointError(f"{self.file}: {self.prefix}{name} names something twice: {value}")
        return tuple(value)

    def flags(self, name: str) -> tuple[bool, ...] | None:
        """A list of booleans, or None."""
        value = self._typed(name, list, "a list of booleans")
        if value is None:
            return None
        if not all(isinstance(item, bool) for item in value):
            raise CheckpointError(
                f"{self.file}: {self.prefix}{name} is {value!r}, expected a list of booleans"
            )
        return tuple(value)
