"""`flashrt doctor`: what this machine has of what a robot needs, one line for each, with the fix."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from .checkup import CHECKS, Finding
from .console import OUTPUT, print_json, progress

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("MISSING", "bold red")}


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check Python, ROS, GPU, driver, CUDA, torch, kernels, tokenizer, middleware and clock.

    Exit code 1 when something is missing that the runtime cannot do without.
    """
    findings: list[tuple[str, Finding]] = []
    with progress("checking", len(CHECKS)) as advance:
        for name, check in CHECKS.items():
            findings.append((name, check()))
            advance()
    missing = [name for name, finding in findings if finding.status == "missing"]
    if as_json:
        rows = [{"item": name, **finding.as_json()} for name, finding in findings]
        print_json({"ok": not missing, "missing": missing, "items": rows})
    else:
        for name, finding in findings:
            OUTPUT.print(_line(name, finding), soft_wrap=True)
    raise typer.Exit(1 if missing else 0)


def _line(name: str, finding: Finding) -> Text:
    mark, style = MARKS[finding.status]
    text = f"{finding.found}: {finding.fix}" if finding.fix else finding.found
    return Text.assemble((f"{mark:<8}", style), f"{name:<{max(map(len, CHECKS))}}  ", text)
