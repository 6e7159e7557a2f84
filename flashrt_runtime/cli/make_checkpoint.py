"""`flashrt make-checkpoint`: an untrained checkpoint to try things with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, cast

import typer

from ..checkpoints.presets import PRESETS
from ..config import PROMPT_CAPACITY, PolicyName
from ..untrained.random import DTYPES, SIZES, make_checkpoint
from .console import OUTPUT, print_json, progress


def make_checkpoint_command(
    out: Annotated[Path, typer.Option(help="Directory to write; a trained checkpoint is never overwritten.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "tiny",
    preset: Annotated[
        str, typer.Option(help=f"Whose robot it is for: {', '.join(sorted(PRESETS))}.")
    ] = "libero",
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(PROMPT_CAPACITY)}.")] = "pi05",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default float32, bfloat16 for full.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a random, untrained checkpoint in openpi's layout, with statistics and a tokenizer."""
    started = time.perf_counter()
    with progress(f"drawing {size} weights", None):
        path = make_checkpoint(
            out, size=size, preset=preset, policy=cast(PolicyName, policy), seed=seed, dtype=dtype
        )
    files = {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
    if as_json:
        print_json(
            {
                "checkpoint": str(path),
                "size": size,
                "preset": preset,
                "policy": policy,
                "seed": seed,
                "files": files,
            }
        )
        return
    total = sum(files.values()) / 1e6
    OUTPUT.print(
        f"{path}: untrained {policy}, size {size}, for {preset}: {total:.1f} MB in "
        f"{time.perf_counter() - started:.1f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
