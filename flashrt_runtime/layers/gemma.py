"""A Gemma stack over a shared K/V cache (arXiv:2403.08295): the prefix language model and the action expert.

Activations are (tokens, width). Attention is bidirectional over the cache's valid slots and the stack's own
tokens; every query sees the same keys, so no mask is built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..config import GemmaConfig
from .kv_cache import KVCache, Window
from .linear import Linear
from .norms import RMSNorm, ada_rms_norm

Rope = tuple[Tensor, Tensor]


class GemmaLayer(nn.Module):
    """Attention and GeGLU with fused qkv and gate-up projections; plain norms only if `norms`."""

    def __init__(self, config: GemmaConfig, norms: bool, dtype: torch.dtype) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads = heads
        self.qkv = Linear(config.width, (heads + 2 * kv_heads) * head_dim, bias=False, dtype=dtype)
        self.out = Linear(heads * head_dim, config.width, bias=False, dtype=dtype)
        self.gate_up = Linear(config.width, 2 * config.mlp_dim, bias=False, dtype=dtype)
        self.down = Linear(config.mlp_dim, config.width, bias=False, dtype=dtype)
        if norms:
            self.input_norm = RMSNorm(config.width)
            self.post_norm = RMSNorm(config.width)

    def write_kv(self, x: Tensor, rope: Rope, cache: KVCache, layer: int, window: Window) -> Tensor:
        """Project x: (tokens, width), write K and V into the window, return q: (tokens, heads, head_dim)."""
        k, v = cache.k[layer], cache.v[layer]
        return ops.split_qkv_rope(self.qkv(x), *rope, self.num_heads, k, v, window.written)

    def attend(self, x: Tensor, rope: Rope, cache: KVCache, layer: int, window: Window) -> Tensor:
        """Attention of x: (tokens, width) over the window's keys, x itself among them."""
        q = self.write_kv(x, rope, cache, layer, window)
        k, v = cache.k[layer, : window.keys], cache.v[layer, : window.keys]
        out: Tensor = self.out(ops.attention(q, k, v, window.unmasked, self.out.input_scale))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        """GeGLU feed-forward."""
        out: Tensor = self.down(self.gate_up.geglu(x, self.down.input_scale))
        return out


class GemmaStack(nn.Module):
    """`depth` layers and, unless the stack only feeds a cache, a final norm.

    adaptive: norms have no weights and take their styles at call time (pi0.5's expert).
    """

    def __init__(self, config: GemmaConfig, dtype: torch.dtype, *, adaptive: bool, final_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(config, not adaptive, dtype) for _ in range(config.depth))
        if final_norm and not adaptive:
            self.norm = RMSNorm(config.width)

    def fill_cache(self, x: Tensor, rope: Rope, cache: KVCache, window: Window) -> None:
        """Write K and V of every layer for tokens x: (tokens, width) into the window; plain norms.

        The last layer stops at its K and V: nothing reads what would come after.
        """
        branch: Tensor | None = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, GemmaLayer)
            normed, x = layer.input_norm(x, branch, layer.qkv.input_scale)
            if index == last:
                layer.write_kv(normed, rope, cache, index, window)
                return
            attended = layer.attend(normed, rope, cache, index, window)
            normed, x = layer.post_norm(x, attended, layer.gate_up.input_scale)
            branch = layer.mlp(normed)

    def forward(self, x: Tensor, rope: Rope, cache: KVCache, window: Window) -> Tensor:
        """Plain norms: (tokens, width) in, final-normed (tokens, width) out."""
        branch: Tensor | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, GemmaLayer)
            normed, x = layer.input_norm(x, branch, layer.qkv.input_scale)
            attended = layer.attend(normed, rope, cache, index, window)
            normed, x = layer.post_norm(x, attended, layer.gate_up.input_scale)
            branch = layer.mlp(normed)
        out: Tensor = self.norm(x, branch)[0]
        return out

    def forward_adaptive(
        self, x: Tensor, rope: Rope, cache: KVCache, window: Window, styles: Tensor
    ) -> Tensor:
        """adaRMS norms: styles (2 * depth + 1, 3, width) float32, in the order the norms are applied; or
        (2 * depth + 1, 3, tokens, width), one for each token.
        """
        branch: Tensor | None = None
        gate: Tensor | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, GemmaLayer)
            before, after = styles[2 * index], styles[2 * index + 1]
            normed, x = ada_rms_norm(x, branch, gate, before, layer.qkv.input_scale)
            branch = layer.attend(normed, rope, cache, index, window)
            normed, x = ada_rms_norm(x, branch, before[2], after, layer.gate_up.input_scale)
            branch, gate = layer.mlp(normed), after[2]
        return ada_rms_norm(x, branch, gate, styles[-1])[0]
