"""Pi0 and Pi0.5 in float64 NumPy, from the papers: the yardstick for the torch model.

pi0: arXiv:2410.24164; pi0.5: arXiv:2504.16054; PaliGemma: arXiv:2407.07726; SigLIP: arXiv:2303.15343.
Clarity before speed: no cache of converted weights except the expert's, padding is masked and never dropped,
one attention head at a time. A reduced model takes milliseconds, a full-size one minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..config import PATCH_SIZE, GemmaConfig, PolicyConfig
from . import reference_maths as maths
from .reference_maths import Array, Mask
from .stages import Inputs, Stages

PALIGEMMA = "paligemma_with_expert.paligemma.model."
VISION = PALIGEMMA + "vision_tower.vision_model."
PROJECTOR = PALIGEMMA + "multi_modal_projector.linear"
LANGUAGE = PALIGEMMA + "language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."


class ReferencePolicy:
    """A Pi0 or Pi0.5 policy whose every operation is float64.

    tensor: returns a checkpoint tensor of any float dtype by its openpi PyTorch key (the token embedding as
    `…language_model.embed_tokens.weight`); it should raise KeyError for an unknown key.
    rope_bf16: round the RoPE frequencies to bfloat16, which is what fine-tuning in torch bfloat16 sees.
    angles_fp32: round to float32 what published implementations hold in float32 and then feed to sin and cos:
    t = 1 - i/N (the fastest component turns 1571 rad per unit of t) and position * RoPE frequency. Both show
    at 1e-6 to 1e-5 of the result; False computes the equations as written.
    accumulate_time: add -1/N to t in float32 at every step, as openpi does and LeRobot does not.
    """

    def __init__(
        self,
        config: PolicyConfig,
        tensor: Callable[[str], NDArray[np.generic]],
        *,
        rope_bf16: bool = False,
        angles_fp32: bool = True,
        accumulate_time: bool = False,
    ) -> None:
        self.config = config
        self.angles_fp32 = angles_fp32
        self.accumulate_time = accumulate_time
        self._read = tensor
        self._expert_cache: dict[str, Array] = {}
        self.rope_bf16 = rope_bf16

    def run(self, inputs: Inputs) -> Stages:
        """All stages for one observation. Raises ObservationError when a shape does not fit."""
        inputs.check(self.config)
        vision = self.vision_tower(inputs.images)
        embeddings, valid = self.embed_prefix(vision, inputs)
        keys, values = self.prefix_cache(embeddings, valid)
        sample, state = inputs.noise.astype(np.float64), inputs.state.astype(np.float64)
        velocities = []
        for time in self.timesteps():
            velocities.append(self.velocity(sample, time, state, keys, values, valid))
            sample = sample - velocities[-1] / self.config.num_steps
        return Stages(vision, valid, embeddings, keys, values, np.stack(velocities), sample)

    def timesteps(self) -> Iterator[float]:
        """t = 1, 1 - 1/N, …, 1/N."""
        steps = self.config.num_steps
        if self.accumulate_time:
            yield from np.cumsum([1.0] + [-1.0 / steps] * (steps - 1), dtype=np.float32).tolist()
            return
        for step in range(steps):
            time = 1.0 - step / steps
            yield float(np.float32(time)) if self.angles_fp32 else time

    def vision_tower(self, images: NDArray[np.floating]) -> Array:
        """SigLIP with its final norm: (views, 3, H, W) in [-1, 1] → (views, tokens, vision width)."""
        key = VISION + "embeddings."
        kernel = self._weight(key + "patch_embedding.weight")
        x = maths.linear(
            maths.patches(images.astype(np.float64), PATCH_SIZE),
            kernel.reshape(kernel.shape[0], -1),
            self._weight(key + "patch_embedding.bias"),
        )
        x = x + self._weight(key + "position_embedding.weight")
        for layer in range(self.config.vision.depth):
            x = self._vision_layer(x, f"{VISION}encoder.layers.{layer}.")
        return self._layer_norm(x, VISION + "post_layernorm")

    def embed_prefix(self, vision: Array, inputs: Inputs) -> tuple[Array, Mask]:
        """Projected image tokens, then text embeddings times sqrt(width); and which rows are valid."""
        views, tokens, _ = vision.shape
        width = self.config.prefix.width
        projected = self._affine(vision, PROJECTOR).reshape(views * tokens, width)
        table = self._read(LANGUAGE + "embed_tokens.weight")
        text = np.asarray(table[inputs.tokens], dtype=np.float64) * np.sqrt(width)
        valid = np.concatenate([np.repeat(inputs.image_mask, tokens), inputs.token_mask])
        return np.concatenate([projected, text]), valid

    def prefix_cache(self, embeddings: Array, valid: Mask) -> tuple[Array, Array]:
        """Keys (after RoPE) and values of every layer, each (depth, P, kv_heads, head_dim)."""
        config = self.config.prefix
        positions = (np.cumsum(valid) - 1).astype(np.float64)
        visible = np.broadcast_to(valid, (len(valid), len(valid)))
        x, keys, values = embeddings, [], []
        for layer in range(config.depth):
            root = f"{LANGUAGE}layers.{layer}."
            h = maths.rms_norm(x, self._weight(root + "input_layernorm.weight"))
            query, key, value = self._query_key_value(h, root, config, positions)
            keys.append(key)
            values.append(value)
            mixed = maths.attention(query, key, value, visible)
            x = x + maths.linear(mixed, self._weight(root + "self_attn.o_proj.weight"))
            h = maths.rms_norm(x, self._weight(root + "post_attention_layernorm.weight"))
            x = x + self._gated_mlp(h, root)
        return np.stack(keys), np.stack(values)

    def velocity(
        self, sample: Array, time: float, state: Array, keys: Array, values: Array, valid: Mask
    ) -> Array:
        """The flow field at (sample, time): (horizon, action_dim), given the prefix's keys and values."""
        config = self.config.expert
        x, condition = self._embed_suffix(sample, time, state)
        rows = len(x)
        positions = valid.sum() + np.arange(rows, dtype=np.float64)
        prefix_visible = np.broadcast_to(valid, (rows, len(valid)))
        visible = np.concatenate([prefix_visible, self._suffix_visibility(rows)], axis=1)
        for layer in range(config.depth):
            root = f"{EXPERT}layers.{layer}."
            h, gate = self._expert_norm(x, root + "input_layernorm", condition)
            query, key, value = self._query_key_value(h, root, config, positions)
            mixed = maths.attention(
                query, np.concatenate([keys[layer], key]), np.concatenate([values[layer], value]), visible
            )
            x = x + gate * maths.linear(mixed, self._weight(root + "self_attn.o_proj.weight"))
            h, gate = self._expert_norm(x, root + "post_attention_layernorm", condition)
            x = x + gate * self._gated_mlp(h, root)
        x, _ = self._expert_norm(x, EXPERT + "norm", condition)
        return self._affine(x[rows - self.config.horizon :], "action_out_proj")

    def _embed_suffix(self, sample: Array, time: float, state: Array) -> tuple[Array, Array | None]:
        """The expert's input tokens and, for pi0.5, the condition vector of its norms."""
        moment = maths.timestep_embedding(time, self.config.expert.width)
        actions = self._affine(sample, "action_in_proj")
        if self.config.policy == "pi05":
            hidden = maths.silu(self._affine(moment, "time_mlp_in"))
            return actions, maths.silu(self._affine(hidden, "time_mlp_out"))
        joined = np.concatenate([actions, np.broadcast_to(moment, actions.shape)], axis=1)
        hidden = maths.silu(self._affine(joined, "action_time_mlp_in"))
        actions = self._affine(hidden, "action_time_mlp_out")
        return np.concatenate([self._affine(state, "state_proj")[None], actions]), None

    def _suffix_visibility(self, rows: int) -> Mask:
        """Who sees whom inside the suffix: everyone everyone, but pi0's state token (row 0) only itself."""
        visible = np.ones((rows, rows), dtype=np.bool_)
        if self.config.policy == "pi0":
            visible[0, 1:] = False
        return visible

    def _expert_norm(self, x: Array, key: str, condition: Array | None) -> tuple[Array, Array | float]:
        """The expert's norm and the gate of the residual branch that follows it (1 without a condition)."""
        if condition is None:
            return maths.rms_norm(x, self._weight(key + ".weight")), 1.0
        weight, bias = self._weight(key + ".dense.weight"), self._weight(key + ".dense.bias")
        return maths.adaptive_rms_norm(x, condition, weight, bias)

    def _query_key_value(
        self, x: Array, root: str, config: GemmaConfig, positions: Array
    ) -> tuple[Array, Array, Array]:
        """Projections split into heads, rotated where RoPE applies: (n, heads, d), (n, kv, d), (n, kv, d)."""

        def heads(name: str, count: int) -> Array:
            projected = maths.linear(x, self._weight(f"{root}self_attn.{name}.weight"))
            return projected.reshape(len(x), count, config.head_dim)

        angles = maths.rope_angles(positions, config.head_dim, bf16=self.rope_bf16, fp32=self.angles_fp32)
        query = maths.rope(heads("q_proj", config.num_heads), angles)
        key = maths.rope(heads("k_proj", config.num_kv_heads), angles)
        return query, key, heads("v_proj", config.num_kv_heads)

    def _gated_mlp(self, x: Array, root: str) -> Array:
        """GeGLU (arXiv:2002.05202): down(gelu(gate x) * (up x))."""
        gate = maths.gelu_tanh(maths.linear(x, self._weight(root + "mlp.gate_proj.weight")))
        up = maths.linear(x, self._weight(root + "mlp.up_proj.weight"))
        return maths.linear(gate * up, self._weight(root + "mlp.down_proj.weight"))

    def _vision_layer(self, x: Array, root: str) -> Array:
        """One pre-norm encoder layer of SigLIP over (views, tokens, width)."""
        views, tokens, width = x.shape
        heads = self.config.vision.num_heads
        h = self._layer_norm(x, root + "layer_norm1")
        query, key, value = (
            self._affine(h, f"{root}self_attn.{name}").reshape(views, tokens, heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        everything = np.ones((tokens, tokens), dtype=np.bool_)
        mixed = np.stack([maths.attention(query[i], key[i], value[i], everything) for i in range(views)])
        x = x + self._affine(mixed, root + "self_attn.out_proj")
        hidden = maths.gelu_tanh(self._affine(self._layer_norm(x, root + "layer_norm2"), root + "mlp.fc1"))
        return x + self._affine(hidden, root + "mlp.fc2")

    def _layer_norm(self, x: Array, key: str) -> Array:
        return maths.layer_norm(x, self._weight(key + ".weight"), self._weight(key + ".bias"))

    def _affine(self, x: Array, key: str) -> Array:
        return maths.linear(x, self._weight(key + ".weight"), self._weight(key + ".bias"))

    def _weight(self, key: str) -> Array:
        """A checkpoint tensor in float64; only tensors used at every denoise step are kept."""
        if key in self._expert_cache:
            return self._expert_cache[key]
        value = np.asarray(self._read(key), dtype=np.float64)
        if not key.startswith(PALIGEMMA):
            self._expert_cache[key] = value
        return value
