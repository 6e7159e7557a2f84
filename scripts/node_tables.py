#!/usr/bin/env python3
"""Write the tables of docs/node.md and README.md that have their source in the code: parameters and reasons.

    python scripts/node_tables.py            # rewrite them
    python scripts/node_tables.py --check    # 1 and the names of those that are out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flashrt_ros.core.latch import AT_ONCE, FOR_GOOD, REPEATED  # noqa: E402
from flashrt_ros.core.parameters import markdown_table  # noqa: E402
from flashrt_ros.core.reasons import Reason  # noqa: E402


def reasons_table() -> str:
    """Code, name, meaning, and whether it latches."""
    lines = ["| code | name | meaning | latches |", "|---|---|---|---|"]
    for reason in Reason:
        kinds = (("for good", FOR_GOOD), ("at once", AT_ONCE), ("when repeated", REPEATED))
        latches = next((words for words, reasons in kinds if reason in reasons), "")
        lines.append(f"| {int(reason)} | `{reason.name}` | {reason.text} | {latches} |")
    return "\n".join(lines) + "\n"


TABLES = {"parameters": markdown_table, "reasons": reasons_table}
DOCUMENTS = {"docs/node.md": ("parameters", "reasons"), "README.md": ("parameters",)}


def rendered(document: str, text: str) -> str:
    """`text` with what lies between each table's markers replaced. Raises ValueError without markers."""
    for name in DOCUMENTS[document]:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{document} has no markers {begin.strip()} … {end.strip()}")
        text = before + begin + TABLES[name]() + end + after
    return text


def main(arguments: list[str]) -> int:
    """Command line; see the module's docstring."""
    stale = 0
    for document in DOCUMENTS:
        old = (ROOT / document).read_text(encoding="utf-8")
        new = rendered(document, old)
        if "--check" not in arguments:
            (ROOT / document).write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{document} is out of date: run python scripts/node_tables.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
