"""What is known of a GPU before anything runs on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops import native

# the kernels are not this GPU's, or it cannot hold a whole grid at once
NOT_SERVED = ("cudaErrorNotSupported", "cudaErrorCooperativeLaunchTooLarge")
WRONG_SHAPE = "cudaErrorInvalidValue"  # such as one that no block's shared memory holds


def refused(
    run: Callable[[], object], device: torch.device, codes: tuple[str, ...] = NOT_SERVED
) -> str | None:
    """Run kernels once: None where they serve, else what a launcher said. Any other error is raised."""
    try:
        run()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if not any(code in str(error) for code in codes):
            raise
        return str(error)
    return None


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
