"""Where the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json

from rich.console import Console

OUTPUT = Console()
ERRORS = Console(stderr=True)


def print_json(content: object) -> None:
    """A result for programs: one JSON document on stdout, never wrapped or coloured."""
    print(json.dumps(content, indent=2))
