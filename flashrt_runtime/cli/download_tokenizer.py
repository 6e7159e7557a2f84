"""`flashrt download-tokenizer`: PaliGemma's tokenizer into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import download
from ..checkpoints.tokenizer import cache_file
from .console import OUTPUT, print_json, progress


def download_tokenizer_command(
    out: Annotated[Path | None, typer.Option(help="File to write; default the cache.")] = None,
    url: Annotated[
        str, typer.Option(help="A mirror to fetch it from; the checksum stays the same.")
    ] = download.URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch PaliGemma's tokenizer and verify its checksum; does nothing when it is already there."""
    target = out or cache_file()
    with progress("fetching", None):
        fetched = download.download_tokenizer(target, url)
    if as_json:
        print_json({"tokenizer": str(target), "fetched": fetched, "sha256": download.SHA256})
        return
    state = "fetched and verified" if fetched else "already there and verified"
    OUTPUT.print(f"{target}: {state}", highlight=False, markup=False, soft_wrap=True)
