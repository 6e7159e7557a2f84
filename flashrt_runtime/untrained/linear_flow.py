"""A checkpoint whose flow is known in closed form: what a trained policy's looks like, without training one.

A random network's velocity is no flow towards anything, so what relies on one, such as guidance, cannot be
seen on it. Here the actions given the observation are normal: x1 = m(observation) + spread * noise, for which
the straight paths x_t = (1 - t) x1 + t * noise have the velocity

    v(x, t) = a(t) (x + r),   a(t) = (1 - spread) / ((1 - t) spread + t),   m = (spread - 1) r

with r what attention to the observation adds to the tokens. The architecture holds it: the time reaches the
expert's final norm only (adaRMS scale a(t) - 1), and a large constant in half of the token's width keeps the
RMS of every norm constant, so that norms are linear in the other half.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..checkpoints.architecture import EXPERT
from ..checkpoints.presets import preset_named
from ..checkpoints.safetensors_store import WEIGHTS_FILE
from ..errors import OptionError
from ..layers.rope import time_embedding
from .random import SIZES, make_checkpoint

CARRIER = 200.0
TIMES = 20  # the velocity is exact at t = k / 20: for 1, 2, 4, 5, 10 and 20 denoise steps


def make_linear_flow(
    out: str | Path, *, spread: float = 0.1, reaction: float = 0.05, preset: str = "demo_arm"
) -> Path:
    """Write a tiny pi0.5 checkpoint and return its directory.

    spread: standard deviation of the actions at a given observation, in model space, 0 to 1. reaction: gate
    of the layers that attend to the observation. Raises OptionError.
    """
    if not 0.0 < spread < 1.0:
        raise OptionError(f"spread is {spread!r}: expected a number between 0 and 1")
    made = make_checkpoint(out, size="tiny", preset=preset, policy="pi05")
    config = SIZES["tiny"].expert
    width, tensors = config.width, load_file(made / WEIGHTS_FILE)
    actions = tensors["action_in_proj.weight"].shape[1]
    tensors["action_in_proj.weight"] = torch.eye(width, actions)
    tensors["action_in_proj.bias"] = torch.where(torch.arange(width) < actions, 0.0, CARRIER)
    for layer in range(config.depth):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            key = f"{EXPERT}layers.{layer}.{norm}.dense"
            tensors[f"{key}.weight"] = torch.zeros(3 * width, width)
            gate = torch.where(torch.arange(width) < actions, reaction, 0.0)
            tensors[f"{key}.bias"] = torch.cat((torch.zeros(2 * width), gate))
    tensors |= _final_norm(tensors, width, spread)
    rms = CARRIER * ((width - actions) / width) ** 0.5
    tensors["action_out_proj.weight"] = rms * torch.eye(actions, width)
    tensors["action_out_proj.bias"] = torch.zeros(actions)
    save_file({key: value.contiguous() for key, value in tensors.items()}, made / WEIGHTS_FILE)
    robot = preset_named(preset)
    stats = made / "assets" / robot.name / "norm_stats.json"
    stats.write_text(json.dumps(robot.norm_stats(), indent=2) + "\n", encoding="utf-8")
    return made


def _final_norm(tensors: dict[str, torch.Tensor], width: int, spread: float) -> dict[str, torch.Tensor]:
    """The final norm's dense layer, fitted so that its scale is a(t) - 1; no shift."""
    times = torch.arange(TIMES + 1, dtype=torch.float64) / TIMES
    wanted = (1.0 - spread) / ((1.0 - times) * spread + times) - 1.0
    x = torch.stack([time_embedding(float(time), width) for time in times])
    for name in ("time_mlp_in", "time_mlp_out"):
        x = F.silu(F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))
    fitted = torch.linalg.lstsq(x.double(), wanted.unsqueeze(-1), driver="gelsd").solution.float()
    weight = torch.zeros(3 * width, width)
    weight[:width] = fitted.T
    return {f"{EXPERT}norm.dense.weight": weight, f"{EXPERT}norm.dense.bias": torch.zeros(3 * width)}
