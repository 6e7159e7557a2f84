"""The options of every command that opens a checkpoint: what its files may leave open.

Not in `cli`, whose import brings in the commands of other packages, which take these options too.
"""

from __future__ import annotations

from typing import Annotated

import typer

AssetId = Annotated[str | None, typer.Option(help="Which statistics of assets/, if several.")]
ActionHorizon = Annotated[int | None, typer.Option(help="Actions a chunk, where the files do not tell it.")]
DeltaActions = Annotated[
    str | None, typer.Option(help="true,…,false: which actions are offsets to the state.")
]
Rules = Annotated[list[str] | None, typer.Option(help="Override a rule: name=value; repeatable.")]
