"""What a freshly drawn policy answers to an observation of nothing in particular.

A random network's output is mostly a constant of its weights. Taking it as the middle of the action
statistics makes the robot move around its home pose, whatever the seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PROMPT = "pick up the red block"


def neutral_actions(directory: Path, state: list[float], steps: int) -> NDArray[np.float64]:
    """Mean model-space action (model width,) over the first `steps` of a chunk, on the CPU in float32.

    Observed are images of noise, `state` in the robot's units and a fixed prompt; the flow starts from zero,
    the mean of its noise.
    """
    from ..checkpoints.reader import open_checkpoint
    from ..loading import load_model
    from ..processing.prompt import PromptEncoder
    from ..processing.state import StateTransform

    with open_checkpoint(directory) as checkpoint:
        stats, views = checkpoint.norm_stats, checkpoint.views or ()
        assert checkpoint.tokenizer is not None
        assert stats is not None
        assert stats.state is not None
        rules, config = checkpoint.rules, checkpoint.config
        transform = StateTransform(stats.state, rules, len(state))
        normalized = transform.normalize(np.asarray(state, np.float32))
        encoder = PromptEncoder(checkpoint.tokenizer, config.policy, rules, config.prompt_capacity)
        tokens = encoder.encode(PROMPT, normalized)
    policy = load_model(directory, config="auto", num_views=len(views), hardware="cpu", precision="fp32")
    try:
        size = config.vision.image_size
        images = np.random.default_rng(0).uniform(-1, 1, (len(views), 3, size, size)).astype(np.float32)
        actions = policy.sample_actions(
            images,
            np.ones(len(views), dtype=np.bool_),
            tokens,
            np.ones(len(tokens), dtype=np.bool_),
            transform.pad(normalized, config.action_dim),
            np.zeros((config.horizon, config.action_dim), np.float32),
        )
    finally:
        policy.close()
    mean: NDArray[np.float64] = actions[:steps].astype(np.float64).mean(axis=0)
    return mean
