"""The cases that every implementation is run on, and which of their numbers are kept as goldens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from parity_formula import SIZES, Weights, uniform

ROW_STRIDE = 5


@dataclass(frozen=True)
class Case:
    """One observation and one set of weights.

    masked: views that are absent; text: valid tokens; pad: padding tokens after them; gap: a masked token in
    the middle of the prompt too; seed: of the weights and of the inputs.
    """

    policy: str
    views: int = 2
    masked: tuple[int, ...] = ()
    text: int = 24
    pad: int = 8
    gap: bool = False
    horizon: int = 10
    steps: int = 10
    size: str = "tiny"
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique and readable."""
        parts = [self.policy, self.size, f"v{self.views}"]
        parts += [f"m{''.join(map(str, self.masked))}"] if self.masked else []
        parts += [f"t{self.text}+{self.pad}{'g' if self.gap else ''}", f"h{self.horizon}", f"n{self.steps}"]
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def dims(self) -> dict:
        """Dimensions of the model."""
        return SIZES[self.size]

    def weights(self) -> Weights:
        """Weights by checkpoint key."""
        return Weights(self.policy, self.dims, self.seed)

    def inputs(self) -> dict[str, np.ndarray]:
        """Model-space inputs, named as in `flashrt_runtime.parity.stages.Inputs`."""
        pixels, vocabulary = self.dims["vision"]["image_size"], self.dims["vocab_size"]
        length = self.text + self.pad
        shape = (self.views, 3, pixels, pixels)
        token_mask = np.arange(length) < self.text
        if self.gap:
            token_mask[self.text // 2] = False
        image_mask = np.ones(self.views, dtype=bool)
        image_mask[list(self.masked)] = False
        # padding holds token ids other than 0 and absent views hold pixels: a mask that is not applied shows
        return {
            "images": self._draw("images", shape, -1.0, 1.0),
            "image_mask": image_mask,
            "tokens": 3 + np.floor(uniform("tokens", length, self.seed) * (vocabulary - 3)).astype(np.int64),
            "token_mask": token_mask,
            "state": self._draw("state", (32,), -1.0, 1.0),
            "noise": self._normal("noise", (self.horizon, 32)),
        }

    def valid(self) -> np.ndarray:
        """Which prefix positions are attended to: bool (views * tokens a view + text + pad,)."""
        inputs = self.inputs()
        patches = (self.dims["vision"]["image_size"] // 14) ** 2
        return np.concatenate([np.repeat(inputs["image_mask"], patches), inputs["token_mask"]])

    def kept_rows(self) -> np.ndarray:
        """The prefix positions that are kept: every fifth valid one and the last."""
        rows = np.flatnonzero(self.valid())
        return np.union1d(rows[::ROW_STRIDE], rows[-1:])

    def _draw(self, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
        values = uniform(name, math.prod(shape), self.seed).reshape(shape)
        return (low + (high - low) * values).astype(np.float32)

    def _normal(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Twelve uniform values less six: nearly normal, variance 1, exact arithmetic."""
        values = uniform(name, 12 * math.prod(shape), self.seed).reshape(12, *shape)
        return (values.sum(axis=0) - 6.0).astype(np.float32)


def golden(case: Case, stages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is kept of a case's stages: actions and v at t = 1 whole, prefix arrays at `kept_rows`."""
    rows = case.kept_rows()
    kept = {
        "actions": stages["actions"],
        "velocity": stages["velocities"][0],
        "prefix_embeddings": stages["prefix_embeddings"][rows],
        "keys": stages["keys"][:, rows],
        "values": stages["values"][:, rows],
    }
    return {name: np.asarray(value, dtype=np.float32) for name, value in kept.items()}


def _grid(policy: str) -> list[Case]:
    """Views x steps x horizon; prompt length, padding, masked views and weights change along the way."""
    texts = ((1, 0), (7, 9), (24, 8), (48, 0), (40, 8), (13, 1))
    masks = {1: ((),), 2: ((), (1,), (0,)), 3: ((), (2,), (1,), (0, 2))}
    cases = []
    for views in (1, 2, 3):
        for steps in (1, 4, 10):
            for horizon in (10, 50):
                index = len(cases)
                text, pad = texts[(index + index // 6) % len(texts)]
                masked = masks[views][index % len(masks[views])]
                cases.append(
                    Case(policy, views, masked, text, pad, index % 4 == 3, horizon, steps, "tiny", index % 3)
                )
    return cases


def _special(policy: str) -> list[Case]:
    """Corners that the grid does not reach."""
    return [
        Case(policy, text=0, pad=6),
        Case(policy, views=1, text=199 if policy == "pi05" else 47, pad=1, horizon=50, seed=3),
        Case(policy, views=3, masked=(0, 1), text=20, pad=12, gap=True, seed=4),
        Case(policy, size="uneven", views=2, text=17, pad=3, horizon=10, seed=1),
        Case(
            policy, size="uneven", views=3, masked=(1,), text=30, pad=5, gap=True, horizon=15, steps=4, seed=2
        ),
    ]


CASES = [case for policy in ("pi05", "pi0") for case in (*_grid(policy), *_special(policy))]
WIDE_CASES = [
    Case("pi05", views=2, text=50, pad=14, horizon=10, steps=4, size="wide"),
    Case("pi0", views=2, masked=(1,), text=20, pad=28, horizon=50, steps=4, size="wide", seed=1),
]
SAVED_CASES = [Case(policy, text=20, steps=4, seed=6) for policy in ("pi05", "pi0")]
BY_NAME = {case.name: case for case in (*CASES, *WIDE_CASES, *SAVED_CASES)}
assert len(BY_NAME) == len(CASES) + len(WIDE_CASES) + len(SAVED_CASES)
