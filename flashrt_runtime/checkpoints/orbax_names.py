"""How openpi's JAX parameters become PyTorch tensors: names on both sides, and the array moves between them.

JAX keeps the layers of a stack in one array, a kernel as (in, out) and attention as einsum weights per head;
PyTorch has one tensor a layer, (out, in), heads flattened. D width, H heads, K key heads, h head dimension, F
hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .architecture import EMBEDDING_KEY, EXPERT, LANGUAGE, PROJECTOR, VISION

Array = NDArray[np.generic]
Move = Callable[[Array], Array]


def _same(array: Array) -> Array:
    return array


def _transposed(array: Array) -> Array:
    return array.T


def _heads_in(array: Array) -> Array:
    """(D, H, h) -> (H h, D)."""
    return array.reshape(array.shape[0], -1).T


def _heads_out(array: Array) -> Array:
    """(H, h, D) -> (D, H h)."""
    return array.reshape(-1, array.shape[-1]).T


def _per_head(array: Array) -> Array:
    """(H, D, h) -> (H h, D)."""
    return array.transpose(0, 2, 1).reshape(-1, array.shape[1])


def _flat(array: Array) -> Array:
    return array.reshape(-1)


def _patches(array: Array) -> Array:
    """(14, 14, 3, D) -> (D, 3, 14, 14)."""
    return array.transpose(3, 2, 0, 1)


@dataclass(frozen=True)
class Part:
    """One tensor made of a leaf: its name ("{i}" for the layer), which entries after the layer, and the
    move."""

    name: str
    move: Move
    index: tuple[int, ...] = ()


def _dense(leaf: str, name: str) -> Iterator[tuple[str, Part]]:
    yield f"{leaf}/kernel", Part(f"{name}.weight", _transposed)
    yield f"{leaf}/bias", Part(f"{name}.bias", _same)


def _vision() -> Iterator[tuple[str, Part]]:
    yield "PaliGemma/img/embedding/kernel", Part(f"{VISION}embeddings.patch_embedding.weight", _patches)
    yield "PaliGemma/img/embedding/bias", Part(f"{VISION}embeddings.patch_embedding.bias", _same)
    position = Part(f"{VISION}embeddings.position_embedding.weight", _same, (0,))
    yield "PaliGemma/img/pos_embedding", position
    yield from _dense("PaliGemma/img/head", PROJECTOR[:-1])
    for part, name in (("scale", "weight"), ("bias", "bias")):
        yield f"PaliGemma/img/Transformer/encoder_norm/{part}", Part(f"{VISION}post_layernorm.{name}", _same)
    block, layer = "PaliGemma/img/Transformer/encoderblock", f"{VISION}encoder.layers.{{i}}."
    for index, norm in enumerate(("layer_norm1", "layer_norm2")):
        for part, name in (("scale", "weight"), ("bias", "bias")):
            yield f"{block}/LayerNorm_{index}/{part}", Part(f"{layer}{norm}.{name}", _same)
    for index, name in enumerate(("fc1", "fc2")):
        yield from _dense(f"{block}/MlpBlock_0/Dense_{index}", f"{layer}mlp.{name}")
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for leaf, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield f"{attention}/{leaf}/kernel", Part(f"{layer}self_attn.{name}.weight", _heads_in)
        yield f"{attention}/{leaf}/bias", Part(f"{layer}self_attn.{name}.bias", _flat)
    yield f"{attention}/out/kernel", Part(f"{layer}self_attn.out_proj.weight", _heads_out)
    yield f"{attention}/out/bias", Part(f"{layer}self_attn.out_proj.bias", _same)


def _gemma(suffix: str, root: str) -> Iterator[tuple[str, Part]]:
    """One Gemma stack; its leaves end in `suffix`. Norms are plain (scale) or adaptive (Dense_0)."""
    llm, layer = "PaliGemma/llm", f"{root}layers.{{i}}."
    norms = (
        (f"{llm}/final_norm{suffix}", f"{root}norm"),
        (f"{llm}/layers/pre_attention_norm{suffix}", f"{layer}input_layernorm"),
        (f"{llm}/layers/pre_ffw_norm{suffix}", f"{layer}post_attention_layernorm"),
    )
    for leaf, name in norms:
        yield f"{leaf}/scale", Part(f"{name}.weight", _same)
        yield from _dense(f"{leaf}/Dense_0", f"{name}.dense")
    attention = f"{layer}self_attn."
    yield f"{llm}/layers/attn/q_einsum{suffix}/w", Part(f"{attention}q_proj.weight", _per_head)
    for index, name in enumerate(("k_proj", "v_proj")):
        yield f"{llm}/layers/attn/kv_einsum{suffix}/w", Part(f"{attention}{name}.weight", _per_head, (index,))
    yield f"{llm}/layers/attn/attn_vec_einsum{suffix}/w", Part(f"{attention}o_proj.weight", _heads_out)
    for index, name in enumerate(("gate_proj", "up_proj")):
        yield (
            f"{llm}/layers/mlp{suffix}/gating_einsum",
            Part(f"{layer}mlp.{name}.weight", _transposed, (index,)),
        )
    yield f"{llm}/layers/mlp{suffix}/linear", Part(f"{layer}mlp.down_proj.weight", _transposed)


def _all() -> Iterator[tuple[str, Part]]:
    yield from _vision()
    yield "PaliGemma/llm/embedder/input_embedding", Part(EMBEDDING_KEY, _same)
    yield from _gemma("", LANGUAGE)
    yield from _gemma("_1", EXPERT)
    for name in (
        "action_in_proj",
        "action_out_proj",
        "time_mlp_in",
        "time_mlp_out",
        "state_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    ):
        yield from _dense(name, name)


def parts_by_leaf() -> dict[str, tuple[Part, ...]]:
    """Every leaf of openpi's parameter tree (without "params/" and "/value") and the tensors made of it."""
    table: dict[str, list[Part]] = {}
    for leaf, part in _all():
        table.setdefault(leaf, []).append(part)
    return {leaf: tuple(parts) for leaf, parts in table.items()}


def tensors_of(array: Array, part: Part) -> Iterator[tuple[str, Array]]:
    """The named tensors that a part makes of its leaf's array, one a layer where the leaf holds layers."""
    if "{i}" not in part.name:
        yield part.name, part.move(array[part.index] if part.index else array)
        return
    for layer in range(array.shape[0]):
        yield part.name.format(i=layer), part.move(array[(layer, *part.index)])
