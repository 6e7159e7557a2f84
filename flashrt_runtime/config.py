"""Dimensions and family rules of a policy: every number the model needs, no tensors.

Published dimensions: PaliGemma (arXiv:2407.07726), pi0 (arXiv:2410.24164), pi0.5 (arXiv:2504.16054).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

PolicyName = Literal["pi05", "pi0", "pi0fast"]
NormalizationMode = Literal["quantile", "quantile10", "mean_std", "min_max", "identity"]

PATCH_SIZE = 14


@dataclass(frozen=True)
class GemmaConfig:
    """One Gemma stack (prefix language model or action expert)."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class SiglipConfig:
    """The SigLIP vision tower; patches are 14x14 pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    image_size: int

    @property
    def tokens(self) -> int:
        """Tokens per view."""
        return (self.image_size // PATCH_SIZE) ** 2


@dataclass(frozen=True)
class DecodeConfig:
    """How pi0-FAST generates; nothing to the other policies.

    skip_ids: ids at the vocabulary's end that no action token takes; temperature: 0 is greedy; tied_head:
    tokens are scored by the embedding.
    """

    skip_ids: int = 128
    temperature: float = 0.0
    tied_head: bool = True


NO_DECODING = DecodeConfig()


@dataclass(frozen=True)
class PolicyConfig:
    """A policy's dimensions.

    expert: the stack that makes the actions, pi0-FAST's own language model. action_dim is the model's padded
    width (32), in pi0-FAST the robot's; the robot's own width follows from the statistics.
    """

    policy: PolicyName
    vision: SiglipConfig
    prefix: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    horizon: int
    prompt_capacity: int
    action_dim: int = 32
    num_steps: int = 10
    decode: DecodeConfig = NO_DECODING

    def with_steps(self, num_steps: int | None) -> PolicyConfig:
        """The same policy with another number of denoise steps; None keeps it."""
        return self if num_steps is None else replace(self, num_steps=num_steps)


@dataclass(frozen=True)
class FamilyRules:
    """What differs between checkpoints of openpi and of LeRobot; one named rule each.

    quantile_eps is added to q99 - q01; std_eps to std going in, std_eps_inverse coming back;
    zero_range_eps replaces a range that is exactly zero.
    accumulate_time: the flow's time is 1 - 1/N - 1/N ... in float32, in place of 1 - k/N rounded once.
    pi0-FAST only: show_absent_views as black images, where others mask them; lowercase the prompt;
    end_with_bos appends a BOS to it; skip_position leaves one position free between the prompt and what is
    generated, all but the first token of it.
    """

    family: Literal["openpi", "lerobot"]
    state_mode: NormalizationMode
    action_mode: NormalizationMode
    quantile_eps: float
    std_eps: float
    std_eps_inverse: float
    zero_range_eps: float
    resize: Literal["antialias_uint8", "bilinear_float"]
    clean_underscores: bool
    state_in_prompt: bool
    rope_bf16: bool = False
    accumulate_time: bool = False
    show_absent_views: bool = False
    lowercase: bool = False
    end_with_bos: bool = False
    skip_position: bool = False


GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)
SIGLIP_SO400M = SiglipConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16, image_size=224)

PALIGEMMA_VOCAB_SIZE = 257152
PROMPT_CAPACITY: dict[PolicyName, int] = {"pi05": 200, "pi0": 48, "pi0fast": 250}
