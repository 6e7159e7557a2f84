"""YAML with line numbers, checked against the contract's JSON schema.

Turns a contract file into plain data plus the line of every key and item, and every schema violation into
one clear line. Meaning across keys (does this joint exist?) is the business of `contract.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from .errors import ContractError, ContractProblem

SCHEMA_PATH = Path(__file__).with_name("contract_schema.json")
YamlPath = tuple[str | int, ...]


class ContractLoader(yaml.SafeLoader):
    """SafeLoader with the truth values of YAML 1.2: to 1.1, `off`, a mode of real-time chunking, is false."""


ContractLoader.yaml_implicit_resolvers = {
    letter: [
        (tag, re.compile("^(?:true|false)$") if tag == "tag:yaml.org,2002:bool" else pattern)
        for tag, pattern in resolvers
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class SourceMap:
    """Where each key or item of a contract stands: path of keys and indices -> line, counted from 1."""

    file: str = "<contract>"
    lines: Mapping[YamlPath, int] = field(default_factory=dict)

    def line(self, path: YamlPath) -> int:
        """Line of `path` or of its nearest enclosing key; 0 when nothing is known."""
        for end in range(len(path), -1, -1):
            if (found := self.lines.get(path[:end])) is not None:
                return found
        return 0

    def problem(self, path: YamlPath, text: str) -> ContractProblem:
        """A problem at the line of `path`."""
        return ContractProblem(self.file, self.line(path), text)


def read_contract_yaml(
    path: Path, overrides: Mapping[YamlPath, Any] = MappingProxyType({})
) -> tuple[dict[str, Any], SourceMap]:
    """Parse a contract file, put `overrides` in place, and check the result against the schema.

    Returns the plain data and its line numbers. Raises ContractError with every problem and its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError([ContractProblem(str(path), 0, f"cannot be read: {error}")]) from error
    data, source, problems = _parse(text, str(path))
    if not problems:
        for (*parents, key), value in overrides.items():
            reduce(lambda node, part: node.setdefault(part, {}), parents, data)[key] = value
        problems = [source.problem(*_describe(error)) for error in _leaves(_validator().iter_errors(data))]
    if problems:
        raise ContractError(sorted(set(problems), key=lambda problem: (problem.line, problem.text)))
    return data, source


@lru_cache(maxsize=1)
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(SCHEMA_PATH.read_text(encoding="utf-8")))


def _parse(text: str, file: str) -> tuple[Any, SourceMap, list[ContractProblem]]:
    def failed(line: int, reason: object) -> tuple[None, SourceMap, list[ContractProblem]]:
        return None, SourceMap(file), [ContractProblem(file, line, f"not valid YAML: {reason}")]

    try:
        loader = ContractLoader(text)
        root = loader.get_single_node()
        if root is None:
            return failed(0, "the file is empty, expected a robot contract")
        lines: dict[YamlPath, int] = {}
        problems = [ContractProblem(file, line, text) for line, text in _walk(root, (), root, lines)]
        data = None if problems else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, (error.context, error.problem)))
        return failed(mark.line + 1 if mark else 0, reason)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return failed(0, error)
    source = SourceMap(file, lines)
    return data, source, problems + [source.problem(path, text) for path, text in _not_finite(data, ())]


def _walk(node: Any, path: YamlPath, marked: Any, lines: dict[YamlPath, int]) -> Iterator[tuple[int, str]]:
    """Record the line of every key and item below `node`, which stands at the line of `marked`.

    Yields (line, text) of problems: YAML itself would let the last of repeated keys win silently.
    """
    lines[path] = marked.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                yield line, f"{dotted(path)}: every key must be plain text"
                continue
            if key.value in seen:
                yield line, f"{dotted(path)}: key {key.value} is given twice"
            seen.add(key.value)
            yield from _walk(value, (*path, key.value), key, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), item, lines)


def _not_finite(value: Any, path: YamlPath) -> Iterator[tuple[YamlPath, str]]:
    """JSON schema lets .nan and .inf pass as numbers."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{dotted(path)}: expected a finite number, got {value}"


def _leaves(errors: Iterator[ValidationError]) -> Iterator[ValidationError]:
    """The innermost errors of if/then/else branches; anyOf is described as a whole by its schema."""
    for error in errors:
        if error.context and error.validator in ("if", "allOf"):
            yield from _leaves(iter(error.context))
        else:
            yield error


def dotted(path: YamlPath) -> str:
    """`("joints", 0, "name")` as `joints[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "contract"


def _describe(error: ValidationError) -> tuple[YamlPath, str]:
    """Path and one-line text of a schema violation: what was expected, what came."""
    path: YamlPath = tuple(error.absolute_path)
    value: Any = error.instance
    where, schema = dotted(path), error.schema
    if not isinstance(schema, dict):
        return path, f"{where}: {error.message}"
    if error.validator == "required":
        missing = [key for key in schema["required"] if key not in value]
        return path, f"{where}: missing {', '.join(missing)}; required: {', '.join(schema['required'])}"
    if error.validator == "additionalProperties":
        known = schema["properties"]
        unknown = [key for key in value if key not in known]
        return (*path, unknown[0]), f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}"
    if error.validator == "enum":
        return path, f"{where}: expected one of {', '.join(map(str, schema['enum']))}; got {value!r}"
    expected = schema.get("description")
    if expected is None:
        return path, f"{where}: {error.message}"
    hint = _exponent_hint(value) if error.validator in ("type", "anyOf") else ""
    return path, f"{where}: expected {expected}, got {_short(value)}{hint}"


def _exponent_hint(value: Any) -> str:
    """YAML 1.1 reads 1e-3 as text: a trap that needs a word."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    return f" (text; write {number!r}, with a decimal point and without quotes)" if number else ""


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
