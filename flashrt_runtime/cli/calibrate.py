"""`flashrt calibrate`: activation scales of an fp8 policy, and its weights, from a robot's observations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import progress as step
from ..checkpoints import open_checkpoint
from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from ..errors import OptionError
from .calibration_sources import Source, SourceOptions, open_source
from .console import ERRORS, OUTPUT, print_json, progress

if TYPE_CHECKING:
    from ..policy import Policy
    from ..quantization.calibration import CalibrationReport, HeldOutError


def calibrate_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    bag: Annotated[Path | None, typer.Option(help="A rosbag2 bag (needs flashrt_ros).")] = None,
    dataset: Annotated[Path | None, typer.Option(help="A LeRobot dataset, v2 or v3.")] = None,
    images: Annotated[Path | None, typer.Option(help="A directory of images with observations.json.")] = None,
    robot: Annotated[str | None, typer.Option(help="Robot contract, by name or file: its views.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Observations to calibrate on.")] = 64,
    held_out: Annotated[int, typer.Option(min=0, help="More of them, to measure the error on.")] = 8,
    out: Annotated[Path | None, typer.Option(help="File to write; default the cache.")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory for a report with plots.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the robot was told, where not recorded.")] = None,
    estimator: Annotated[str | None, typer.Option(help="mse (default), percentile or max.")] = None,
    percentile: Annotated[float | None, typer.Option(help="Clip above it; 100 is the maximum.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="nearest (default), or compensated: rounded for what the robot sees.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Dataset: only tasks that hold this text.")] = None,
    exclude_episode: Annotated[list[int] | None, typer.Option(help="Dataset: leave it out.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="VIEW=CAMERA, where names differ.")] = None,
    state_key: Annotated[str | None, typer.Option(help="Dataset: the feature that is the state.")] = None,
    namespace: Annotated[str, typer.Option(help="Bag: namespace of the contract's topics.")] = "",
    against_bf16: Annotated[bool, typer.Option(help="Compare with the bf16 policy too.")] = False,
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="pi05, pi0, pi0fast, or auto.")] = "auto",
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "auto",
    num_steps: Annotated[int | None, typer.Option(help="Denoise steps; default the checkpoint's.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Calibrate an fp8 policy and keep the scales in a file; whatever fails, an earlier file stays."""
    from ..quantization.artifact import cache_folder
    from ..quantization.projection_weights import resolve_rounding

    opening: dict[str, Any] = {
        "framework": framework,
        "config": config,
        **given(asset_id, action_horizon, delta_actions, rule or []),
    }
    options = SourceOptions(
        samples + held_out, bag, dataset, images, robot, prompt, namespace, task,
        tuple(exclude_episode or ()), tuple(view or ()), state_key,
    )  # fmt: skip
    resolve_rounding(weights)
    _check_targets(out, report)
    if out is not None:
        _check_weights(out.expanduser(), weights)
    with open_checkpoint(checkpoint, **opening) as opened:
        source = open_source(options, opened)
    loading = opening | {"num_views": source.views, "hardware": hardware, "num_steps": num_steps}
    thumbnails: list[Any] = []
    with _loaded(checkpoint, precision="fp8", calibration="none", **loading) as policy:
        if out is None:
            _check_weights(cache_folder() / f"{policy.calibration_key}.safetensors", weights)
        made = _calibrate(
            policy, source, samples, held_out, thumbnails,
            estimator=estimator, percentile=percentile, weights=weights,
        )  # fmt: skip
        file = policy.save_calibration(out)
        key = policy.calibration_key
        quantised = _actions(policy, source, made) if against_bf16 else []
    true_error = None
    if against_bf16:
        with _loaded(checkpoint, precision="bf16", **loading) as policy:
            true_error = _error(quantised, _actions(policy, source, made))
    warnings = [*source.warnings, *made.warnings]
    if report is not None:
        from .calibration_report import write_report

        write_report(report, checkpoint, file, key, made, true_error, warnings, thumbnails)
    result = _result(file, key, made, true_error, warnings, report)
    if as_json:
        print_json(result)
        return
    _print(result, made, true_error)
    for warning in source.warnings:  # the policy has logged its own
        ERRORS.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)


def _check_targets(out: Path | None, report: Path | None) -> None:
    """Before anything is loaded: minutes of work must not end at a file that cannot be written."""
    from ..cache import obstacle_to
    from ..quantization.artifact import cache_folder, check_target

    check_target(cache_folder() / "KEY.safetensors" if out is None else out.expanduser())
    if report is None:
        return
    from .calibration_report import require_matplotlib

    require_matplotlib()
    if obstacle := obstacle_to(report / "report.md"):
        raise OptionError(f"--report {report}: no report can be written there: {obstacle}")


def _check_weights(target: Path, weights: str | None) -> None:
    """Compensated weights took minutes: only who says so has them replaced by the nearest."""
    from ..errors import CalibrationError
    from ..quantization.artifact import read

    if weights is not None:
        return
    with contextlib.suppress(CalibrationError):
        if (named := read(target).weights) is not None:
            raise OptionError(
                f"the calibration {target} has compensated weights, {named.name}, which this one would "
                "replace: say --weights compensated to round them anew, --weights nearest to give them up, "
                "or name another file by --out"
            )


@contextlib.contextmanager
def _loaded(checkpoint: str, **options: Any) -> Iterator[Policy]:
    from ..loading import load_model

    with progress(f"loading in {options['precision']}", None):
        policy = load_model(checkpoint, **options)
    try:
        yield policy
    finally:
        policy.close()


def _calibrate(
    policy: Policy, source: Source, samples: int, held_out: int, thumbnails: list[Any], **options: Any
) -> CalibrationReport:
    """With a bar; `thumbnails` gets small pictures of the observations."""
    from ..datasets.sampling import Counted
    from .calibration_report import MOST_SHOWN, thumbnail

    observations = source.read()

    def shown() -> Iterator[dict[str, Any]]:
        for observation in observations:
            if len(thumbnails) < MOST_SHOWN:
                thumbnails.append(thumbnail(observation["images"]))
            yield observation

    with progress("calibrating", None):  # the samples, then the weights where they are rounded anew
        return policy.calibrate(
            Counted(shown(), length_hint(observations, -1)),
            max_samples=samples,
            held_out=held_out,
            source=source.name,
            progress=lambda count: step.report(count, samples),
            **options,
        )


def _actions(policy: Policy, source: Source, made: CalibrationReport) -> list[Any]:
    """Physical actions of the held-out observations, read a second time; None where there is no chunk."""
    from ..errors import ActionTokenError

    actions: list[Any] = []
    wanted = set(made.held_out)
    for position, observation in enumerate(source.read()):
        if position in wanted:
            try:
                actions.append(policy.predict(**observation))
            except ActionTokenError:
                actions.append(None)
        if position >= max(wanted, default=-1):
            break
    return actions


def _error(actions: list[Any], reference: list[Any]) -> HeldOutError | None:
    from ..quantization.calibration import HeldOutError

    pairs = zip(actions, reference, strict=True)
    return HeldOutError.of([(one, two) for one, two in pairs if one is not None and two is not None])


def _result(
    file: Path,
    key: str,
    made: CalibrationReport,
    true_error: HeldOutError | None,
    warnings: list[str],
    report: Path | None,
) -> dict[str, Any]:
    from ..quantization.recommend import recommended_samples

    def row(error: HeldOutError | None) -> dict[str, Any] | None:
        if error is None:
            return None
        names = ("max_abs", "relative_rms", "cosine")
        return {
            "samples": len(error.per_sample),
            **{name: getattr(error, name) for name in names},
            "per_sample": [dict(zip(names, values, strict=True)) for values in error.per_sample],
        }

    number, settled = recommended_samples(made.maxima, made.outliers)
    return {
        "calibration": str(file),
        "key": key,
        "source": made.source,
        "samples": made.samples,
        "estimator": made.estimator,
        "percentile": made.percentile,
        "projections": len(made.scales),
        "weights": made.rounding,
        "rounding": None if made.gain is None else asdict(made.gain),
        "error_against_bf16_activations": row(made.held_out_error),
        "error_against_bf16_policy": row(true_error),
        "recommended_samples": number,
        "settled": settled,
        "warnings": warnings,
        "report": None if report is None else str(report),
    }


def _print(result: dict[str, Any], made: CalibrationReport, true_error: HeldOutError | None) -> None:
    error, gain = made.held_out_error, made.gain
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    chosen = result["estimator"] + (f" {result['percentile']:g}" if result["percentile"] else "")
    rows = {
        "calibration": result["calibration"],
        "key": result["key"],
        "source": result["source"],
        "samples": f"{result['samples']}, by {chosen}, {result['projections']} projections",
        "weights": "rounded to nearest" if gain is None else f"compensated: {gain}",
        "held-out error": _described(error, "normalised actions, against bf16 activations"),
        "against bf16": None if true_error is None else _described(true_error, "robot's units, bf16 policy"),
        "recommended": _recommendation(result["recommended_samples"], result["settled"], result["samples"]),
        "report": result["report"],
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(str(value)))
    OUTPUT.print(table)


def _described(error: HeldOutError | None, what: str) -> str:
    if error is None:
        return "not measured: no observation was held out"
    return (
        f"max-abs {error.max_abs:.4f}, relative rms {error.relative_rms:.4f}, cosine {error.cosine:.6f}: "
        f"worst of {len(error.per_sample)} ({what})"
    )


def _recommendation(number: int, settled: bool, samples: int) -> str:
    if settled:
        return f"{number} samples: more change the scales of 95 % of the projections by less than 5 %"
    return f"{number} samples or more: {samples} do not settle the scales"
