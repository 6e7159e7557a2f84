"""Rotary position embedding tables (arXiv:2104.09864) and the flow-time embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THETA = 10_000.0


def rope_tables(
    positions: int, head_dim: int, device: torch.device, bf16_frequencies: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), each (positions, head_dim / 2) float32.

    bf16_frequencies rounds the inverse frequencies as torch references do in bf16: only for checkpoints
    that were fine-tuned that way (it is off by a radian at position 712).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / (THETA**exponent)
    if bf16_frequencies:
        inverse = inverse.to(torch.bfloat16).float()
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * inverse
    return angle.cos().to(device), angle.sin().to(device)


def time_embedding(time: float, width: int, min_period: float = 4e-3, max_period: float = 4.0) -> Tensor:
    """sin ‖ cos of 2*pi*time / period over log-spaced periods: (width,) float32.

    time in [0, 1]; rounded to float32 once, as every published implementation stores it (the fastest
    component turns 1571 rad per unit of t, so the rounding shows); the rest is float64. Source: pi0,
    appendix B.
    """
    time = torch.tensor(time, dtype=torch.float32).item()
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2.0 * math.pi * time / period
    return torch.cat((angle.sin(), angle.cos())).float()
