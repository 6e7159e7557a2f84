"""What is compared: one observation's inputs, and what a model computed on the way to its actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..config import PolicyConfig
from ..errors import ObservationError

AnyFloat = NDArray[np.floating]


@dataclass(frozen=True)
class Inputs:
    """One observation in model space, as `sample_actions` takes it.

    images: float32 (views, 3, H, W) in [-1, 1]; image_mask: bool (views,); tokens: int64 (L,);
    token_mask: bool (L,); state: float32 (action_dim,), normalised and padded;
    noise: float32 (horizon, action_dim).
    """

    images: NDArray[np.float32]
    image_mask: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    token_mask: NDArray[np.bool_]
    state: NDArray[np.float32]
    noise: NDArray[np.float32]

    def check(self, config: PolicyConfig) -> None:
        """Raise ObservationError when a shape does not fit `config`, nothing is valid, or the prompt is too
        long.
        """
        size = config.vision.image_size
        if self.tokens.ndim != 1 or not len(self.images):
            raise ObservationError(
                "expected tokens of shape (L,) and one image or more, got tokens of shape "
                f"{self.tokens.shape} and images of shape {self.images.shape}"
            )
        expected = {
            "images": (len(self.images), 3, size, size),
            "image_mask": (len(self.images),),
            "token_mask": self.tokens.shape,
            "state": (config.action_dim,),
            "noise": (config.horizon, config.action_dim),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ObservationError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")
        if not (self.image_mask.any() or self.token_mask.any()):
            raise ObservationError("every view and every token is masked: there is nothing to attend to")
        if (length := int(self.token_mask.sum())) > config.prompt_capacity:
            raise ObservationError(
                f"tokens: {config.policy} has room for {config.prompt_capacity}, got {length}: shorten the "
                "prompt"
            )
        out_of_range = self.tokens[(self.tokens < 0) | (self.tokens >= config.vocab_size)]
        if out_of_range.size:
            raise ObservationError(f"tokens must lie in [0, {config.vocab_size}), got {out_of_range[0]}")

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Every input by name, to be written to a file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


@dataclass(frozen=True)
class Stages:
    """What a policy computed on the way. P = views * tokens a view + L, padding and masked views included.

    vision: (views, tokens, vision width), the image encoder after its final norm, before the projector.
    valid: bool (P,), positions that are attended to; rows of the prefix arrays elsewhere mean nothing.
    prefix_embeddings: (P, prefix width), input of the language model's first layer.
    keys, values: (depth, P, kv_heads, head_dim), as cached for the expert: keys after RoPE.
    velocities: (steps, horizon, action_dim), the flow field at t = 1, 1 - 1/N, …
    actions: (horizon, action_dim).
    """

    vision: AnyFloat
    valid: NDArray[np.bool_]
    prefix_embeddings: AnyFloat
    keys: AnyFloat
    values: AnyFloat
    velocities: AnyFloat
    actions: AnyFloat

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Every stage by name, to be written to a file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Stages:
        """The stages in an opened .npz file. Raises KeyError for a missing one."""
        return cls(**{entry.name: arrays[entry.name] for entry in fields(cls)})  # type: ignore[arg-type]


def random_inputs(config: PolicyConfig, views: int, tokens: int, seed: int = 0) -> Inputs:
    """Inputs drawn from `seed`: uniform pixels and state, normal noise, a prompt of `tokens` valid tokens."""
    generator = np.random.default_rng(seed)
    size = config.vision.image_size
    return Inputs(
        images=generator.uniform(-1, 1, (views, 3, size, size)).astype(np.float32),
        image_mask=np.ones(views, dtype=np.bool_),
        tokens=generator.integers(3, config.vocab_size, tokens).astype(np.int64),
        token_mask=np.ones(tokens, dtype=np.bool_),
        state=generator.uniform(-1, 1, config.action_dim).astype(np.float32),
        noise=generator.standard_normal((config.horizon, config.action_dim), dtype=np.float32),
    )
