#!/usr/bin/env python3
"""Write the tables of docs/node.md that have their source in the code: parameters and reason codes.

    python scripts/node_tables.py            # rewrite them
    python scripts/node_tables.py --check    # 1 and the names of those that are out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flashrt_ros.core.latch import AT_ONCE, REPEATED  # noqa: E402
from flashrt_ros.core.parameters import markdown_table  # noqa: E402
from flashrt_ros.core.reasons import Reason  # noqa: E402

DOCUMENT = ROOT / "docs" / "node.md"


def reasons_table() -> str:
    """Code, name, meaning, and whether it latches."""
    lines = ["| code | name | meaning | latches |", "|---|---|---|---|"]
    for reason in Reason:
        latches = "at once" if reason in AT_ONCE else "when repeated" if reason in REPEATED else ""
        lines.append(f"| {int(reason)} | `{reason.name}` | {reason.text} | {latches} |")
    return "\n".join(lines) + "\n"


TABLES = {"parameters": markdown_table, "reasons": reasons_table}


def rendered(text: str) -> str:
    """`text` with what lies between each table's markers replaced. Raises ValueError without markers."""
    for name, render in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{DOCUMENT} has no markers {begin.strip()} … {end.strip()}")
        text = before + begin + render() + end + after
    return text


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    old = DOCUMENT.read_text(encoding="utf-8")
    new = rendered(old)
    if "--check" in arguments:
        if new != old:
            print(f"{DOCUMENT} is out of date: run python scripts/node_tables.py", file=sys.stderr)
        return int(new != old)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
