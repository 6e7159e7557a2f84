"""The cases that pi0-FAST implementations are run on, and which of their numbers are kept as goldens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from parity_cases import Case
from parity_formula import Weights


@dataclass(frozen=True)
class FastCase(Case):
    """A prompt that LeRobot's BOS follows, and `max_tokens` generated tokens without a stop.

    tied: tokens are scored by their embedding; otherwise by a head of its own.
    """

    policy: str = "pi0fast"
    max_tokens: int = 24
    tied: bool = True

    @property
    def name(self) -> str:
        """Unique and readable."""
        head = "tied" if self.tied else "own"
        return f"{super().name}-{head}{self.max_tokens}"

    def weights(self) -> Weights:
        """Weights by checkpoint key."""
        return Weights(self.policy, self.dims, self.seed, self.tied)

    def prompt(self) -> dict[str, np.ndarray]:
        """images, image_mask, tokens and token_mask of `inputs`."""
        inputs = self.inputs()
        return {name: inputs[name] for name in ("images", "image_mask", "tokens", "token_mask")}


def _cases() -> list[FastCase]:
    """Views, absent views, prompt lengths, padding, both sizes and both heads."""
    texts = ((1, 0), (7, 9), (24, 8), (48, 0), (40, 8), (13, 1), (150, 10))
    masks = {1: ((),), 2: ((), (1,), (0,)), 3: ((), (2,), (1,), (0, 2))}
    cases = []
    for index in range(20):
        views = index % 3 + 1
        text, pad = texts[index % len(texts)]
        cases.append(
            FastCase(
                views=views,
                masked=masks[views][index % len(masks[views])],
                text=text,
                pad=pad,
                gap=index % 4 == 3,
                size="uneven" if index % 5 == 4 else "tiny",
                seed=index + 20,
                max_tokens=(24, 40, 8)[index % 3],
                tied=index % 2 == 0,
            )
        )
    return cases


FAST_CASES = _cases()
FAST_WIDE_CASES = [FastCase(views=2, text=50, pad=14, size="wide", max_tokens=6, seed=1, tied=False)]
FAST_BY_NAME = {case.name: case for case in (*FAST_CASES, *FAST_WIDE_CASES)}
assert len(FAST_BY_NAME) == len(FAST_CASES) + len(FAST_WIDE_CASES)


def fast_golden(tokens: np.ndarray, logits: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept: every token, and the logits of the first, second and last step."""
    return {"tokens": tokens.astype(np.int64), "logits": logits[[0, 1, -1]].astype(np.float32)}
