"""The policy node with faults on demand: the real node and the real policy, which runs for every chunk.

Its checkpoint is untrained, so its actions go anywhere: the chunk it gives is replaced by a gentle sway about
where the arm is, into which the faults are put. The order for them is a JSON file, named by
FLASHRT_FAULT_ORDER and read at every inference:

    {"id": 3, "fault": "nan", "count": 1, "sleep": 0.0}

fault: nan, inf, position, velocity, seam, raise, lost (the GPU) or none; count: inferences it lasts, -1 until
the next order; sleep: seconds that each of them takes longer. `load` at the file's "load" key may say "out of
memory".
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from flashrt_ros.nodes.policy_node import load_policy, main
from flashrt_runtime import device_loss

PERIOD = 0.02  # of actions [s]
SWAY, SPEED = 0.05, 3.0  # amplitude [rad] and angular frequency [rad/s] of the wrist


class FaultyPolicy:
    """Everything but `predict` is the real policy's."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._order: dict[str, Any] = {}
        self._left = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def predict(self, images: Any, prompt: str, state: Any, **options: Any) -> np.ndarray:
        self._read()
        fault = self._order.get("fault", "none") if self._left else "none"
        if self._left:
            self._left -= 1 if self._left > 0 else 0
            time.sleep(self._order.get("sleep", 0.0))
        real = self._policy.predict(images, prompt, state, **options)
        if fault == "raise":
            raise RuntimeError("ordered to fail")
        if fault == "lost":  # as the runtime says it after a kernel that trapped
            with device_loss.recognised():
                raise RuntimeError("CUDA error: unspecified launch failure")
        return FAULTS[fault](sway(np.asarray(state, np.float32), len(real)))

    def _read(self) -> None:
        order = read_order()
        if order.get("id") != self._order.get("id"):
            self._order, self._left = order, int(order.get("count", 0))


def sway(state: np.ndarray, horizon: int) -> np.ndarray:
    """Actions (horizon, dof) that start at `state` (dof,) and never stand still."""
    begin, actions = time.monotonic(), np.tile(state, (horizon, 1))
    for joint, phase in ((3, 0.0), (4, math.pi / 2)):  # two, so that one moves when the other turns
        angles = SPEED * (begin + PERIOD * np.arange(horizon)) + phase
        actions[:, joint] += SWAY * (np.sin(angles) - np.sin(angles[0]))
    return actions


def _with(change: Any) -> Any:
    def apply(actions: np.ndarray) -> np.ndarray:
        change(actions)
        return actions

    return apply


def _not_finite(value: float) -> Any:
    return _with(lambda actions: actions.__setitem__((7, 2), value))


def _past_the_gripper(actions: np.ndarray) -> None:
    """Slowly from where the gripper is past its nearer limit, 0 or 0.04 m, within the open-loop cap."""
    way = 0.05 if actions[0, 6] >= 0.02 else -0.05
    actions[:, 6] = actions[0, 6] + np.linspace(0.0, way, len(actions))


FAULTS = {
    "none": lambda actions: actions,
    "nan": _not_finite(np.nan),
    "inf": _not_finite(np.inf),
    "position": _with(_past_the_gripper),
    "velocity": _with(lambda actions: actions.__setitem__((slice(20, None), 5), actions[20:, 5] + 0.3)),
    "seam": _with(lambda actions: actions.__setitem__((slice(None), 5), actions[:, 5] + 1.0)),
}


def read_order() -> dict[str, Any]:
    return dict(json.loads(Path(os.environ["FLASHRT_FAULT_ORDER"]).read_text()))


def load(values: Any, contract: Any) -> FaultyPolicy:
    if read_order().get("load") == "out of memory":  # simulated: there may be no GPU to fill
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB (simulated)")
    return FaultyPolicy(load_policy(values, contract))


if __name__ == "__main__":
    sys.exit(main(load=load))
