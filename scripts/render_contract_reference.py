#!/usr/bin/env python3
"""Writes the reference of the robot contract into docs/robots.md, from the schema that contracts are checked
against.

    python scripts/render_contract_reference.py          rewrite the page
    python scripts/render_contract_reference.py --check  exit status 1 when it is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "flashrt_ros" / "core" / "contract_schema.json"
PAGE = ROOT / "docs" / "robots.md"
BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"


def render(schema: dict[str, Any]) -> str:
    """The tables, one per mapping of the contract."""
    return "\n".join(_table(schema, title, node) for title, node in _mappings(schema))


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """A node with what its `$ref` points to; its own keys win."""
    reference = node.get("$ref")
    return {**schema["$defs"][reference.rpartition("/")[2]], **node} if reference else node


def _mappings(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Headings and the mappings they are about."""
    definitions = schema["$defs"]
    yield "The file", schema
    yield "`streams.NAME`", definitions["stream"]
    yield "`streams.NAME.qos`", definitions["qos"]
    yield "`streams.NAME.crop`", definitions["crop"]
    yield "`joints[]`", definitions["joint"]
    yield "`joints[].limits`", definitions["joint"]["properties"]["limits"]
    yield "`grippers.JOINT`", definitions["gripper"]
    yield "`state`, or each entry of it where it is a list", definitions["state_source"]
    yield "`action`", schema["properties"]["action"]
    yield "`outputs[]`", definitions["output"]
    for name in ("limits", "sync", "rates", "timeline"):
        yield f"`{name}`", schema["properties"][name]
    yield "`timeline.rtc`", definitions["rtc"]


def _table(schema: dict[str, Any], title: str, node: dict[str, Any]) -> str:
    rows = ["", f"### {title}", "", "| key | value | default | meaning |", "|---|---|---|---|"]
    for name, entry in node["properties"].items():
        resolved = _resolved(schema, entry)
        needed = name in node.get("required", ())
        default = "needed" if needed else _default(resolved)
        rows.append(f"| `{name}` | {_values(resolved)} | {default} | {resolved['title']} |")
    return "\n".join(rows) + "\n"


def _default(node: dict[str, Any]) -> str:
    if "default" not in node:
        return ""
    value = node["default"]
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    return str(node["description"])


def page_with(reference: str, page: str) -> str:
    """`page` with what stands between the marks replaced; raises ValueError when a mark is missing."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE}: expected the marks {BEGIN} and {END} once each")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    return f"{head}{BEGIN}\n{reference}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    old = PAGE.read_text(encoding="utf-8")
    new = page_with(render(json.loads(SCHEMA.read_text(encoding="utf-8"))), old)
    if arguments == ["--check"]:
        if old != new:
            print(f"{PAGE} is out of date: run python scripts/render_contract_reference.py", file=sys.stderr)
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
