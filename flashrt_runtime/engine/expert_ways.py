"""How the denoise steps of an action expert run on a GPU: by one persistent kernel, by a chain of kernels, or
by the model's own loop; the first that serves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch

from ..config import PolicyConfig
from ..errors import HardwareError, OptionError
from ..guidance import RtcMode
from ..models import FlowPolicy
from ..quantization.fp8 import fp8_linears
from . import expert_chain, fused_expert
from .gpu import Gpu

logger = logging.getLogger(__name__)

ExpertWay = Literal["auto", "fused", "chain", "loop"]
TRAINED = "rtc=trained conditions each action by itself, which the kernels do not"
KERNELS: dict[str, ModuleType] = {"fused": fused_expert, "chain": expert_chain}  # in the order of trial
DESCRIPTIONS = {
    "fused": "one persistent kernel",
    "chain": "a chain of kernels",
    "loop": "the model's own, slower loop",
}


def check_way(name: str) -> ExpertWay:
    """Raises OptionError for what is no way."""
    for way in get_args(ExpertWay):
        if name == way:
            return way  # type: ignore[no-any-return]
    raise OptionError(f"unknown expert {name!r}: expected one of {', '.join(get_args(ExpertWay))}")


@dataclass(frozen=True)
class Choice:
    """A way, and why not those in front of it."""

    way: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        because = "; ".join(self.reasons)
        return DESCRIPTIONS[self.way] + (f" ({because})" if because else "")


def choose(config: PolicyConfig, dtype: torch.dtype, gpu: Gpu | None) -> Choice:
    """What "auto" takes for such a model on a GPU (None: the CPU), as far as is known before a launch."""
    if gpu is None:
        return Choice("loop", ("no GPU",))
    reasons: list[str] = []
    for way, kernels in KERNELS.items():
        reason = kernels.refusal(config, dtype, gpu)
        if reason is None:
            return Choice(way, tuple(reasons))
        reasons.append(_why(way, reason))
    return Choice("loop", tuple(reasons))


def check(way: ExpertWay, policy: str, device: torch.device, rtc: RtcMode) -> None:
    """Whether `way` can be asked for at all, before anything is loaded. Raises OptionError (pi0fast, which
    has no action expert; trained guidance, which conditions each action by itself) or HardwareError (CPU).
    """
    if way == "auto":
        return
    if policy == "pi0fast":
        raise OptionError(f"expert={way!r}: pi0fast has no action expert; leave it at 'auto'")
    if way == "loop":
        return
    if rtc == "trained":
        raise OptionError(f"expert={way!r} cannot follow rtc='trained' ({TRAINED}): use expert='auto'")
    if device.type != "cuda":
        raise HardwareError(
            f"expert={way!r} was asked for, and the policy runs on the {device.type}: use hardware= of a "
            "GPU, or expert='auto'"
        )


def attach(
    model: FlowPolicy, device: torch.device, way: ExpertWay = "auto", rtc: RtcMode = "off"
) -> Choice:
    """Give the model what `way` says, "auto" the first that serves, and say in the log which and why.

    Raises HardwareError where the one that was asked for does not serve.
    """
    reasons = [TRAINED] if rtc == "trained" else []
    for name, kernels in KERNELS.items():
        if rtc == "trained" or way not in ("auto", name):
            continue
        reason = kernels.attach(model, device)
        if reason is None:
            return _said(Choice(name, tuple(reasons)))
        reasons.append(_why(name, reason))
    if way not in ("auto", "loop"):
        raise HardwareError(
            f"expert={way!r} was asked for, which cannot serve here: {'; '.join(reasons)}; use expert='auto'"
        )
    for linear in fp8_linears(model).values():
        if not linear.static:
            linear.widen()
    return _said(Choice("loop", tuple(reasons)))


def _why(way: str, reason: str) -> str:
    return f"not by {DESCRIPTIONS[way]}: {reason}"


def _said(choice: Choice) -> Choice:
    logger.log(logging.WARNING if choice.way == "loop" else logging.INFO, "expert by %s", choice)
    return choice
