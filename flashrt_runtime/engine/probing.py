"""Running kernels once, to see whether a GPU serves them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import PolicyConfig
from ..models import FlowPolicy, Pi0, Pi05
from ..models.flow import ExpertKernel
from .gpu import Gpu

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


def attach_expert(
    model: FlowPolicy,
    device: torch.device,
    refusal: Callable[[PolicyConfig, torch.dtype, Gpu | None], str | None],
    make: Callable[[Pi0 | Pi05, torch.device], ExpertKernel],
    codes: tuple[str, ...] = NOT_SERVED,
) -> str | None:
    """Give the model kernels for its expert where they can be had; else the reason why not, in one line.

    refusal: what is known before their launch; codes: of a launcher that refuses.
    """
    reason = refusal(model.config, model.dtype, Gpu.of(device))
    if reason is not None:
        return reason
    assert isinstance(model, Pi0 | Pi05)
    kernel = make(model, device)
    actions = torch.zeros(model.config.horizon, model.config.action_dim, device=device)
    reason = refused(lambda: kernel.integrate(actions), device, codes)
    if reason is None:
        model.fused_expert = kernel
    return reason
