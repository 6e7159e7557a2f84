"""What a calibration needs of a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..inputs import ModelInputs


@dataclass(frozen=True)
class Runner:
    """A policy, as a calibration sees it.

    exclusive: the model to itself; raises ClosedError once the policy is closed. watched: for what uses the
    GPU without the model: a GPU lost within it is lost to the policy. encode: an observation in
    model space. eager: the model's definition, whatever it gives. reference: its actions, and deployed: those
    of what predict runs, both (horizon, model_action_dim). robot_actions: how many of the model's action
    dimensions are the robot's. draw_noise: a flow's start, from a generator; None where none is used.
    range_limit: see `PrefixPolicy.range_limit`.
    """

    exclusive: Callable[[], AbstractContextManager[object]]
    watched: Callable[[], AbstractContextManager[object]]
    encode: Callable[[Mapping[str, Any]], ModelInputs]
    eager: Callable[[ModelInputs], torch.Tensor]
    reference: Callable[[ModelInputs], NDArray[np.float32]]
    deployed: Callable[[ModelInputs], NDArray[np.float32]]
    robot_actions: int
    draw_noise: Callable[[torch.Generator], torch.Tensor] | None = None
    range_limit: str | None = None
