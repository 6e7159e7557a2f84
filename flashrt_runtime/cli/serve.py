"""`flashrt serve`: a policy for other processes and machines, over HTTP and openpi's websocket protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ..checkpoints.open_facts import given
from ..command_options import ActionHorizon, AssetId, DeltaActions, Rules
from ..errors import ActionError, CheckpointError, OptionError
from .console import ERRORS, print_json, progress

if TYPE_CHECKING:
    from ..policy import Policy

TOKEN_VARIABLE = "FLASHRT_SERVER_TOKEN"
LAYOUTS = "auto, libero, droid, aloha, aloha_sim or native"
MEBIBYTE = 1 << 20


def serve_command(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint directory, or hub id.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 opens it to the network: set a token.")
    ] = "127.0.0.1",
    framework: Annotated[str, typer.Option(help="torch, or jax for an Orbax checkpoint.")] = "torch",
    config: Annotated[str, typer.Option(help="A policy's name, or auto.")] = "auto",
    views: Annotated[int, typer.Option(min=1, max=3, help="Camera views.")] = 2,
    hardware: Annotated[str, typer.Option(help="As in load_model.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="As in load_model.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="File of fp8 activation scales.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Denoise steps; default the checkpoint's.")] = None,
    action_horizon: ActionHorizon = None,
    asset_id: AssetId = None,
    delta_actions: DeltaActions = None,
    rule: Rules = None,
    prompt: Annotated[str | None, typer.Option(help="For requests that bring none.")] = None,
    layout: Annotated[str, typer.Option(help=f"How openpi observations are read: {LAYOUTS}.")] = "auto",
    camera: Annotated[
        list[str] | None, typer.Option(help="VIEW=KEY: an openpi image for a view with a name of its own.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Observations that may wait; more are refused.")] = 16,
    deadline_ms: Annotated[float, typer.Option(min=1, help="Longest time to an answer.")] = 10_000,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Longest body, MiB.")] = 32,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File of the token clients must send; or ${TOKEN_VARIABLE}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address and policy as JSON.")] = False,
) -> None:
    """Serve actions: POST /predict, GET /health, /metrics, /docs, and openpi's protocol at ws://HOST:PORT."""
    try:
        from ..serving import ModelWorker, ServerSettings, create_app, server
    except ImportError as error:
        raise OptionError(
            f"flashrt serve needs {error.name}: pip install 'flashrt-runtime[server]'"
        ) from error
    from ..loading import load_model

    facts = given(asset_id, action_horizon, delta_actions, rule or [])
    settings = ServerSettings(
        queue_size=queue,
        deadline_s=deadline_ms / 1e3,
        max_body_bytes=max_body_mb * MEBIBYTE,
        max_buffered_bytes=8 * max_body_mb * MEBIBYTE,
        default_prompt=prompt,
        layout=layout,
        cameras=parse_cameras(camera or []),
        token=read_token(token_file),
    )
    sock = server.listen(host, port)  # before the model is loaded: a port in use is told at once
    with sock:
        with progress("loading", None):
            digests: list[str] = []

            def load() -> Policy:
                policy = load_model(
                    checkpoint,
                    framework=framework,
                    config=config,
                    num_views=views,
                    hardware=hardware,
                    precision=precision,
                    num_steps=num_steps,
                    **facts,
                    calibration=calibration,
                )
                digests.append(policy.checkpoint_digest)
                warm_up(policy, prompt)
                return policy

            worker = ModelWorker(load, settings.queue_size)
        try:
            app = create_app(worker, settings, digests[0])
        except BaseException:
            worker.close()
            raise
        bound = f"{host}:{sock.getsockname()[1]}"
        if as_json:
            addresses = {"address": f"http://{bound}", "websocket": f"ws://{bound}"}
            print_json(addresses | app.state.service.describe())
        else:
            ERRORS.print(
                f"{worker.spec.config} {worker.precision} with {', '.join(worker.spec.views)} at "
                f"http://{bound} (page: http://{bound}/docs) and ws://{bound}",
                highlight=False,
                soft_wrap=True,
            )
        server.serve(app, settings, sock)


def warm_up(policy: Policy, prompt: str | None) -> None:
    """What the first request would wait for, or fail at: the tokenizer, and a first inference.

    Raises TokenizerNotFoundError, PromptError. An fp8 policy without a calibration is left alone: what it
    sees first sets its scales.
    """
    try:
        policy.set_prompt(prompt or "wait")
        if not policy.calibrated:
            ERRORS.print("fp8 without a calibration: the first observation sets the scales")
            return
        size = policy.spec.state_dim
        images = [np.zeros((224, 224, 3), np.uint8) for _ in policy.spec.views]
        policy.predict(images, None, None if size is None else np.zeros(size, np.float32), seed=0)
    except (ActionError, CheckpointError) as error:  # black images may give nothing usable
        ERRORS.print(f"warming up: {error}", highlight=False, markup=False, soft_wrap=True)
    except BaseException:
        policy.close()
        raise


def parse_cameras(arguments: list[str]) -> dict[str, str]:
    """VIEW=KEY arguments by view. Raises OptionError."""
    cameras = {}
    for argument in arguments:
        view, _, key = argument.partition("=")
        if not view or not key:
            raise OptionError(
                f"--camera {argument!r}: expected VIEW=KEY, such as image2=observation/wrist_image"
            )
        cameras[view] = key
    return cameras


def read_token(file: Path | None) -> str | None:
    """The token of a file or the environment; never of the command line, which other users can read."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    token = file.expanduser().read_text(encoding="utf-8").strip()
    if not token:
        raise OptionError(f"{file}: no token in it")
    return token
