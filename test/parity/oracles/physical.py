"""From pixels, joint values and a sentence to model space and back, by openpi's rules, with other libraries.

Written from the specification: Pillow resizes, SentencePiece tokenises, the rest is a few lines of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import sentencepiece
from PIL import Image


@dataclass(frozen=True)
class Robot:
    """A robot's statistics: per feature mean, std, q01 and q99, float64 (width,)."""

    state: dict[str, np.ndarray]
    actions: dict[str, np.ndarray]

    @property
    def dof(self) -> int:
        """Width of the actions."""
        return len(self.actions["mean"])

    def norm_stats(self) -> dict:
        """The content of openpi's norm_stats.json."""
        parts = {"state": self.state, "actions": self.actions}
        lists = {part: {name: list(value) for name, value in stats.items()} for part, stats in parts.items()}
        return {"norm_stats": lists}


def model_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (3, size, size) float32 in [-1, 1]: scaled to fit, centred on black."""
    height, width = image.shape[:2]
    ratio = max(width, height) / size
    fitted = (int(width / ratio), int(height / ratio))
    scaled = Image.fromarray(image).resize(fitted, Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (size, size))
    canvas.paste(scaled, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return (np.asarray(canvas, dtype=np.float64) / 127.5 - 1.0).astype(np.float32).transpose(2, 0, 1)


def normalise(values: np.ndarray, stats: dict[str, np.ndarray], policy: str) -> np.ndarray:
    """Quantiles for pi0.5, mean and standard deviation for pi0."""
    if policy == "pi0":
        return (values - stats["mean"]) / (stats["std"] + 1e-6)
    return 2.0 * (values - stats["q01"]) / (stats["q99"] - stats["q01"] + 1e-6) - 1.0


def spread(stats: dict[str, np.ndarray], policy: str) -> np.ndarray:
    """Physical units per unit of model space."""
    return stats["std"] + 1e-6 if policy == "pi0" else (stats["q99"] - stats["q01"] + 1e-6) / 2.0


def physical_actions(actions: np.ndarray, robot: Robot, policy: str) -> np.ndarray:
    """(horizon, 32) in model space -> (horizon, dof) in the robot's units, never clipped."""
    stats, used = robot.actions, actions[:, : robot.dof].astype(np.float64)
    if policy == "pi0":
        return used * spread(stats, policy) + stats["mean"]
    return (used + 1.0) * spread(stats, policy) + stats["q01"]


def prompt_tokens(
    processor: sentencepiece.SentencePieceProcessor, policy: str, prompt: str, state: np.ndarray
) -> np.ndarray:
    """BOS and the text; pi0.5 reads the state as 256 bins over [-1, 1), -1 below, 255 above."""
    text = " ".join(prompt.strip().replace("_", " ").split("\n"))
    if policy == "pi0":
        ids = processor.encode(text) + processor.encode("\n")
    else:
        bins = np.clip(np.floor((state + 1.0) * 128.0), -1, 255).astype(int)
        digits = " ".join(str(value) for value in bins)
        ids = processor.encode(f"Task: {text}, State: {digits};\nAction: ")
    return np.array([processor.bos_id(), *ids], dtype=np.int64)


def model_inputs(
    images: list[np.ndarray],
    prompt: str,
    state: np.ndarray,
    noise: np.ndarray,
    *,
    robot: Robot,
    policy: str,
    size: int,
    processor: sentencepiece.SentencePieceProcessor,
) -> dict[str, np.ndarray]:
    """One observation in physical units -> model-space inputs, by the names of `sample_actions`."""
    normalised = normalise(state.astype(np.float64), robot.state, policy)
    tokens = prompt_tokens(processor, policy, prompt, normalised)
    padded = np.zeros(32, dtype=np.float32)
    padded[: len(normalised)] = normalised
    return {
        "images": np.stack([model_image(image, size) for image in images]),
        "image_mask": np.ones(len(images), dtype=bool),
        "tokens": tokens,
        "token_mask": np.ones(len(tokens), dtype=bool),
        "state": padded,
        "noise": noise,
    }
