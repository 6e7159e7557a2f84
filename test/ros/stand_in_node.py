"""The policy node over a stand-in policy, for what cannot be had from the real runtime: failing on demand.

Everything but the policy is the real node. Prompts: "break down" fails in set_prompt, "load slowly" says
"loading" and takes its time, "think slowly" takes two seconds for a chunk, "lose the GPU" and "load without
the GPU" fail as after a kernel that trapped.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np

from flashrt_ros.nodes.policy_node import main
from flashrt_runtime import device_loss


class StandInPolicy:
    """Holds the arm of the demo robot where it is."""

    precision = "fp32"

    def __init__(self, checkpoint: str, names: tuple[str, ...]) -> None:
        self.spec = SimpleNamespace(
            views=("base_0_rgb", "left_wrist_0_rgb"), horizon=50, state_dim=len(names), action_dim=len(names),
            state_names=names, action_names=names, action_rate_hz=50.0, checkpoint=checkpoint,
        )

    def set_prompt(self, prompt: str) -> None:
        if prompt == "break down":
            raise RuntimeError("broken on purpose")

    def predict(self, images, prompt, state, *, seed=None):
        if prompt == "think slowly":
            time.sleep(2.0)
        if prompt == "lose the GPU":
            with device_loss.recognised():
                raise RuntimeError("CUDA error: unspecified launch failure")
        return np.tile(np.asarray(state, np.float32), (self.spec.horizon, 1))

    def close(self) -> None:
        pass


def load(values, contract) -> StandInPolicy:
    if values.prompt == "load slowly":
        print("loading", flush=True)
        time.sleep(2.0)
    if values.prompt == "load without the GPU":
        with device_loss.recognised():
            raise RuntimeError("CUDA error: unspecified launch failure")
    return StandInPolicy(values.checkpoint, contract.action.joints)


if __name__ == "__main__":
    sys.exit(main(load=load))
