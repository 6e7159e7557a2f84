"""Guidance in model space: soft mask, gains, and a plan relative to the new observation's state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import PolicyConfig
from ..errors import ObservationError, OptionError
from ..guidance import SCHEDULES, Guidance, RtcMode
from ..spec import PolicySpec
from .actions import ActionTransform

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class GuideArrays:
    """`Guidance` as the model takes it; rows are the chunk's actions.

    target: (horizon, model_action_dim) float32, the plan in model space; weight: (horizon,) float32, the soft
    mask; frozen: (horizon,) bool, actions that come out as the target; gains: (num_steps,) float32.
    """

    target: FloatArray
    weight: FloatArray
    frozen: NDArray[np.bool_]
    gains: FloatArray

    @staticmethod
    def layout(config: PolicyConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every array, by name."""
        rows = config.horizon
        return {
            "target": (torch.float32, (rows, config.action_dim)),
            "weight": (torch.float32, (rows,)),
            "frozen": (torch.bool, (rows,)),
            "gains": (torch.float32, (config.num_steps,)),
        }

    @classmethod
    def none(cls, config: PolicyConfig) -> GuideArrays:
        """No guidance: every weight zero, nothing frozen."""
        layout = cls.layout(config).items()
        return cls(**{name: torch.zeros(shape, dtype=dtype).numpy() for name, (dtype, shape) in layout})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("target", "weight", "frozen", "gains")}


def prefix_weights(schedule: str, delay: int, end: int, total: int) -> FloatArray:
    """The soft mask (total,) float32: 1 before `delay`, 0 from `end` on, in between by the schedule.

    zeros: 0; ones: 1; linear: falling in equal steps, neither 1 nor 0; exp: l * expm1(l) / (e - 1) of those.
    """
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule is {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    end = min(end, total)
    delay = min(delay, end)
    weights = np.zeros(total)
    weights[:delay] = 1.0
    if schedule == "ones":
        weights[:end] = 1.0
    elif schedule != "zeros":
        falling = np.linspace(1.0, 0.0, end - delay + 2)[1:-1]
        weights[delay:end] = (
            falling if schedule == "linear" else falling * np.expm1(falling) / (math.e - 1.0)
        )
    return weights.astype(np.float32)


def gains(num_steps: int, max_weight: float) -> FloatArray:
    """g_k of every denoise step (num_steps,) float32: how strongly the velocity is corrected.

    g_k = min(beta, ((1 - tau) / tau) * (tau^2 + (1 - tau)^2) / (1 - tau)^2) with tau = k / num_steps, g_0 =
    beta (arXiv:2506.07339, equation 2, with r^2 of its appendix).
    """
    values = [max_weight]
    for step in range(1, num_steps):
        tau = step / num_steps
        rest = 1.0 - tau
        values.append(min(max_weight, (rest / tau) * (tau * tau + rest * rest) / (rest * rest)))
    return np.array(values, np.float32)


class GuidanceEncoder:
    """Checks guidance and expresses it in model space, relative to the new observation's state."""

    def __init__(self, spec: PolicySpec, actions: ActionTransform | None, mode: RtcMode) -> None:
        """actions: None where the checkpoint has no statistics of them."""
        self._spec = spec
        self._actions = actions
        self._mode = mode
        self._max_delay = spec.rtc_training_max_delay if mode == "trained" else None

    def __call__(self, guidance: Guidance, state: NDArray[np.floating] | None) -> GuideArrays:
        """state: raw, of the new observation. Raises OptionError (mode, delay, horizon, schedule, max_weight)
        or ObservationError (plan, anchor, state)."""
        spec = self._spec
        self._check(guidance)
        plan = self._model_space(guidance, state)
        known = min(len(plan), spec.horizon)
        if guidance.delay > known:
            raise OptionError(
                f"delay={guidance.delay}, but only {known} actions of the plan lie within the chunk: what is "
                "played during the inference must be known"
            )
        target = np.zeros((spec.horizon, spec.model_action_dim), np.float32)
        target[:known] = plan[:known]
        end = known if guidance.horizon is None else min(known, guidance.horizon)
        weight = prefix_weights(guidance.schedule, guidance.delay, end, spec.horizon)
        frozen = np.arange(spec.horizon) < guidance.delay
        return GuideArrays(target, weight, frozen, gains(spec.num_steps, guidance.max_weight))

    def _check(self, guidance: Guidance) -> None:
        if self._mode == "off":
            raise OptionError(
                "rtc= was given, but the policy was loaded without: use load_model(..., rtc='guided')"
            )
        delay, horizon, weight = guidance.delay, guidance.horizon, guidance.max_weight
        if not _whole(delay) or delay < 0:
            raise OptionError(f"delay is {delay!r}: expected a number of actions, 0 or more")
        if horizon is not None and (not _whole(horizon) or horizon < 0):
            raise OptionError(f"horizon is {horizon!r}: expected a number of actions, or None for all")
        if not (math.isfinite(weight) and weight > 0):
            raise OptionError(f"max_weight is {weight!r}: expected a number above 0")
        if self._max_delay is not None and delay > self._max_delay:
            raise OptionError(
                f"delay={delay}, but the checkpoint was trained for up to {self._max_delay} actions "
                "(rtc_training_max_delay): infer faster, or use rtc='guided'"
            )

    def _model_space(self, guidance: Guidance, state: NDArray[np.floating] | None) -> FloatArray:
        spec, actions = self._spec, self._actions
        plan = np.asarray(guidance.plan)
        width = spec.model_action_dim if guidance.model_space else spec.action_dim
        if plan.ndim != 2 or plan.shape[1] != width or plan.dtype.kind != "f":
            raise ObservationError(
                f"plan: expected floats of shape (n, {width}), got {plan.dtype} {plan.shape}"
            )
        if not np.isfinite(plan).all():
            raise ObservationError("plan: holds values that are not finite")
        if guidance.model_space and (actions is None or not actions.delta.size):
            return plan.astype(np.float32)
        if actions is None:
            raise ObservationError("plan: without action statistics it must be given in model space")
        if not guidance.model_space:
            # The model's padding dimensions were zero in training, after normalisation.
            padded = np.zeros((len(plan), spec.model_action_dim), np.float32)
            padded[:, : actions.dof] = actions.to_model(plan, state)
            return padded
        if guidance.anchor is None:
            raise ObservationError(
                "plan: in model space its actions are differences to the state it was computed from: pass "
                "that state as anchor="
            )
        moved = plan.astype(np.float32)
        physical = actions.to_physical(moved, np.asarray(guidance.anchor, np.float32))
        moved[:, actions.delta] = actions.to_model(physical, state)[:, actions.delta]
        return moved


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
