"""`flashrt bench`: how long one observation takes on this machine."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from .console import OUTPUT, print_json, progress

CAMERA = (480, 640, 3)
FRAMES = 8
PROMPT = "pick up the block and place it in the bowl"


def bench_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    calls: Annotated[int, typer.Option(min=1, help="Timed observations.")] = 100,
    warm_up: Annotated[int, typer.Option(min=0, help="Observations before that.")] = 5,
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="A policy's name, or auto.")] = "auto",
    views: Annotated[int, typer.Option(min=1, max=3, help="Camera views.")] = 2,
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As in load_model.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Denoise steps; default the checkpoint's.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time predict() on random 640x480 images: the wall time a robot sees, with resizing and tokenising."""
    from ..loading import load_model

    facts = given(asset_id, action_horizon, delta_actions, rule or [])
    started = time.perf_counter()
    with progress("loading", None):
        policy = load_model(
            checkpoint,
            framework=framework,
            config=config,
            num_views=views,
            hardware=hardware,
            precision=precision,
            num_steps=num_steps,
            **facts,
        )
    load_s = time.perf_counter() - started
    try:
        times = _measure(policy, warm_up + calls)
        content = {
            "checkpoint": str(checkpoint),
            "policy": policy.spec.config,
            "precision": policy.precision,
            "device": _device_name(policy.device),
            "views": views,
            "denoise_steps": policy.spec.num_steps,
            "calls": calls,
            "load_s": load_s,
            "first_call_ms": times[0],
            **_summary(times[warm_up:]),
        }
    finally:
        policy.close()
    if as_json:
        print_json(content)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in content.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else str(value))
    OUTPUT.print(table)


def _measure(policy: Any, count: int) -> list[float]:
    """Milliseconds of each call; every observation is another one."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, CAMERA, dtype=np.uint8) for _ in range(FRAMES)]
    width = policy.spec.state_dim
    times = []
    with progress("predict", count) as advance:
        for index in range(count):
            images = [frames[(index + view) % FRAMES] for view in range(len(policy.spec.views))]
            state = None if width is None else rng.uniform(-0.3, 0.3, width).astype(np.float32)
            began = time.perf_counter()
            policy.predict(images, PROMPT, state, seed=index)
            times.append((time.perf_counter() - began) * 1e3)
            advance()
    return times


def _summary(times: list[float]) -> dict[str, float]:
    quantiles = {f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 95, 99)}
    return {**quantiles, "max_ms": max(times), "observations_per_s": 1e3 / float(np.mean(times))}


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
