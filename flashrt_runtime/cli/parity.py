"""`flashrt parity`: how far our model is from another implementation, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.table import Table

from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from ..errors import OptionError
from .console import OUTPUT, print_json, progress

if TYPE_CHECKING:
    from ..parity.report import Report


def parity_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    against: Annotated[str, typer.Option(help="lerobot (needs `make parity-env`) or reference (float64).")],
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    num_steps: Annotated[int | None, typer.Option(help="Denoise steps; default the checkpoint's.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    views: Annotated[int, typer.Option(min=1, max=3, help="Camera views.")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the random prompt.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the random inputs.")] = 0,
    inputs: Annotated[Path | None, typer.Option(help="An .npz of inputs instead of random ones.")] = None,
    max_abs: Annotated[float | None, typer.Option(help="Bound on the actions' max-abs.")] = None,
    relative_l2: Annotated[float | None, typer.Option(help="Bound on every stage's relative L2.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare every stage with LeRobot or the float64 reference; exit code 1 when a bound is exceeded."""
    from ..options import resolve_target
    from ..parity.report import drift_report

    if against not in ("lerobot", "reference"):
        raise OptionError(f"--against is {against!r}: expected lerobot or reference")
    facts = given(asset_id, action_horizon, delta_actions, rule or [])
    target = resolve_target(hardware, precision)
    with progress(f"running {against} and our model", None):
        report = drift_report(
            checkpoint,
            cast(Literal["lerobot", "reference"], against),
            target,
            framework=cast(Literal["torch", "jax"], framework),
            num_steps=num_steps,
            views=views,
            tokens=tokens,
            seed=seed,
            inputs_file=inputs,
            max_abs=max_abs,
            relative_l2=relative_l2,
            **facts,
        )
    if as_json:
        print_json(report.as_json())
    else:
        _print(report)
    raise typer.Exit(0 if report.passed else 1)


def _print(report: Report) -> None:
    title = f"{report.policy} {report.precision} on {report.device} against {report.against}: {report.inputs}"
    table = Table(title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    for name in ("max-abs", "relative L2", "cosine", "dim", "sign flips"):
        table.add_column(name, justify="right")
    exceeded = {failure.split(":")[0] for failure in report.failures}
    for drift in report.drifts:
        table.add_row(
            drift.stage,
            f"{drift.max_abs:.2e}",
            f"{drift.relative_l2:.2e}",
            f"{drift.cosine:.7f}",
            str(drift.worst_dimension),
            str(drift.sign_flips),
            style="red" if drift.stage in exceeded else None,
        )
    OUTPUT.print(table)
    for failure in report.failures:
        OUTPUT.print(f"exceeded: {failure}", highlight=False, markup=False, soft_wrap=True)
    if report.passed:
        OUTPUT.print("every bound holds", highlight=False)
