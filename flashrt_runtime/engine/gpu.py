"""What is known of a GPU before anything runs on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops import native


@dataclass(frozen=True)
class Gpu:
    """shared_bytes: of a multiprocessor; no_kernels: why ours cannot be used there, None: they can."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    no_kernels: str | None = None

    @classmethod
    def of(cls, device: torch.device) -> Gpu | None:
        """That of a device; None for the CPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.name,
            native.capability(device),
            found.multi_processor_count,
            found.shared_memory_per_multiprocessor,
            native.unavailable_reason(),
        )
