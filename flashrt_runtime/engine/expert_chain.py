"""The denoise steps of pi0's and pi0.5's action expert as a chain of kernels, in place of the model's loop.

Five kernels a layer visit: norm + qkv + rotary embedding + cache, attention, out + gated residual, norm +
gate-up + GeGLU, down + gated residual; the norms by themselves for more than 16 actions. Between two steps
one for the Euler step and the actions' way back in.

The model stays the definition: this holds packed copies of its expert's weights and gives the same actions,
by test. It serves where the one persistent kernel does not (`fused_expert`): GPUs from compute capability 8.0
on in bf16 and from 8.9 on in fp8, any number of multiprocessors, other widths than the published expert's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PolicyConfig
from ..layers.gemma import GemmaLayer
from ..layers.norms import EPS
from ..models import FlowPolicy, Pi0, Pi05
from ..models.flow import Guide
from ..ops import E4M3, expert, native
from ..ops.expert import Epilogue, PackedLinear, StepGuide
from ..quantization.fp8 import Fp8Linear, scales_in_force
from .conditioning import Conditioning
from .gpu import Gpu
from .packed_layer import PackedLayer
from .probing import NOT_SERVED, WRONG_SHAPE, attach_expert

MAX_ACTIONS = expert.MAX_ROWS
CAPABILITY = (8, 0)
HEAD_DIM = 256
CLUSTER_ROWS = 16
# what the norm in front of a product takes; action dims and widths that the step between takes
WIDTH_STEP, MAX_WIDTH, MLP_STEP, MAX_ACTION_DIM = 256, 1024, 64, 64


def refusal(config: PolicyConfig, dtype: torch.dtype, gpu: Gpu | None) -> str | None:
    """Why the kernels cannot serve such a model on this GPU, in one line; None when they can, as far as is
    known before their launch.
    """
    if gpu is None:
        return "they need a GPU"
    if gpu.capability < CAPABILITY:
        return f"they need compute capability 8.0 or newer, not {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.no_kernels is not None:
        return f"no native kernels: {gpu.no_kernels}"
    if config.policy not in ("pi0", "pi05"):
        return f"they serve pi0 and pi05, not {config.policy}"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, not {dtype}"
    if config.horizon > MAX_ACTIONS:
        return f"they serve chunks of up to {MAX_ACTIONS} actions, not {config.horizon}"
    if config.action_dim > MAX_ACTION_DIM or config.action_dim % 4:
        return f"they serve up to {MAX_ACTION_DIM} action dimensions in fours, not {config.action_dim}"
    sizes = config.expert
    if sizes.head_dim != HEAD_DIM or sizes.num_kv_heads != 1:
        return f"they serve one key head of {HEAD_DIM}, not {sizes.num_kv_heads} of {sizes.head_dim}"
    if sizes.width % WIDTH_STEP or sizes.width > MAX_WIDTH or sizes.mlp_dim % MLP_STEP:
        return (
            f"they serve widths in steps of {WIDTH_STEP} up to {MAX_WIDTH}, an MLP in steps of {MLP_STEP}, "
            f"not {sizes.width} with {sizes.mlp_dim}"
        )
    return None


@dataclass(frozen=True)
class Style:
    """One norm's scale, and shift and gate where it is adaptive: (width,) float32."""

    scale: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None


class ExpertChain:
    """Packed weights, conditioning and scratch of one model's expert."""

    def __init__(self, model: Pi0 | Pi05, device: torch.device, clusters: bool | None = None) -> None:
        """clusters: whether attention runs in clusters of blocks; None: where the GPU has them and they are
        faster, for few actions.
        """
        self.model = model
        sizes, rows = model.config.expert, model.config.horizon
        self.sizes = sizes.num_heads + 2 * sizes.num_kv_heads, sizes.head_dim, sizes.mlp_dim
        layers = [layer for layer in model.expert.layers if isinstance(layer, GemmaLayer)]
        self.layers = [PackedLayer.of(layer, *self.sizes) for layer in layers]
        conditioning = Conditioning.of(model)
        self.styles = [[Style(*style) for style in step] for step in conditioning.norms]
        self.project_in = conditioning.project_in
        self.project_out = model.action_out.weight.contiguous(), model.action_out.bias
        self.mix: tuple[PackedLinear, Tensor] | None = None
        if conditioning.mix is not None:
            weight, bias = conditioning.mix
            self.mix = PackedLinear(expert.pack_tiles(weight.bfloat16()), *weight.shape), bias
        quantised = isinstance(layers[0].qkv, Fp8Linear)

        def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        product = E4M3 if quantised else torch.bfloat16
        self.hidden, self.mixed = buffer(rows, sizes.width), buffer(rows, sizes.width)
        # e4m3 weights of qkv and gate-up are multiplied by fp16
        wide = torch.float16 if quantised else torch.bfloat16
        self.normed = buffer(rows, sizes.width, dtype=wide) if rows > expert.MAX_NORM_ROWS else None
        self.q = buffer(rows, sizes.num_heads, sizes.head_dim)
        self.attended = buffer(rows, sizes.num_heads * sizes.head_dim, dtype=product)
        self.activated = buffer(rows, sizes.mlp_dim, dtype=product)
        slots = model.cache.capacity
        if clusters is None:
            clusters = rows <= CLUSTER_ROWS and native.load().expert_attention_in_clusters(rows, slots)
        self.scratch = None if clusters else expert.attention_scratch(rows, sizes.num_heads, slots, device)

    @torch.inference_mode()
    def repack(self) -> None:
        """The linears' weights as they are now, in the buffers that captured graphs read."""
        for packed in self.layers:
            packed.repack(PackedLayer.of(packed.layer, *self.sizes))

    def ready(self) -> bool:
        """Whether activation scales are in force; until then, and while observing, the model's loop runs."""
        return scales_in_force(linear for packed in self.layers for linear in packed.linears)

    @property
    def range_limit(self) -> None:
        """None: rows of 16 bits hold what the model's own do."""
        return None

    def integrate(self, x: Tensor, guide: Guide | None = None) -> None:
        """`FlowPolicy.integrate` for x: (horizon, action_dim) float32, in place; see `ExpertKernel`."""
        steps = self.model.config.num_steps
        for step in range(steps):
            self._between(x, step, guide)
            for index in range(len(self.layers)):
                self._visit(index, self._style(step), x.shape[0])
        self._between(x, steps, guide)

    def fill_cache(self, state: Tensor) -> None:
        """Keys and values of pi0's state token into the cache, behind the prefix.

        state: (action_dim,) float32, normalised and padded.
        """
        projection = self.model.state_in
        assert isinstance(projection, torch.nn.Linear)
        self._project(state.view(1, -1), self.hidden[:1], (projection.weight.contiguous(), projection.bias))
        last = len(self.layers) - 1
        for index in range(last):
            self._visit(index, self._style(0), 1)
        self._write_kv(last, self._style(0), 1)

    def _style(self, step: int) -> list[Style]:
        return self.styles[step if len(self.styles) > 1 else 0]

    def _between(self, x: Tensor, step: int, guide: Guide | None) -> None:
        """The Euler step that ends step - 1, and the tokens of `step`; only one of them at either end."""
        steps = self.model.config.num_steps
        weight, biases = self.project_in
        bias = biases[step if len(biases) > 1 else 0] if step < steps else None
        project = None if bias is None else (weight, bias)
        following = self.hidden if self.mix is None else self.mixed
        if step == 0:
            assert project is not None
            self._project(x, following, project, silu=self.mix is not None)
        else:
            norm, correction = self._style(step - 1)[-1], None
            if guide is not None:
                time = 1.0 - (step - 1) / steps
                correction = StepGuide(guide.target, guide.weight, guide.gains[step - 1], time)
            expert.action_step(
                x,
                following,
                hidden=self.hidden,
                norm=(norm.scale, norm.shift),
                eps=EPS,
                out=self.project_out,
                dt=-1.0 / steps,
                project=project,
                silu=self.mix is not None,
                guide=correction,
            )
        if self.mix is not None and step < steps:
            expert.skinny_gemm(self.mixed, self.mix[0], Epilogue.STORE, self.hidden, bias=self.mix[1])

    def _project(
        self, x: Tensor, following: Tensor, project: tuple[Tensor, Tensor], silu: bool = False
    ) -> None:
        expert.action_step(
            x,
            following,
            hidden=None,
            norm=None,
            eps=EPS,
            out=self.project_out,
            dt=0.0,
            project=project,
            silu=silu,
        )

    def _slots(self, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, as many as there can be."""
        slots, cache = self.model.prefix_bound + rows, self.model.cache
        return cache.k[index, :slots], cache.v[index, :slots]

    def _input(self, style: Style, rows: int) -> tuple[Tensor, tuple[Tensor, Tensor | None] | None]:
        """What a product reads, and the norm that is still to be applied."""
        norm, hidden = (style.scale, style.shift), self.hidden[:rows]
        if rows <= expert.MAX_NORM_ROWS:
            return hidden, norm
        assert self.normed is not None
        return expert.norm_rows(hidden, norm, EPS, self.normed), None

    def _write_kv(self, index: int, style: list[Style], rows: int) -> None:
        sizes = self.model.config.expert
        k, v = self._slots(index, rows)
        x, norm = self._input(style[2 * index], rows)
        expert.skinny_gemm(
            x,
            self.layers[index].qkv,
            Epilogue.ROPE,
            self.q[:rows],
            norm=norm,
            eps=EPS,
            rope=self.model.rope,
            prefix_length=self.model.prefix_length,
            k_cache=k,
            v_cache=v,
            heads=sizes.num_heads,
            kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
        )

    def _visit(self, index: int, style: list[Style], rows: int) -> None:
        """One layer over the rows of `hidden`, in place."""
        packed, before, after = self.layers[index], style[2 * index], style[2 * index + 1]
        hidden, attended, activated = self.hidden[:rows], self.attended[:rows], self.activated[:rows]
        k, v = self._slots(index, rows)
        self._write_kv(index, style, rows)
        expert.expert_attention(
            self.q[:rows], k, v, self.model.prefix_length, attended, packed.out.input_scale, self.scratch
        )
        expert.skinny_gemm(attended, packed.out, Epilogue.RESIDUAL, hidden, gate=before.gate)
        x, norm = self._input(after, rows)
        scale = packed.down.input_scale
        expert.skinny_gemm(x, packed.gate_up, Epilogue.GEGLU, activated, norm=norm, eps=EPS, out_scale=scale)
        expert.skinny_gemm(activated, packed.down, Epilogue.RESIDUAL, hidden, gate=after.gate)


def attach(model: FlowPolicy, device: torch.device) -> str | None:
    """Give the model the chain where it can be had; else the reason why not, in one line."""
    return attach_expert(model, device, refusal, ExpertChain, (*NOT_SERVED, WRONG_SHAPE))
