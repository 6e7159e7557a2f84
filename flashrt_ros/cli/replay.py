"""`flashrt replay BAG`: a policy evaluated offline, its chunks against the commands that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashrt_runtime.checkpoints.open_facts import given
from flashrt_runtime.command_options import ActionHorizon, AssetId, DeltaActions, Rules


def command(
    bag: Annotated[Path, typer.Argument(help="Bag directory, or one .mcap or .db3 file.")],
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    robot: Annotated[str, typer.Option(help="Robot contract: a name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Directory for replay.json and replay.png.")],
    prompt: Annotated[str, typer.Option(help="The task; default: that of the recorded chunks.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="Moments of the bag to predict at.")] = 32,
    namespace: Annotated[str, typer.Option(help="Namespace of the contract's topics in the bag.")] = "",
    sim_time: Annotated[bool, typer.Option(help="The robot ran on the bag's /clock.")] = False,
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="pi05, pi0, pi0fast, or auto.")] = "auto",
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or fp8.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    seed: Annotated[int, typer.Option(help="Of the flow's noise, the same at every moment.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Predict at moments of a bag and compare with the recorded commands: error per joint, and a plot."""
    from .replay_run import Options, run  # what the other commands need not wait for

    model = {
        "framework": framework, "config": config, "hardware": hardware, "precision": precision,
        **given(asset_id, action_horizon, delta_actions, rule or []),
    }  # fmt: skip
    options = Options(bag, checkpoint, robot, out, prompt, samples, namespace, sim_time, seed, model)
    run(options, as_json=as_json)
