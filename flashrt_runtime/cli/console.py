"""Where the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..progress import listening

OUTPUT = Console()
ERRORS = Console(stderr=True)


def print_json(content: object) -> None:
    """A result for programs: one JSON document on stdout, never wrapped or coloured."""
    print(json.dumps(content, indent=2), flush=True)


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, gone when the block is left; the function given advances it by one or by its argument.

    total: None for a step that reports by itself how far it is (`flashrt_runtime.progress`), or does not.
    Nothing is drawn where stderr is no terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def follow(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        with listening(follow) if total is None else nullcontext():
            yield lambda count=1: bar.advance(task, count)
