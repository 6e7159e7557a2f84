"""Real-time chunking: a chunk that goes on from what is already being played (arXiv:2506.07339, 2512.05964).

While the model computes, the robot plays on: the first `delay` actions of the new chunk are already decided.
"guided" pulls the flow towards the old plan, more where it is closer, and takes the decided actions over;
"trained" gives them to the network as clean inputs, for checkpoints that were trained so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from .config import PolicyConfig
from .errors import ObservationError, OptionError
from .processing.actions import ActionTransform
from .spec import PolicySpec

FloatArray = NDArray[np.float32]
RtcMode = Literal["off", "guided", "trained"]
Schedule = Literal["zeros", "ones", "linear", "exp"]
RTC_MODES: tuple[str, ...] = get_args(RtcMode)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
MAX_WEIGHT = 10.0


@dataclass(frozen=True)
class Guidance:
    """What a chunk has to go on from.

    plan: (n, action_dim), what will be played when the new chunk's actions 0 to n - 1 are due, in the robot's
    units; or, with `model_space`, (n, model_action_dim) as a model gave it. It may be shorter or longer than
    a chunk; what it does not cover is not guided. anchor: (state_dim,), the raw state of the observation that
    a model-space plan was computed from; needed where actions are differences to the state, which are then
    expressed relative to the new one. delay: actions played before the new chunk can take over; they come
    out as planned.

    Only in "guided": horizon: actions guided at all (None: as far as the plan goes); schedule: weights
    between delay and horizon, see `prefix_weights`; max_weight: bound of the guidance gain (beta).
    """

    plan: NDArray[np.floating]
    delay: int = 0
    horizon: int | None = None
    schedule: Schedule = "linear"
    max_weight: float = MAX_WEIGHT
    model_space: bool = False
    anchor: NDArray[np.floating] | None = None


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


def check_mode(mode: str, policy: str, max_delay: int | None, checkpoint: str) -> RtcMode:
    """`mode` if it is one that the checkpoint can run; max_delay: what it declares. Raises OptionError."""
    if mode not in RTC_MODES:
        raise OptionError(f"rtc is {mode!r}: expected one of {', '.join(RTC_MODES)}")
    if mode != "off" and policy == "pi0fast":
        raise OptionError(f"rtc={mode!r} guides a flow, and pi0fast generates tokens: use rtc='off'")
    if mode == "trained" and max_delay is None:
        raise OptionError(
            f"rtc='trained' needs a checkpoint trained with frozen actions, and {checkpoint} does not "
            "declare rtc_training_max_delay: use rtc='guided'"
        )
    checked: RtcMode = mode  # type: ignore[assignment]
    return checked


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
