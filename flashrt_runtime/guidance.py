"""Real-time chunking: a chunk that goes on from what is already being played (arXiv:2506.07339, 2512.05964).

While the model computes, the robot plays on: the first `delay` actions of the new chunk are already decided.
"guided" pulls the flow towards the old plan, more where it is closer, and takes the decided actions over;
"trained" gives them to the network as clean inputs, for checkpoints that were trained so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import OptionError

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
