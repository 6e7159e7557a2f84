"""Writes Orbax folders with tensorstore from PyTorch tensors: the layout of openpi's JAX checkpoints.

Written out from the shapes of openpi's parameter tree, independently of the reader's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorstore
from numpy.typing import NDArray

from flashrt_runtime.config import PolicyConfig

Array = NDArray[np.float32]
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."


def jax_tree(tensors: Mapping[str, Array], config: PolicyConfig) -> dict[str, Array]:
    """openpi's parameter tree, flat, of a policy's PyTorch tensors (canonical names)."""
    tree = dict(_vision(tensors, config)) | dict(_stack(tensors, config, "", LANGUAGE))
    if config.policy != "pi0fast":
        tree |= dict(_stack(tensors, config, "_1", EXPERT))
    tree["PaliGemma/llm/embedder/input_embedding"] = tensors[f"{LANGUAGE}embed_tokens.weight"]
    for name in {key.split(".")[0] for key in tensors if not key.startswith("paligemma_with_expert")}:
        tree[f"{name}/kernel"] = tensors[f"{name}.weight"].T
        tree[f"{name}/bias"] = tensors[f"{name}.bias"]
    return tree


def _stacked(tensors: Mapping[str, Array], pattern: str, depth: int) -> Array:
    return np.stack([tensors[pattern.format(i)] for i in range(depth)])


def _vision(tensors: Mapping[str, Array], config: PolicyConfig) -> Iterator[tuple[str, Array]]:
    vision, root = config.vision, "PaliGemma/img"
    head = vision.width // vision.num_heads
    yield (
        f"{root}/embedding/kernel",
        tensors[f"{VISION}embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
    )
    yield f"{root}/embedding/bias", tensors[f"{VISION}embeddings.patch_embedding.bias"]
    yield f"{root}/pos_embedding", tensors[f"{VISION}embeddings.position_embedding.weight"][None]
    yield f"{root}/head/kernel", tensors[f"{PROJECTOR}.weight"].T
    yield f"{root}/head/bias", tensors[f"{PROJECTOR}.bias"]
    yield f"{root}/Transformer/encoder_norm/scale", tensors[f"{VISION}post_layernorm.weight"]
    yield f"{root}/Transformer/encoder_norm/bias", tensors[f"{VISION}post_layernorm.bias"]
    block, layer = f"{root}/Transformer/encoderblock", VISION + "encoder.layers.{}."
    for index in (0, 1):
        norm = f"{layer}layer_norm{index + 1}"
        yield f"{block}/LayerNorm_{index}/scale", _stacked(tensors, f"{norm}.weight", vision.depth)
        yield f"{block}/LayerNorm_{index}/bias", _stacked(tensors, f"{norm}.bias", vision.depth)
        dense = f"{layer}mlp.fc{index + 1}"
        kernel = _stacked(tensors, f"{dense}.weight", vision.depth).transpose(0, 2, 1)
        yield f"{block}/MlpBlock_0/Dense_{index}/kernel", kernel
        yield f"{block}/MlpBlock_0/Dense_{index}/bias", _stacked(tensors, f"{dense}.bias", vision.depth)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    heads = (vision.depth, vision.num_heads, head)
    for leaf, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        weight = _stacked(tensors, f"{layer}self_attn.{name}.weight", vision.depth)
        kernel = weight.transpose(0, 2, 1).reshape(vision.depth, vision.width, vision.num_heads, head)
        yield f"{attention}/{leaf}/kernel", kernel
        yield (
            f"{attention}/{leaf}/bias",
            _stacked(tensors, f"{layer}self_attn.{name}.bias", vision.depth).reshape(heads),
        )
    out = _stacked(tensors, f"{layer}self_attn.out_proj.weight", vision.depth).transpose(0, 2, 1)
    yield f"{attention}/out/kernel", out.reshape(*heads, vision.width)
    yield f"{attention}/out/bias", _stacked(tensors, f"{layer}self_attn.out_proj.bias", vision.depth)


def _stack(
    tensors: Mapping[str, Array], config: PolicyConfig, suffix: str, root: str
) -> Iterator[tuple[str, Array]]:
    stack = config.expert if suffix else config.prefix
    llm, layer, depth = "PaliGemma/llm", root + "layers.{}.", stack.depth
    for leaf, name in (
        ("pre_attention_norm", "input_layernorm"),
        ("pre_ffw_norm", "post_attention_layernorm"),
    ):
        if suffix and config.policy == "pi05":
            dense = f"{llm}/layers/{leaf}{suffix}/Dense_0"
            yield (
                f"{dense}/kernel",
                _stacked(tensors, f"{layer}{name}.dense.weight", depth).transpose(0, 2, 1),
            )
            yield f"{dense}/bias", _stacked(tensors, f"{layer}{name}.dense.bias", depth)
        else:
            yield f"{llm}/layers/{leaf}{suffix}/scale", _stacked(tensors, f"{layer}{name}.weight", depth)
    if suffix and config.policy == "pi05":
        yield f"{llm}/final_norm{suffix}/Dense_0/kernel", tensors[f"{root}norm.dense.weight"].T
        yield f"{llm}/final_norm{suffix}/Dense_0/bias", tensors[f"{root}norm.dense.bias"]
    else:
        yield f"{llm}/final_norm{suffix}/scale", tensors[f"{root}norm.weight"]
    heads, head, width = stack.num_heads, stack.head_dim, stack.width
    query = _stacked(tensors, f"{layer}self_attn.q_proj.weight", depth).reshape(depth, heads, head, width)
    yield f"{llm}/layers/attn/q_einsum{suffix}/w", query.transpose(0, 1, 3, 2)
    pair = [
        _stacked(tensors, f"{layer}self_attn.{name}.weight", depth)
        .reshape(depth, stack.num_kv_heads, head, width)
        .transpose(0, 1, 3, 2)
        for name in ("k_proj", "v_proj")
    ]
    yield f"{llm}/layers/attn/kv_einsum{suffix}/w", np.stack(pair, axis=1)
    out = _stacked(tensors, f"{layer}self_attn.o_proj.weight", depth).transpose(0, 2, 1)
    yield f"{llm}/layers/attn/attn_vec_einsum{suffix}/w", out.reshape(depth, heads, head, width)
    gates = [_stacked(tensors, f"{layer}mlp.{name}.weight", depth) for name in ("gate_proj", "up_proj")]
    yield f"{llm}/layers/mlp{suffix}/gating_einsum", np.stack(gates, axis=1).transpose(0, 1, 3, 2)
    yield (
        f"{llm}/layers/mlp{suffix}/linear",
        _stacked(tensors, f"{layer}mlp.down_proj.weight", depth).transpose(0, 2, 1),
    )


def write_orbax(
    params: Path,
    tree: Mapping[str, Array],
    *,
    ocdbt: bool = True,
    driver: str = "zarr",
    value: bool = False,
    dtype: str = "float32",
) -> None:
    """Write a tree as Orbax does: "params" and the levels joined by dots, optionally a last level "value"."""
    params.mkdir(parents=True)
    for leaf, array in tree.items():
        name = ".".join(["params", *leaf.split("/"), *(["value"] if value else [])])
        kvstore = (
            {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{name}/"}
            if ocdbt
            else {"driver": "file", "path": f"{params}/{name}/"}
        )
        store = tensorstore.open(
            {"driver": driver, "kvstore": kvstore},
            create=True,
            dtype=getattr(tensorstore, dtype),
            shape=array.shape,
        ).result()
        store.write(np.ascontiguousarray(array).astype(store.dtype.numpy_dtype)).result()
    (params / "_METADATA").write_text("{}")
