"""Weights and inputs as a function of (key, shape, seed): the same numbers here, in LeRobot and in openpi.

Only integer streams of PCG64, whose output NumPy guarantees, and exact float64 arithmetic are used, so that
stored results stay valid for every NumPy version and platform. Everything is drawn: norms and biases too,
which libraries initialise to constants that hide faults; q_proj is four times larger, so that attention is
peaked and masks, positions and tokens matter.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

QUERY_SCALE = 4.0
GEMMA = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
VISION = ("width", "depth", "mlp_dim", "num_heads", "image_size")


def dims(prefix: tuple, expert: tuple, vision: tuple, vocab_size: int) -> dict:
    """Dimensions in the form of config.json's `flashrt_dims`."""
    return {
        "prefix": dict(zip(GEMMA, prefix, strict=True)),
        "expert": dict(zip(GEMMA, expert, strict=True)),
        "vision": dict(zip(VISION, vision, strict=True)),
        "vocab_size": vocab_size,
    }


SIZES = {
    "tiny": dims((64, 4, 128, 8, 1, 16), (64, 4, 128, 8, 1, 16), (64, 2, 128, 4, 56), 512),
    # other widths in prefix and expert, two kv heads, an odd number of patches
    "uneven": dims((96, 3, 160, 4, 2, 32), (48, 3, 112, 4, 2, 32), (72, 3, 100, 2, 70), 300),
    # the published widths, two layers of each stack
    "wide": dims((2048, 2, 16384, 8, 1, 256), (1024, 2, 4096, 8, 1, 256), (1152, 2, 4304, 16, 224), 4096),
}


def uniform(key: str, count: int, seed: int) -> np.ndarray:
    """`count` float64 values in [0, 1) from the stream of (seed, key)."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(key.encode())])).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 weight stored under an openpi checkpoint key; uniform with the spread of `spread`."""
    unit = (uniform(key, math.prod(shape), seed) * 2.0 - 1.0).reshape(shape)
    centre, scale = spread(key, shape)
    return (centre + scale * unit).astype(np.float32)


def spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and half-width of a weight's distribution."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    if ".dense." in key:  # adaRMS modulation of order 0.3, not zero as at initialisation
        return 0.0, 0.5 if key.endswith("bias") else 0.5 / math.sqrt(fan_in)
    if "norm" in key and key.endswith("weight"):
        return (1.0 if "layer_norm" in key or "post_layernorm" in key else 0.0), 0.4
    if key.endswith("bias"):
        return 0.0, 0.1
    if key.endswith("position_embedding.weight"):
        return 0.0, 0.05
    scale = math.sqrt(3.0 / fan_in)  # unit variance in, unit variance out
    if any(name in key for name in ("embed_tokens", "patch_embedding")):
        scale *= 0.1  # small inputs to the first norms: a wrong epsilon shows
    elif "action_in_proj" in key:
        scale *= 0.3  # likewise
    elif "vision" not in key and any(name in key for name in ("o_proj", "down_proj")):
        scale *= 0.25  # as deep networks are initialised: float32 rounding stays well below the gates
    elif "vision" not in key and "q_proj" in key:
        scale *= QUERY_SCALE
    return 0.0, scale


def shapes(
    policy: str, size: dict, action_dim: int = 32, tied: bool = True
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint in openpi's PyTorch layout, by key (the unused heads left out).

    tied: pi0fast scores tokens by their embedding.
    """
    found: dict[str, tuple[int, ...]] = {}

    def affine(key: str, rows: int, *columns: int, bias: bool = True) -> None:
        found[f"{key}.weight"] = (rows, *columns)
        if bias:
            found[f"{key}.bias"] = (rows,)

    def gemma(root: str, part: dict, adaptive: bool) -> None:
        width, inner = part["width"], part["num_heads"] * part["head_dim"]
        shared = part["num_kv_heads"] * part["head_dim"]

        def norm(key: str) -> None:
            if adaptive:
                affine(f"{key}.dense", 3 * width, width)
            else:
                affine(key, width, bias=False)

        for layer in range(part["depth"]):
            at = f"{root}layers.{layer}."
            norm(at + "input_layernorm")
            norm(at + "post_attention_layernorm")
            for name, rows in (("q", inner), ("k", shared), ("v", shared)):
                affine(f"{at}self_attn.{name}_proj", rows, width, bias=False)
            affine(at + "self_attn.o_proj", width, inner, bias=False)
            for name in ("gate", "up"):
                affine(f"{at}mlp.{name}_proj", part["mlp_dim"], width, bias=False)
            affine(at + "mlp.down_proj", width, part["mlp_dim"], bias=False)
        norm(root + "norm")

    paligemma = "paligemma_with_expert.paligemma.model."
    prefix, expert, vision = size["prefix"], size["expert"], size["vision"]
    width, tower = vision["width"], paligemma + "vision_tower.vision_model."
    affine(tower + "embeddings.patch_embedding", width, 3, 14, 14)
    affine(tower + "embeddings.position_embedding", (vision["image_size"] // 14) ** 2, width, bias=False)
    for layer in range(vision["depth"]):
        at = f"{tower}encoder.layers.{layer}."
        for name in ("layer_norm1", "layer_norm2"):
            affine(at + name, width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            affine(f"{at}self_attn.{name}", width, width)
        affine(at + "mlp.fc1", vision["mlp_dim"], width)
        affine(at + "mlp.fc2", width, vision["mlp_dim"])
    affine(tower + "post_layernorm", width)
    affine(paligemma + "multi_modal_projector.linear", prefix["width"], width)
    affine(paligemma + "language_model.embed_tokens", size["vocab_size"], prefix["width"], bias=False)
    gemma(paligemma + "language_model.", prefix, adaptive=False)
    if policy == "pi0fast":
        if not tied:
            affine("paligemma_with_expert.paligemma.lm_head", size["vocab_size"], prefix["width"], bias=False)
        return found
    gemma("paligemma_with_expert.gemma_expert.model.", expert, adaptive=policy == "pi05")
    width = expert["width"]
    affine("action_in_proj", width, action_dim)
    affine("action_out_proj", action_dim, width)
    if policy == "pi05":
        affine("time_mlp_in", width, width)
        affine("time_mlp_out", width, width)
    else:
        affine("state_proj", width, action_dim)
        affine("action_time_mlp_in", width, 2 * width)
        affine("action_time_mlp_out", width, width)
    return found


class Weights:
    """The checkpoint of (policy, size, seed), computed on demand."""

    def __init__(self, policy: str, size: dict, seed: int, tied: bool = True) -> None:
        self.shapes = shapes(policy, size, tied=tied)
        self.seed = seed

    def __call__(self, key: str) -> np.ndarray:
        """float32 array by openpi key. Raises KeyError for a key the policy does not have."""
        return weight(key, self.shapes[key], self.seed)
