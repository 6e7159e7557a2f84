"""Where each parameter of a policy comes from: our names left, openpi's checkpoint keys right."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import PolicyConfig
from ..progress import tracked

PALIGEMMA = "paligemma_with_expert.paligemma."
LANGUAGE = f"{PALIGEMMA}model.language_model."
VISION = f"{PALIGEMMA}model.vision_tower.vision_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
EMBEDDING_KEY = f"{LANGUAGE}embed_tokens.weight"
HEAD_KEY = f"{PALIGEMMA}lm_head.weight"


class TensorSource(Protocol):
    """What a checkpoint reader offers the loader."""

    def tensor(self, key: str) -> Tensor:
        """The tensor stored under an openpi key, in its storage dtype."""
        ...


@dataclass(frozen=True)
class Source:
    """A parameter and the checkpoint tensors whose rows it stacks."""

    parameter: str
    keys: tuple[str, ...]


def _linear(parameter: str, *keys: str, bias: bool = False) -> Iterator[Source]:
    for part in ("weight", "bias") if bias else ("weight",):
        yield Source(f"{parameter}.{part}", tuple(f"{key}.{part}" for key in keys))


def _gemma(parameter: str, key: str, depth: int, norms: bool) -> Iterator[Source]:
    for index in range(depth):
        ours, theirs = f"{parameter}.layers.{index}", f"{key}layers.{index}"
        attention = f"{theirs}.self_attn"
        yield from _linear(f"{ours}.qkv", *(f"{attention}.{part}_proj" for part in "qkv"))
        yield from _linear(f"{ours}.out", f"{attention}.o_proj")
        yield from _linear(f"{ours}.gate_up", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        yield from _linear(f"{ours}.down", f"{theirs}.mlp.down_proj")
        if norms:
            yield from _linear(f"{ours}.input_norm", f"{theirs}.input_layernorm")
            yield from _linear(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm")


def _siglip(parameter: str, depth: int) -> Iterator[Source]:
    yield from _linear(f"{parameter}.patch", f"{VISION}embeddings.patch_embedding", bias=True)
    yield Source(f"{parameter}.position", (f"{VISION}embeddings.position_embedding.weight",))
    for index in range(depth):
        ours, theirs = f"{parameter}.layers.{index}", f"{VISION}encoder.layers.{index}"
        attention = f"{theirs}.self_attn"
        yield from _linear(f"{ours}.norm1", f"{theirs}.layer_norm1", bias=True)
        yield from _linear(f"{ours}.qkv", *(f"{attention}.{part}_proj" for part in "qkv"), bias=True)
        yield from _linear(f"{ours}.out", f"{attention}.out_proj", bias=True)
        yield from _linear(f"{ours}.norm2", f"{theirs}.layer_norm2", bias=True)
        yield from _linear(f"{ours}.fc1", f"{theirs}.mlp.fc1", bias=True)
        yield from _linear(f"{ours}.fc2", f"{theirs}.mlp.fc2", bias=True)
    yield from _linear(f"{parameter}.norm", f"{VISION}post_layernorm", bias=True)
    yield from _linear(f"{parameter}.project", f"{PALIGEMMA}model.multi_modal_projector.linear", bias=True)


def _pi05(config: PolicyConfig) -> Iterator[Source]:
    depth = config.expert.depth
    yield from _gemma("expert", EXPERT, depth, norms=False)
    yield from _linear("conditioning.mlp_in", "time_mlp_in", bias=True)
    yield from _linear("conditioning.mlp_out", "time_mlp_out", bias=True)
    for index in range(depth):
        for part, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            ours = f"conditioning.dense.{2 * index + part}"
            yield from _linear(ours, f"{EXPERT}layers.{index}.{norm}.dense", bias=True)
    yield from _linear(f"conditioning.dense.{2 * depth}", f"{EXPERT}norm.dense", bias=True)


def _pi0(config: PolicyConfig) -> Iterator[Source]:
    yield from _gemma("expert", EXPERT, config.expert.depth, norms=True)
    yield from _linear("expert.norm", f"{EXPERT}norm")
    yield from _linear("state_in", "state_proj", bias=True)
    yield from _linear("action_time_in", "action_time_mlp_in", bias=True)
    yield from _linear("action_time_out", "action_time_mlp_out", bias=True)


def _pi0fast(config: PolicyConfig) -> Iterator[Source]:
    yield from _linear("paligemma.stack.norm", f"{LANGUAGE}norm")
    if not config.decode.tied_head:
        yield Source("head.weight", (HEAD_KEY,))


def sources(config: PolicyConfig) -> list[Source]:
    """Every parameter of the policy with its checkpoint keys."""
    found = [Source("paligemma.embedding.weight", (EMBEDDING_KEY,))]
    found += _siglip("paligemma.vision", config.vision.depth)
    found += _gemma("paligemma.stack", LANGUAGE, config.prefix.depth, norms=True)
    if config.policy == "pi0fast":
        return [*found, *_pi0fast(config)]
    found += _linear("action_in", "action_in_proj", bias=True)
    found += _linear("action_out", "action_out_proj", bias=True)
    found += _pi05(config) if config.policy == "pi05" else _pi0(config)
    return found


def load_weights(
    model: nn.Module, config: PolicyConfig, checkpoint: TensorSource, device: torch.device
) -> None:
    """Allocate the model's parameters on `device` and copy the checkpoint into them, in each parameter's
    dtype.

    A layer that stores another form of its weight (8 bits) takes it in float32 through its `set_weight`.
    Host memory beyond the mapped file is one tensor at most.
    """
    wanted = sources(config)
    for source in tracked(wanted, len(wanted)):
        owner_name, _, name = source.parameter.rpartition(".")
        owner = model.get_submodule(owner_name)
        declared = getattr(owner, name)
        convert = getattr(owner, "set_weight", None) if name == "weight" else None
        dtype = declared.dtype if convert is None else torch.float32
        target = _stacked(source, checkpoint, declared.shape, dtype, device)
        if convert is None:
            setattr(owner, name, nn.Parameter(target, requires_grad=False))
        else:
            convert(target)


def unquantised_weights(
    model: nn.Module,
    config: PolicyConfig,
    checkpoint: TensorSource,
    device: torch.device,
    projections: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's own weights of some projections of `model`, whatever form it stores: one after the
    other, (out, in) float32 on `device`, each with the projection's name.
    """
    for source in sources(config):
        name, _, part = source.parameter.rpartition(".")
        if part == "weight" and name in projections:
            shape = model.get_submodule(name).weight.shape
            assert isinstance(shape, torch.Size)
            yield name, _stacked(source, checkpoint, shape, torch.float32, device)


def _stacked(
    source: Source, checkpoint: TensorSource, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The rows of a source's tensors, one below the other."""
    target = torch.empty(shape, dtype=dtype, device=device)
    row = 0
    for key in source.keys:
        stored = checkpoint.tensor(key)
        stored = stored.reshape(stored.shape[0], *target.shape[1:])
        target[row : row + stored.shape[0]].copy_(stored)
        row += stored.shape[0]
    return target
