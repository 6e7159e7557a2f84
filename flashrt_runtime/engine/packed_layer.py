"""A Gemma layer's projections in the order of the skinny kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..layers.gemma import GemmaLayer
from ..layers.linear import Linear
from ..ops import expert
from ..ops.expert import PackedLinear
from ..quantization.fp8 import Fp8Linear

PROJECTIONS = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True)
class PackedLayer:
    """A layer and copies of its weights; scales are shared with it."""

    layer: GemmaLayer
    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear

    @classmethod
    def of(cls, layer: GemmaLayer, heads: int, head_dim: int, mlp_dim: int) -> PackedLayer:
        """Copies of `layer`'s weights, bf16 or e4m3; heads: of queries, keys and values together."""
        rope, geglu = expert.rope_order(heads, head_dim), expert.geglu_order(mlp_dim)
        qkv, gate_up = _packed(layer.qkv, rope), _packed(layer.gate_up, geglu)
        return cls(layer, qkv, _packed(layer.out), gate_up, _packed(layer.down))

    @property
    def linears(self) -> list[Linear]:
        """The projections themselves."""
        return [getattr(self.layer, name) for name in PROJECTIONS]

    def repack(self, like: PackedLayer) -> None:
        """The copies made anew, `like`, where the old ones lie."""
        for name in PROJECTIONS:
            getattr(self, name).data.copy_(getattr(like, name).data)


def _packed(linear: nn.Module, order: Tensor | None = None) -> PackedLinear:
    assert isinstance(linear, Linear)
    weight = linear.weight
    data = expert.pack_tiles(weight, None if order is None else order.to(weight.device))
    n, k = weight.shape
    if isinstance(linear, Fp8Linear):
        return PackedLinear(data, n, k, linear.weight_scale, linear.activation_scale)
    return PackedLinear(data, n, k)
