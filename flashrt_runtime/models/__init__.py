"""One file per policy. `build` turns a policy's configuration into its (unallocated) module."""

from __future__ import annotations

import torch

from ..config import PolicyConfig
from ..errors import OptionError
from .flow import FlowPolicy
from .pi0 import Pi0
from .pi0_fast import Pi0Fast
from .pi05 import Pi05
from .prefix import PrefixPolicy

__all__ = ["FlowPolicy", "Pi0", "Pi0Fast", "Pi05", "PrefixPolicy", "build"]

POLICIES: dict[str, type[FlowPolicy] | type[Pi0Fast]] = {"pi05": Pi05, "pi0": Pi0, "pi0fast": Pi0Fast}


def build(
    config: PolicyConfig,
    num_views: int,
    dtype: torch.dtype,
    rope_bf16: bool = False,
    accumulate_time: bool = False,
) -> PrefixPolicy:
    """The policy named by `config.policy`, its parameters on the meta device until the loader fills them.

    rope_bf16, accumulate_time: the rules of the checkpoint's family, see `FamilyRules`.
    """
    if config.policy not in POLICIES:
        raise OptionError(f"unknown policy {config.policy!r}: expected one of {sorted(POLICIES)}")
    with torch.device("meta"):
        model = POLICIES[config.policy](config, num_views, dtype, rope_bf16)
    if isinstance(model, FlowPolicy):
        model.accumulate_time = accumulate_time
    return model
