"""`flashrt info`: what a checkpoint is, without loading it onto a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..checkpoints import Checkpoint, FeatureStats, open_checkpoint, resolve_tokenizer
from ..checkpoints.architecture import parameter_count
from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from ..config import PolicyConfig
from ..errors import TokenizerNotFoundError
from .console import ERRORS, OUTPUT, print_json, progress

SECTIONS = (
    "checkpoint", "interface", "dimensions", "rules", "normalisation", "this machine", "calibration"
)  # fmt: skip


def info_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="Insist on pi05 or pi0.")] = "auto",
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    verify: Annotated[bool, typer.Option(help="Read every weight and refuse non-finite ones.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Does this file belong to it? 0 or 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show layout, dimensions, rules, normalisation, tokenizer and size of a checkpoint.

    With --calibration: exit code 1 when the file was made for another policy, or its weights cannot be used.
    """
    with (
        progress("reading", None),
        open_checkpoint(
            checkpoint,
            framework,
            config,
            **given(asset_id, action_horizon, delta_actions, rule or []),
            verify_weights=verify,
        ) as opened,
    ):
        content = describe(opened)
        if calibration is not None:
            from .calibration_check import check_calibration

            content["calibration"] = check_calibration(opened, calibration.expanduser())
    if as_json:
        print_json(content)
    else:
        for title, table in _tables(content):
            OUTPUT.print(f"[bold]{title}[/bold]", table)
    if calibration is not None and not content["calibration"]["belongs"]:
        for difference in content["calibration"]["differences"]:
            ERRORS.print(f"does not belong: {difference}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `info` shows, as plain data."""
    config = checkpoint.config
    dtypes = Counter(str(checkpoint.dtype(key)).removeprefix("torch.") for key in checkpoint.keys())  # noqa: SIM118
    stats, fast = checkpoint.norm_stats, config.policy == "pi0fast"
    return {
        "checkpoint": {
            "path": str(checkpoint.path),
            "layout": checkpoint.layout,
            "policy": config.policy,
            "trained": not checkpoint.untrained,
            "weight files": len(checkpoint.store.files),
            "size": _size(checkpoint.size_bytes),
            "parameters": parameter_count(config),
            "storage": ", ".join(f"{name}: {count} tensors" for name, count in sorted(dtypes.items())),
        },
        "interface": {
            "views": list(checkpoint.views) if checkpoint.views else None,
            "empty cameras": checkpoint.empty_cameras,
            "state": checkpoint.state_dim,
            "state names": list(checkpoint.state_names) if checkpoint.state_names else None,
            "actions": checkpoint.action_dim,
            "action names": list(checkpoint.action_names) if checkpoint.action_names else None,
            "delta actions": list(checkpoint.delta_actions) if checkpoint.delta_actions else None,
            "horizon": config.horizon,
            "action rate Hz": checkpoint.action_rate_hz,
            "action representation": checkpoint.action_representation,
            "prompt capacity": config.prompt_capacity,
            "denoise steps": None if fast else config.num_steps,
            "tokenizer": _tokenizer(checkpoint),
            **({"action tokens": _processor(checkpoint), **asdict(config.decode)} if fast else {}),
        },
        "dimensions": {
            "vision": asdict(config.vision),
            "prefix": asdict(config.prefix),
            "expert": None if fast else asdict(config.expert),
            "vocabulary": config.vocab_size,
            "model action width": config.action_dim,
        },
        "rules": asdict(checkpoint.rules),
        "this machine": this_machine(config),
        "normalisation": {
            "statistics": str(checkpoint.norm_stats_file) if checkpoint.norm_stats_file else None,
            "state": _stats(stats.state) if stats else None,
            "actions": _stats(stats.actions) if stats else None,
        },
        "notes": list(checkpoint.notes),
    }


def this_machine(config: PolicyConfig) -> dict[str, str | None]:
    """What would run such a policy here, by default."""
    import torch

    from ..engine.expert_ways import choose
    from ..engine.gpu import Gpu
    from ..options import PRECISIONS, default_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, precision = Gpu.of(device), default_precision(device)
    expert = None if config.policy == "pi0fast" else str(choose(config, PRECISIONS[precision], gpu))
    return {"gpu": gpu.name if gpu else None, "precision": precision, "action expert": expert}


def _tokenizer(checkpoint: Checkpoint) -> str:
    try:
        return str(resolve_tokenizer(checkpoint))
    except TokenizerNotFoundError as error:
        return f"none: {error}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _stats(stats: FeatureStats | None) -> dict[str, list[float]] | None:
    return None if stats is None else {name: array.tolist() for name, array in stats.arrays().items()}


def _processor(checkpoint: Checkpoint) -> str:
    from ..processing.fast_tokens import resolve_processor

    try:
        return str(resolve_processor(checkpoint))
    except TokenizerNotFoundError as error:
        return f"not found: {error}"


def _tables(content: dict[str, Any]) -> list[tuple[str, Table]]:
    tables: list[tuple[str, Table]] = []
    for title in SECTIONS:
        if title not in content:
            continue
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in content[title].items():
            table.add_row(name, Text(_text(value, separator=", " if title == "dimensions" else "\n")))
        tables.append((title, table))
    for note in content["notes"]:
        tables.append(("note", _line(note)))
    return tables


def _line(text: str) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row(Text(text))
    return table


def _text(value: object, separator: str = "\n") -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return (
            separator.join(f"{name} {_text(entry)}" for name, entry in value.items()) or "none: left as it is"
        )
    if isinstance(value, list):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
