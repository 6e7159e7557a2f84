#!/usr/bin/env python
"""Runs openpi's own JAX pi0-FAST on cases of `fast_cases.py`. Needs `make parity-env`.

    PYTHONPATH=.venv-parity/openpi .venv-parity/bin/python test/parity/oracles/openpi_fast_oracle.py \\
        --out DIR CASE …

Writes DIR/<case>.npz with the tokens of openpi's `sample_actions`: greedy, float32, no BOS behind the prompt,
and the decode positions that openpi uses. openpi stops at EOS, so tokens after one are missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import flax.nnx as nnx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from fast_cases import FAST_BY_NAME  # noqa: E402
from openpi.models import gemma_fast, model, pi0_fast, siglip  # noqa: E402

PREPROCESS = model.preprocess_observation
PALIGEMMA = "paligemma_with_expert.paligemma.model."
VISION = PALIGEMMA + "vision_tower.vision_model."
LANGUAGE = PALIGEMMA + "language_model."


def tree(case) -> dict[str, np.ndarray]:
    """The case's weights under the names and in the shapes of openpi's parameters."""
    weights = case.weights()
    language, vision = case.dims["prefix"], case.dims["vision"]

    def layers(pattern: str, depth: int) -> np.ndarray:
        return np.stack([weights(pattern.format(i)) for i in range(depth)])

    def text(name: str) -> np.ndarray:
        return layers(LANGUAGE + "layers.{}." + name + ".weight", language["depth"])

    depth, width, heads = (language[name] for name in ("depth", "width", "num_heads"))
    shared, head = language["num_kv_heads"], language["head_dim"]
    found = {
        "llm/embedder/input_embedding": weights(LANGUAGE + "embed_tokens.weight"),
        "llm/final_norm/scale": weights(LANGUAGE + "norm.weight"),
        "llm/layers/pre_attention_norm/scale": text("input_layernorm"),
        "llm/layers/pre_ffw_norm/scale": text("post_attention_layernorm"),
        "llm/layers/attn/q_einsum/w": text("self_attn.q_proj")
        .reshape(depth, heads, head, width)
        .transpose(0, 1, 3, 2),
        "llm/layers/attn/kv_einsum/w": np.stack(
            [
                text(f"self_attn.{name}_proj").reshape(depth, shared, head, width).transpose(0, 1, 3, 2)
                for name in "kv"
            ],
            axis=1,
        ),
        "llm/layers/attn/attn_vec_einsum/w": text("self_attn.o_proj")
        .transpose(0, 2, 1)
        .reshape(depth, heads, head, width),
        "llm/layers/mlp/gating_einsum": np.stack(
            [text(f"mlp.{name}_proj").transpose(0, 2, 1) for name in ("gate", "up")], axis=1
        ),
        "llm/layers/mlp/linear": text("mlp.down_proj").transpose(0, 2, 1),
        "img/embedding/kernel": weights(VISION + "embeddings.patch_embedding.weight").transpose(2, 3, 1, 0),
        "img/embedding/bias": weights(VISION + "embeddings.patch_embedding.bias"),
        "img/pos_embedding": weights(VISION + "embeddings.position_embedding.weight")[None],
        "img/head/kernel": weights(PALIGEMMA + "multi_modal_projector.linear.weight").T,
        "img/head/bias": weights(PALIGEMMA + "multi_modal_projector.linear.bias"),
        "img/Transformer/encoder_norm/scale": weights(VISION + "post_layernorm.weight"),
        "img/Transformer/encoder_norm/bias": weights(VISION + "post_layernorm.bias"),
    }
    block, depth, width = "img/Transformer/encoderblock/", vision["depth"], vision["width"]
    heads = vision["num_heads"]

    def tower(name: str) -> np.ndarray:
        return layers(VISION + "encoder.layers.{}." + name, depth)

    for index, (norm, dense) in enumerate((("layer_norm1", "fc1"), ("layer_norm2", "fc2"))):
        found[f"{block}LayerNorm_{index}/scale"] = tower(f"{norm}.weight")
        found[f"{block}LayerNorm_{index}/bias"] = tower(f"{norm}.bias")
        found[f"{block}MlpBlock_0/Dense_{index}/kernel"] = tower(f"mlp.{dense}.weight").transpose(0, 2, 1)
        found[f"{block}MlpBlock_0/Dense_{index}/bias"] = tower(f"mlp.{dense}.bias")
    attention = block + "MultiHeadDotProductAttention_0/"
    for leaf, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel = tower(f"self_attn.{name}.weight").transpose(0, 2, 1)
        found[f"{attention}{leaf}/kernel"] = kernel.reshape(depth, width, heads, width // heads)
        bias = tower(f"self_attn.{name}.bias")
        found[f"{attention}{leaf}/bias"] = bias.reshape(depth, heads, width // heads)
    out = tower("self_attn.out_proj.weight").transpose(0, 2, 1)
    found[f"{attention}out/kernel"] = out.reshape(depth, heads, width // heads, width)
    found[f"{attention}out/bias"] = tower("self_attn.out_proj.bias")
    return found


def build(case):
    """openpi's module at the case's dimensions, with its weights."""
    language, vision = case.dims["prefix"], case.dims["vision"]
    variant = gemma_fast.get_config("gemma_2b")
    variant.update({name: language[name] for name in language}, vocab_size=case.dims["vocab_size"])
    pi0_fast._gemma.get_config = lambda _name: variant
    tower = {name: vision[name] for name in ("width", "depth", "mlp_dim", "num_heads")}
    pi0_fast._siglip.Module = lambda *, variant, **settings: siglip._Module(
        **settings, **tower, patch_size=(14, 14)
    )
    resolution = (vision["image_size"],) * 2
    model.IMAGE_RESOLUTION = resolution  # of the example that shapes are taken from
    model.preprocess_observation = functools.partial(PREPROCESS, image_resolution=resolution)
    config = pi0_fast.Pi0FASTConfig(
        dtype="float32", action_dim=7, action_horizon=case.horizon, max_token_len=case.text + case.pad
    )
    built = config.create(jax.random.key(0))
    graph, state = nnx.split(built)
    flat = dict(state.flat_state())
    ours = tree(case)
    names = {"/".join(str(part) for part in path[1:]): path for path in flat}
    if set(names) != set(ours):
        raise SystemExit(f"{case.name}: parameters differ: {sorted(set(names) ^ set(ours))}")
    for name, path in names.items():
        value = jnp.asarray(ours[name])
        if value.shape != flat[path].value.shape:
            raise SystemExit(f"{name}: openpi has {flat[path].value.shape}, the case {value.shape}")
        flat[path] = flat[path].replace(value)
    return nnx.merge(graph, nnx.State.from_flat_path(flat))


def run(built, case) -> np.ndarray:
    """openpi's tokens."""
    inputs = case.prompt()
    names = [f"view{i}_rgb" for i in range(case.views)]
    masks = {name: bool(mask) for name, mask in zip(names, inputs["image_mask"], strict=True)}
    valid = inputs["token_mask"]
    observation = model.Observation(
        images={
            name: jnp.asarray(image.transpose(1, 2, 0))[None]
            for name, image in zip(names, inputs["images"], strict=True)
        },
        image_masks={name: jnp.asarray(mask)[None] for name, mask in masks.items()},
        state=jnp.zeros((1, 7)),
        tokenized_prompt=jnp.asarray(inputs["tokens"], jnp.int32)[None],
        tokenized_prompt_mask=jnp.asarray(valid)[None],
        token_ar_mask=jnp.zeros((1, len(valid)), jnp.int32),
        token_loss_mask=jnp.zeros((1, len(valid)), bool),
    )
    tokens = built.sample_actions(jax.random.key(0), observation, max_decoding_steps=case.max_tokens)
    return np.asarray(tokens[0]).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("cases", nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        case = FAST_BY_NAME[name]
        tokens = run(build(case), case)
        np.savez(arguments.out / f"{name}.npz", tokens=tokens)
        print(name, tokens.tolist(), flush=True)


if __name__ == "__main__":
    main()
