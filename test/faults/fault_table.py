"""The table of docs/faults.md, written from what the rows measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROWS = 38
NOT_COMMANDING = "not applicable"
START, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


@dataclass(frozen=True)
class Outcome:
    """One row. to_hold [s]: from the cause to the last command that moved the arm; None: no hold is due;
    NOT_COMMANDING: nothing was commanded, so that there is nothing to measure."""

    number: int
    cause: str
    code: str
    to_hold: float | str | None
    recovered: str


def render(outcomes: dict[int, Outcome]) -> str:
    """The rows as Markdown, in the matrix's order."""
    lines = ["| # | cause | code | time to hold | recovered |", "|---|---|---|---|---|"]
    for number in sorted(outcomes):
        row = outcomes[number]
        held = "goes on" if row.to_hold is None else row.to_hold
        held = held if isinstance(held, str) else f"{held:.2f} s"
        lines.append(f"| {number} | {row.cause} | {row.code} | {held} | {row.recovered} |")
    return "\n".join(lines) + "\n"


def write(path: Path, outcomes: dict[int, Outcome]) -> None:
    """Replace the table between the markers in `path`. Raises ValueError for an incomplete one."""
    if missing := sorted(set(range(1, ROWS + 1)) - set(outcomes)):
        raise ValueError(f"rows {missing} have no outcome: the table in {path} stays as it is")
    text = path.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    path.write_text(before + START + render(outcomes) + END + after)
