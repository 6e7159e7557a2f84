"""`flashrt convert`: an Orbax checkpoint as a directory of safetensors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.orbax import convert_checkpoint
from .console import OUTPUT, print_json, progress


def convert_command(
    checkpoint: Annotated[Path, typer.Option(help="openpi's Orbax checkpoint: a directory with params/.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist or be empty.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert an openpi Orbax checkpoint of any policy to safetensors, read with framework="torch"."""
    started = time.perf_counter()
    with progress("converting", None):
        files = convert_checkpoint(checkpoint, out)
    if as_json:
        print_json({"checkpoint": str(out), "files": files})
        return
    total = sum(files.values()) / 1e6
    OUTPUT.print(
        f"{out}: {len(files)} files, {total:.1f} MB in {time.perf_counter() - started:.1f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
