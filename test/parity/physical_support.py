"""One observation in physical units through our policy and through the independent pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
from parity_cases import Case
from parity_support import MAX_ABS, config_of, write_checkpoint
from physical import Robot, model_inputs, physical_actions, spread

import flashrt_runtime
from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.parity.reference import ReferencePolicy
from flashrt_runtime.parity.stages import Inputs

VOCABULARY = 512
CASES = {policy: Case(policy, views=2, horizon=10, steps=4, seed=5) for policy in ("pi05", "pi0")}
PROMPT = " pick_up the red block\nand place it in the basket"


def _stats(generator: np.random.Generator, width: int) -> dict[str, np.ndarray]:
    """Quantiles that are not mean -+ 2 std, so that one mode cannot pass for the other."""
    mean = generator.uniform(-0.5, 0.5, width)
    std = generator.uniform(0.2, 0.6, width)
    return {
        "mean": mean,
        "std": std,
        "q01": mean - std * generator.uniform(1.2, 1.6, width),
        "q99": mean + std * generator.uniform(1.8, 2.4, width),
    }


@cache
def robot() -> Robot:
    """A robot with 8 state and 7 action dimensions."""
    generator = np.random.default_rng(11)
    return Robot(_stats(generator, 8), _stats(generator, 7))


@cache
def tokenizer() -> bytes:
    """A small SentencePiece model."""
    return train_tokenizer(VOCABULARY)


@dataclass(frozen=True)
class Observation:
    """Pixels of two differently shaped cameras, joint values beyond their statistics, a sentence to clean.

    The larger side of each image is the model's image size: padded, but not resampled.
    """

    images: list[np.ndarray]
    state: np.ndarray
    prompt: str
    noise: np.ndarray


@cache
def observation() -> Observation:
    """Coloured gradients: channel order, view order and padding show."""
    generator = np.random.default_rng(12)
    images = []
    for height, width in ((56, 40), (42, 56)):
        colour = generator.integers(0, 256, 3)
        ramp = np.linspace(0, 1, height * width).reshape(height, width, 1) * colour
        images.append((0.7 * ramp + generator.integers(0, 77, (height, width, 3))).astype(np.uint8))
    stats = robot().state
    state = generator.uniform(stats["q01"], stats["q99"])
    state[0] = stats["q01"][0] - 0.3  # below the first bin
    state[1] = stats["q99"][1] + 0.3  # above the last
    noise = generator.standard_normal((10, 32), dtype=np.float32)
    return Observation(images, state.astype(np.float32), PROMPT, noise)


def write_robot_checkpoint(policy: str, folder: Path) -> None:
    """A checkpoint with statistics and tokenizer."""
    write_checkpoint(CASES[policy], folder)
    (folder / "assets" / "robot").mkdir(parents=True, exist_ok=True)
    (folder / "assets" / "robot" / "norm_stats.json").write_text(json.dumps(robot().norm_stats()))
    (folder / "tokenizer.model").write_bytes(tokenizer())


def predict(policy: str, folder: Path, seen: Observation) -> np.ndarray:
    """Our policy's actions in the robot's units."""
    case = CASES[policy]
    loaded = flashrt_runtime.load_model(
        folder, config="auto", hardware="cpu", precision="fp32", num_views=case.views, num_steps=case.steps
    )
    try:
        return loaded.predict(seen.images, seen.prompt, seen.state, noise=seen.noise)
    finally:
        loaded.close()


@cache
def expected(policy: str) -> np.ndarray:
    """The independent pipeline's actions in the robot's units, for `observation()`."""
    case, seen = CASES[policy], observation()
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer())
    size = case.dims["vision"]["image_size"]
    inputs = model_inputs(
        seen.images,
        seen.prompt,
        seen.state,
        seen.noise,
        robot=robot(),
        policy=policy,
        size=size,
        processor=processor,
    )
    model = ReferencePolicy(config_of(case), case.weights())
    return physical_actions(model.run(Inputs(**inputs)).actions, robot(), policy)


def check_physical(policy: str, actions: np.ndarray) -> None:
    """Max-abs in model-space units of each dimension, and no sign flip of what is not small."""
    theirs = expected(policy)
    assert actions.shape == theirs.shape
    unit = spread(robot().actions, policy)
    drift = (np.abs(actions - theirs) / unit).max(axis=0)
    assert drift.max() <= MAX_ABS[policy], (
        f"dimension {int(drift.argmax())}: max-abs {drift.max():.2e} > {MAX_ABS[policy]:.0e} of its spread"
    )
    flips = (np.abs(theirs) > 0.05) & (np.sign(actions) != np.sign(theirs))
    assert not flips.any(), f"signs differ at (action, dimension) {np.argwhere(flips)[:5].tolist()}"
