"""Numerical faults to plant into our own policy: the ones that real ports of these models have had.

Each takes a pytest monkeypatch and changes the running code; a name that no longer exists fails loudly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import flashrt_runtime.policy as policy_module
from flashrt_runtime import models, ops
from flashrt_runtime.checkpoints import openpi as openpi_layout
from flashrt_runtime.config import PolicyConfig
from flashrt_runtime.inputs import ObservationEncoder
from flashrt_runtime.layers import norms, paligemma
from flashrt_runtime.layers.kv_cache import Window
from flashrt_runtime.layers.siglip import Siglip
from flashrt_runtime.models import FlowPolicy, Pi0, pi0, pi05
from flashrt_runtime.ops import reference
from flashrt_runtime.processing import images, prompt
from flashrt_runtime.processing.actions import ActionTransform
from flashrt_runtime.processing.prompt import PromptEncoder
from flashrt_runtime.processing.state import StateTransform

BOTH = ("pi05", "pi0")


@dataclass(frozen=True)
class Fault:
    """A fault, the policies it concerns, and whether it lies in the processing around the model."""

    name: str
    plant: Callable[[Any], None]
    policies: tuple[str, ...] = BOTH
    physical: bool = False


MODEL: list[Fault] = []
PHYSICAL: list[Fault] = []


def fault(name: str, *policies: str, physical: bool = False) -> Callable:
    """Register a fault under a name."""

    def register(plant: Callable[[Any], None]) -> Callable[[Any], None]:
        (PHYSICAL if physical else MODEL).append(Fault(name, plant, policies or BOTH, physical))
        return plant

    return register


def wrap(patch: Any, owner: Any, name: str, change: Callable) -> None:
    """Replace owner.name by a function that calls `change(original, *args, **kwargs)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def operation(patch: Any, name: str, change: Callable) -> None:
    """Wrap an operation's torch definition, and its name in `ops` where layers call that same function."""
    original = getattr(reference, name)
    if getattr(ops, name, None) is original:
        wrap(patch, ops, name, change)
    wrap(patch, reference, name, change)


def inputs(patch: Any, change: Callable) -> None:
    """Change what `sample_actions` is given: change(dict) -> dict."""
    names = ("images", "image_mask", "tokens", "token_mask", "state", "noise")

    def call(original: Callable, model: FlowPolicy, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return original(model, **change(given))

    wrap(patch, FlowPolicy, "sample_actions", call)


# --- positions ---------------------------------------------------------------------------------------------


def suffix_offset(patch: Any, offset: int) -> None:
    """Rotate what stands behind the prefix as if it stood `offset` positions further."""

    def moved(original: Callable, window: Window, tables: Any) -> Any:
        return original(replace(window, start=window.start + (offset if window.start else 0)), tables)

    wrap(patch, Window, "rope", moved)


@fault("suffix RoPE one position late")
def _(patch):
    suffix_offset(patch, 1)


@fault("suffix RoPE one position early")
def _(patch):
    suffix_offset(patch, -1)


@fault("RoPE on interleaved pairs")
def _(patch):
    def rotate(_original, x, cos, sin):
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)

    operation(patch, "apply_rope", rotate)


@fault("RoPE frequencies rounded to bf16")
def _(patch):
    wrap(
        patch,
        models,
        "build",
        lambda build, config, views, dtype, _=False, *rest: build(config, views, dtype, True, *rest),
    )


# --- norms -------------------------------------------------------------------------------------------------


@fault("RMSNorm without the 1 + w")
def _(patch):
    operation(patch, "rms_norm", lambda norm, x, w, *rest: norm(x, w - 1, *rest))


@fault("RMSNorm ignores its weight")
def _(patch):
    operation(patch, "rms_norm", lambda norm, x, w, *rest: norm(x, w * 0, *rest))


@fault("every epsilon 1e-5")
def _(patch):
    patch.setattr(norms, "EPS", 1e-5)


@fault("SigLIP LayerNorm epsilon 1e-5")
def _(patch):
    operation(patch, "layer_norm", lambda norm, x, w, b, eps, *rest: norm(x, w, b, 1e-5, *rest))


@fault("adaRMS epsilon 1e-5", "pi05")
def _(patch):
    operation(patch, "ada_rms_norm", lambda norm, x, style, eps, *rest: norm(x, style, 1e-5, *rest))


@fault("adaRMS scale and shift swapped", "pi05")
def _(patch):
    operation(patch, "ada_rms_norm", lambda norm, x, style, *rest: norm(x, style[[1, 0, 2]], *rest))


@fault("adaRMS gate ignored", "pi05")
def _(patch):
    def ungated(original, x, residual, gate, *rest):
        return original(x, residual, torch.ones_like(gate), *rest)

    operation(patch, "gated_add_ada_rms_norm", ungated)


@fault("adaRMS gate of the following norm", "pi05")
def _(patch):
    def misplaced(original, x, residual, gate, style, *rest):
        return original(x, residual, style[2], style, *rest)

    operation(patch, "gated_add_ada_rms_norm", misplaced)


# --- activations, embeddings -------------------------------------------------------------------------------


@fault("erf GELU for the tanh form")
def _(patch):
    operation(patch, "gelu", lambda _original, x, *_: F.gelu(x))


@fault("text embeddings not scaled by sqrt(d)")
def _(patch):
    patch.setattr(paligemma, "math", SimpleNamespace(sqrt=lambda _: 1.0))


@fault("image embeddings divided by sqrt(d)")
def _(patch):
    wrap(patch, Siglip, "forward", lambda forward, self, *args: forward(self, *args) / 8.0)


@fault("time embedding cos before sin")
def _(patch):
    for module in (pi05, pi0):
        wrap(patch, module, "time_embedding", lambda f, *args: f(*args).roll(f(*args).shape[0] // 2))


@fault("state token zero", "pi0")
def _(patch):
    wrap(patch, Pi0, "extend_prefix", lambda extend, self, state: extend(self, torch.zeros_like(state)))


# --- attention ---------------------------------------------------------------------------------------------


@fault("attention not scaled by 1/sqrt(head_dim)")
def _(patch):
    operation(patch, "attention", lambda f, q, *rest: f(q * q.shape[-1] ** 0.5, *rest))


@fault("first prefix token not attended to")
def _(patch):
    operation(patch, "attention", lambda f, q, k, v, *rest: f(q, k[1:], v[1:], *rest))


@fault("padding not masked")
def _(patch):
    inputs(patch, lambda given: given | {"token_mask": torch.ones_like(given["token_mask"])})


@fault("absent view not masked")
def _(patch):
    inputs(patch, lambda given: given | {"image_mask": torch.ones_like(given["image_mask"])})


# --- flow --------------------------------------------------------------------------------------------------


@fault("Euler step with the wrong sign")
def _(patch):
    operation(patch, "euler_step", lambda f, x, velocity, dt: f(x, velocity, -dt))


@fault("9 steps for 10")
def _(patch):
    def one_less(original, self, steps):
        return replace(original(self, steps), num_steps=original(self, steps).num_steps - 1)

    wrap(patch, PolicyConfig, "with_steps", one_less)


@fault("noise rounded to bf16")
def _(patch):
    inputs(patch, lambda given: given | {"noise": given["noise"].bfloat16().float()})


@fault("time one step late")
def _(patch):
    for module in (pi05, pi0):
        wrap(patch, module, "time_embedding", lambda f, time, width: f(time - 0.1, width))


# --- inputs of the model -----------------------------------------------------------------------------------


@fault("views swapped")
def _(patch):
    inputs(patch, lambda given: given | {"images": given["images"].flip(0)})


@fault("one token wrong")
def _(patch):
    def change(given):
        tokens, last = given["tokens"].clone(), int(given["token_mask"].nonzero()[-1])
        tokens[last] = 3 if tokens[last] != 3 else 4
        return given | {"tokens": tokens}

    inputs(patch, change)


@fault("pixels in [0, 1]")
def _(patch):
    inputs(patch, lambda given: given | {"images": given["images"] / 2 + 0.5})


# --- processing --------------------------------------------------------------------------------------------


@fault("mean and std for quantiles, or the reverse", physical=True)
def _(patch):
    def other(original, policy, *args):
        mode = "quantile" if policy == "pi0" else "mean_std"
        return replace(original(policy, *args), state_mode=mode, action_mode=mode)

    wrap(patch, openpi_layout, "openpi_rules", other)


@fault("actions clipped to [-1, 1]", physical=True)
def _(patch):
    def clipped(original, self, actions, state=None):
        return original(self, np.clip(actions, -1, 1), state)

    wrap(patch, ActionTransform, "to_physical", clipped)


@fault("actions not un-normalised", physical=True)
def _(patch):
    wrap(patch, ActionTransform, "to_physical", lambda f, self, actions, state=None: actions[:, : self.dof])


@fault("BGR for RGB", physical=True)
def _(patch):
    wrap(patch, policy_module, "prepare_image", lambda f, image, *args: f(image[..., ::-1].copy(), *args))


@fault("resized without keeping the aspect", physical=True)
def _(patch):
    def stretched(_original, pixels, size, resize):
        return F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]

    wrap(patch, images, "resize_with_pad", stretched)


@fault("padding on one side only", physical=True)
def _(patch):
    def corner(original, pixels, size, resize):
        whole = original(pixels, size, resize)
        top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
        return whole.roll((-top, -left), (1, 2))

    wrap(patch, images, "resize_with_pad", corner)


@fault("views swapped at the entry", physical=True)
def _(patch):
    wrap(patch, ObservationEncoder, "ordered_views", lambda f, *args: f(*args)[::-1])


@fault("state below the range clamped to the first bin", "pi05", physical=True)
def _(patch):
    wrap(patch, prompt, "discretize", lambda f, state: np.maximum(f(state), 0))


@fault("state bins one too high", "pi05", physical=True)
def _(patch):
    wrap(patch, prompt, "discretize", lambda f, state: f(state) + 1)


@fault("255 state bins for 256", "pi05", physical=True)
def _(patch):
    wrap(patch, prompt, "discretize", lambda f, state: np.digitize(state, np.linspace(-1, 1, 256)[:-1]) - 1)


@fault("state not normalised", physical=True)
def _(patch):
    wrap(patch, StateTransform, "normalize", lambda f, self, state: np.asarray(state, np.float32))


@fault("underscores and newlines kept", physical=True)
def _(patch):
    wrap(patch, prompt, "clean_prompt", lambda f, text, rules: text)


@fault("no BOS token", physical=True)
def _(patch):
    wrap(patch, PromptEncoder, "encode", lambda f, *args: f(*args)[1:])
