"""One token through pi0-FAST's language model by the skinny kernels, in place of the model's own layers.

The model stays the definition: this holds packed copies of its weights (2 GB in fp8) and gives the same
hidden states, by test. It serves Gemma-2B in fp8 on GPUs that have it; elsewhere the model's layers run.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from ..config import GEMMA_2B
from ..layers.gemma import GemmaLayer
from ..layers.norms import EPS
from ..models import Pi0Fast
from ..ops import E4M3, expert, native, rms_norm
from ..ops.expert import Epilogue
from ..quantization.fp8 import Fp8Linear
from .packed_layer import PackedLayer
from .probing import NOT_SERVED, WRONG_SHAPE, refused

logger = logging.getLogger(__name__)

CAPABILITY = (8, 9)


def refusal(model: Pi0Fast, device: torch.device) -> str | None:
    """Why the kernels cannot serve this model on this device, in one line; None when they can."""
    if device.type != "cuda":
        return "they need a GPU"
    if native.capability(device) < CAPABILITY:
        return "they need compute capability 8.9 or newer"
    if not native.available():
        return f"no native kernels: {native.unavailable_reason()}"
    if replace(model.config.prefix, depth=GEMMA_2B.depth) != GEMMA_2B:
        return "they serve Gemma-2B's widths only"
    if not isinstance(model.paligemma.stack.layers[0].qkv, Fp8Linear):
        return "they serve fp8 only"
    return None


class FusedDecode:
    """Packed weights and scratch of one model."""

    def __init__(self, model: Pi0Fast, device: torch.device) -> None:
        self.model = model
        prefix = model.config.prefix
        heads = prefix.num_heads + 2 * prefix.num_kv_heads
        self.sizes = heads, prefix.head_dim, prefix.mlp_dim
        self.layers = [
            PackedLayer.of(layer, *self.sizes)
            for layer in model.paligemma.stack.layers
            if isinstance(layer, GemmaLayer)
        ]
        self.linears = [
            linear
            for layer in self.layers
            for linear in layer.linears
            if isinstance(linear, Fp8Linear)
        ]
        # slots beyond are the model-space entry's; the attention kernel holds its share of them all
        self.slots = model.prefix_capacity + model.max_tokens
        inner = prefix.num_heads * prefix.head_dim
        clusters = native.load().expert_attention_in_clusters(1, self.slots)
        self.scratch = (
            None if clusters else expert.attention_scratch(1, prefix.num_heads, self.slots, device)
        )
        self.q = torch.empty(1, prefix.num_heads, prefix.head_dim, dtype=torch.bfloat16, device=device)
        self.attended = torch.empty(1, inner, dtype=E4M3, device=device)
        self.activated = torch.empty(1, prefix.mlp_dim, dtype=E4M3, device=device)

    def ready(self) -> bool:
        """Whether activation scales are in force; until then, and while observing, the layers run."""
        return all(linear.input_scale is not None for linear in self.linears)

    @torch.inference_mode()
    def repack(self) -> None:
        """The layers' weights as they are now, in the buffers that captured graphs read."""
        for packed in self.layers:
            packed.repack(PackedLayer.of(packed.layer, *self.sizes))

    def hidden(self, x: Tensor, gap: int) -> Tensor:
        """`Pi0Fast.hidden` of the embedded token x: (1, width) bfloat16, which is overwritten."""
        model, prefix = self.model, self.model.config.prefix
        cos, sin = model.rope
        for index, packed in enumerate(self.layers):
            layer, k, v = packed.layer, model.cache.k[index, : self.slots], model.cache.v[index, : self.slots]
            expert.skinny_gemm(
                layer.input_norm(x, None, packed.qkv.input_scale)[0],
                packed.qkv,
                Epilogue.ROPE,
                self.q,
                rope=(cos[gap:], sin[gap:]),
                prefix_length=model.slot,
                k_cache=k,
                v_cache=v,
                heads=prefix.num_heads,
                kv_heads=prefix.num_kv_heads,
                head_dim=prefix.head_dim,
            )
            scale = packed.out.input_scale
            expert.expert_attention(self.q, k, v, model.slot, self.attended, scale, self.scratch)
            expert.skinny_gemm(self.attended, packed.out, Epilogue.RESIDUAL, x)
            expert.skinny_gemm(
                layer.post_norm(x, None, packed.gate_up.input_scale)[0],
                packed.gate_up,
                Epilogue.GEGLU,
                self.activated,
                out_scale=packed.down.input_scale,
            )
            expert.skinny_gemm(self.activated, packed.down, Epilogue.RESIDUAL, x)
        return rms_norm(x, model.paligemma.stack.norm.weight, EPS)


def attach(model: Pi0Fast, device: torch.device) -> None:
    """Give the model the fused step where it can be had, and say in the log why where not."""
    reason = refusal(model, device)
    if reason is None:
        fused = FusedDecode(model, device)

        @torch.inference_mode()
        def decode_one() -> None:
            model.slot.zero_()  # the kernel traps on one that its cache has not
            fused.hidden(torch.zeros(1, model.paligemma.width, dtype=torch.bfloat16, device=device), 0)

        reason = refused(decode_one, device, (*NOT_SERVED, WRONG_SHAPE))
        if reason is None:
            model.fused = fused
    if reason is not None:
        logger.warning("decoding by the model's own, slower layers: for the skinny kernels, %s", reason)
