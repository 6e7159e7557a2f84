"""An untrained pi0-FAST that writes chunks: random weights never would, so its output head is built.

The network is random but for one thing: what its layers add to a token is kept small, so that its final
hidden state is mostly that of the current token. The head can then name each token's successor in a handful
of example chunks. Which chunk is begun is left to what the layers did add, that is to images and prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.architecture import LANGUAGE
from ..checkpoints.tokenizer import FAST_FOLDER
from ..config import PolicyConfig
from .neutral import PROMPT

Floats = NDArray[np.float64]

# what the layers add, kept at a tenth of an embedding or so
QUIET: Mapping[str, float] = {
    f"{LANGUAGE}layers.*.self_attn.o_proj.weight": 0.005,
    f"{LANGUAGE}layers.*.mlp.down_proj.weight": 0.005,
}
FAST_SCALE = 10.0
FAST_VOCABULARY = 640  # room for the processor that is trained here
POOL, CHUNKS = 16, 6
OBSERVATIONS = 6
RIDGE = 0.2
CURIOSITY = 0.05  # weight of what the layers added, in the choice among chunks


def example_chunks(horizon: int, dim: int, seed: int) -> Floats:
    """POOL smooth chunks in model space: three cosines of random size each; (POOL, horizon, dim)."""
    draw = np.random.default_rng(seed)
    time = (np.arange(horizon) + 0.5) / horizon
    waves = np.cos(np.pi * np.arange(3)[:, None] * time)
    size = draw.uniform(0.2, 0.7, (POOL, 3, dim)) * draw.choice([-1.0, 1.0], (POOL, 3, dim))
    chunks: Floats = np.einsum("nwd,wt->ntd", size / np.array([1.0, 2.0, 4.0])[:, None], waves)
    return chunks


@dataclass(frozen=True)
class Script:
    """Successor of each token of the chosen chunks; the tokens that begin one, behind `fork`, which is the
    current token after `steps`.
    """

    successors: Mapping[int, int]
    fork: int
    steps: int
    firsts: tuple[int, ...]


def write_processor(directory: Path, config: PolicyConfig, seed: int) -> None:
    """A FAST processor fitted to the example chunks, whose tokens are long enough to be told apart."""
    from ..processing.fast_tokens import FastProcessor, train_processor

    chunks = example_chunks(config.horizon, config.action_dim, seed)
    for size in range(400, FAST_VOCABULARY + 1, 20):
        train_processor(np.concatenate((chunks, chunks)), directory, FAST_SCALE, size, words=False)
        processor = FastProcessor(directory)
        successors, firsts = _consistent([processor.encode(chunk) for chunk in chunks])
        if len(firsts) == CHUNKS and len(successors) < config.prefix.width:
            return


def _consistent(texts: list[list[int]]) -> tuple[dict[int, int | None], list[int]]:
    """CHUNKS texts in which every token has one successor (None: the end) and which begin differently: the
    successors, and the first tokens.
    """
    successors: dict[int, int | None] = {}
    firsts: list[int] = []
    for text in texts:
        pairs: list[tuple[int, int | None]] = list(zip(text, [*text[1:], None], strict=True))
        wanted = len(firsts) < CHUNKS and len(set(text)) == len(text) and text[0] not in firsts
        if wanted and all(successors.get(token, after) == after for token, after in pairs):
            successors.update(pairs)
            firsts.append(text[0])
    return successors, firsts


def script_of(directory: Path, config: PolicyConfig, seed: int) -> Script:
    """The script of a checkpoint directory that has its tokenizer and processor."""
    import sentencepiece

    from ..processing.fast_tokens import ActionTokens, FastProcessor

    tokenizer = directory / "tokenizer.model"
    tokens = ActionTokens.of(FastProcessor(directory / FAST_FOLDER), tokenizer, config)
    newline = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode("\n")[-1]
    chunks = example_chunks(config.horizon, config.action_dim, seed)
    inner, firsts = _consistent([tokens.processor.encode(chunk) for chunk in chunks])
    chain = [newline, *tokens.lead]
    successors = dict(pairwise(chain))
    for token, after in inner.items():
        successors[tokens.first - token] = tokens.bar if after is None else tokens.first - after
    return Script(successors, chain[-1], len(tokens.lead), tuple(tokens.first - token for token in firsts))


def built_head(
    script: Script,
    embedding: NDArray[np.float32],
    norm: NDArray[np.float32],
    states: Floats | None,
    seed: int,
) -> NDArray[np.float32]:
    """Output head (vocabulary, width): by ridge regression from the hidden state of a token alone to its
    successor.

    states: (n, width) hidden states behind the fork for several observations; without them the first chunk
    is always begun. With them each chunk's row has a random direction of its own, levelled so that at the
    mean of `states` all chunks are equal.
    """
    tokens = [script.fork, *script.successors]
    wide = embedding[tokens].astype(np.float64) * (1.0 + norm.astype(np.float64))
    alone = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    rows = np.linalg.solve(alone @ alone.T + RIDGE * np.eye(len(tokens)), alone)
    head = np.zeros(embedding.shape)
    for token, row in zip(tokens, rows, strict=True):
        for after in script.firsts if token == script.fork else [script.successors[token]]:
            head[after] += row
    if states is not None:
        mean, fork = states.mean(axis=0), rows[0]
        draw = np.random.default_rng(seed)
        for first in script.firsts:
            direction = CURIOSITY * draw.standard_normal(len(mean))
            head[first] += direction - fork * ((head[first] + direction) @ mean) / (fork @ mean) + fork
    return head.astype(np.float32)


def states_behind(directory: Path, script: Script, views: int, state: list[float]) -> Floats:
    """Hidden states (OBSERVATIONS, width) behind the fork, on the CPU: images of noise, one state."""
    from ..loading import load_model
    from ..models import Pi0Fast

    policy = load_model(directory, config="pi0fast", num_views=views, hardware="cpu", precision="fp32")
    try:
        model = policy._model
        assert isinstance(model, Pi0Fast)
        draw = np.random.default_rng(0)
        found = []
        for _ in range(OBSERVATIONS):
            images = [draw.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(views)]
            seen: list[torch.Tensor] = []
            norm = model.paligemma.stack.norm
            hook = norm.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
            policy._eager(model, policy._encode(images, PROMPT, state))
            hook.remove()
            found.append(seen[script.steps][0].double().numpy())
    finally:
        policy.close()
    return np.stack(found)
