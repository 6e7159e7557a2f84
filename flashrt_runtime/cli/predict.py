"""`flashrt predict`: one action chunk from images on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from ..errors import ObservationError, OptionError
from .console import OUTPUT, print_json, progress

BARS = "▁▂▃▄▅▆▇█"
PLOT_COLUMNS = 25


def predict_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    image: Annotated[list[str], typer.Option(help="An image file, or view=file; once per view, in order.")],
    prompt: Annotated[str, typer.Option(help="What the robot shall do.")],
    state: Annotated[str | None, typer.Option(help="Joint values in the robot's units: 0,-1.57,…")] = None,
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="pi05, pi0, pi0fast, or auto.")] = "auto",
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp8.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Denoise steps; default the checkpoint's.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    seed: Annotated[int | None, typer.Option(help="Of the flow's noise; fresh noise without it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the chunk (PNG, PDF or SVG).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the chunk as .npy, float32 (horizon, dof).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict one chunk of actions in the robot's units."""
    from ..loading import load_model

    facts = given(asset_id, action_horizon, delta_actions, rule or [])
    images = read_images(image)
    values = None if state is None else parse_state(state)
    with progress("loading", None):
        policy = load_model(
            checkpoint,
            framework=framework,
            config=config,
            num_views=len(images),
            hardware=hardware,
            precision=precision,
            num_steps=num_steps,
            **facts,
        )
    try:
        by_view = list(images.values()) if " 0" in images else images
        started = time.perf_counter()
        actions = policy.predict(by_view, prompt, values, seed=seed)
        elapsed = time.perf_counter() - started
        spec, used = policy.spec, policy.precision
    finally:
        policy.close()
    names = spec.action_names or tuple(f"action {index}" for index in range(actions.shape[1]))
    if out is not None:
        np.save(out, actions)
    if plot is not None:
        draw_plot(plot, actions, names, spec.action_rate_hz, prompt)
    if as_json:
        print_json(
            {
                "actions": actions.astype(float).tolist(),
                "names": list(names),
                "rate_hz": spec.action_rate_hz,
                "prompt": prompt,
                "seed": seed,
                "precision": used,
                "latency_ms": elapsed * 1e3,
            }
        )
        return
    OUTPUT.print(_table(actions, names))
    rate = f" at {spec.action_rate_hz:g} Hz" if spec.action_rate_hz else ""
    OUTPUT.print(
        f"{actions.shape[0]} actions{rate}, {used}, {elapsed * 1e3:.1f} ms (first call)",
        highlight=False,
        markup=False,
    )


def read_images(arguments: list[str]) -> dict[str, NDArray[np.uint8]]:
    """Images by view, (H, W, 3) uint8 RGB each; keys are " 0", " 1" … where no view was named.

    Raises OptionError when some are named and some are not, ObservationError for a file that is no image.
    """
    named = ["=" in argument and not Path(argument).exists() for argument in arguments]
    if any(named) and not all(named):
        raise OptionError("--image: name the view of every image (view=file) or of none")
    images: dict[str, NDArray[np.uint8]] = {}
    for index, argument in enumerate(arguments):
        view, _, file = argument.partition("=") if named[index] else (f" {index}", "", argument)
        if view in images:
            raise OptionError(f"--image: view {view!r} was given twice")
        if not Path(file).is_file():
            raise ObservationError(f"{file}: no such file")
        pixels = cv2.imread(file, cv2.IMREAD_COLOR)
        if pixels is None:
            raise ObservationError(f"{file}: not an image")
        images[view] = np.ascontiguousarray(pixels[..., ::-1])
    return images


def parse_state(text: str) -> NDArray[np.float32]:
    """Numbers separated by commas or blanks. Raises OptionError."""
    try:
        return np.array([float(part) for part in text.replace(",", " ").split()], dtype=np.float32)
    except ValueError as error:
        raise OptionError(f"--state {text!r}: {error}; expected numbers such as 0,-1.57,1.57") from error


def sparkline(values: NDArray[np.float32], columns: int = PLOT_COLUMNS) -> str:
    """The course of a series as bars between its own minimum and maximum, at most `columns` wide."""
    sampled = values[np.linspace(0, len(values) - 1, min(columns, len(values))).round().astype(int)]
    low, high = float(sampled.min()), float(sampled.max())
    span = high - low or 1.0
    return "".join(BARS[round((float(value) - low) / span * (len(BARS) - 1))] for value in sampled)


def _table(actions: NDArray[np.float32], names: tuple[str, ...]) -> Table:
    table = Table()
    table.add_column("action", no_wrap=True)
    for name in ("first", "last", "min", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("course", no_wrap=True)
    for index, name in enumerate(names):
        course = actions[:, index]
        numbers = (course[0], course[-1], course.min(), course.max())
        table.add_row(Text(name), *(f"{number:.4f}" for number in numbers), sparkline(course))
    return table


def draw_plot(
    file: Path, actions: NDArray[np.float32], names: tuple[str, ...], rate_hz: float | None, title: str
) -> None:
    """One panel per action over time. Raises OptionError without matplotlib or for an unknown file type."""
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.arange(len(actions)) / (rate_hz or 1.0)
    figure, axes = pyplot.subplots(
        len(names), 1, sharex=True, figsize=(8, 1.2 * len(names) + 1), squeeze=False
    )
    for axis, name, course in zip(axes[:, 0], names, actions.T, strict=True):
        axis.plot(steps, course, marker=".", markersize=3)
        axis.set_ylabel(name, rotation=0, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("time [s]" if rate_hz else "step")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(file)
    except ValueError as error:
        raise OptionError(f"--plot {file}: {error}") from error
    finally:
        pyplot.close(figure)
