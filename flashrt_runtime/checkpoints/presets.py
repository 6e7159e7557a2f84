"""Robots that random checkpoints can be made for: widths, names, views, rate and plausible statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Preset:
    """A robot as a policy sees it. Statistics are lists per dimension, in the robot's units.

    weight_scales multiplies drawn tensors by factors, so that an untrained policy's actions are of use to a
    demo.
    """

    name: str
    horizon: int
    action_rate_hz: float
    views: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    state_stats: Mapping[str, list[float]]
    action_stats: Mapping[str, list[float]]
    state_in_prompt: bool
    weight_scales: Mapping[str, float] = field(default_factory=dict)

    def norm_stats(self) -> dict[str, Any]:
        """The content of openpi's norm_stats.json."""
        return {"norm_stats": {"state": dict(self.state_stats), "actions": dict(self.action_stats)}}


def _band(centre: list[float], half: list[float]) -> dict[str, list[float]]:
    """Statistics of data that fills [centre - half, centre + half] evenly: std of a uniform band is half /
    sqrt(3)."""
    return {
        "mean": centre,
        "std": [round(value / 3**0.5, 6) for value in half],
        "q01": [round(middle - value, 6) for middle, value in zip(centre, half, strict=True)],
        "q99": [round(middle + value, 6) for middle, value in zip(centre, half, strict=True)],
    }


# The demo robot's home pose (rad; gripper in m) and how far from it its state is expected to be.
DEMO_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper")
DEMO_HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02]
DEMO_STATE_BAND = [0.8, 0.6, 0.6, 0.8, 0.8, 0.8, 0.02]
DEMO_ACTION_BAND = [0.3, 0.2, 0.2, 0.3, 0.3, 0.3, 0.008]

DEMO_ARM = Preset(
    name="demo_arm",
    horizon=50,
    action_rate_hz=50.0,
    views=("base_0_rgb", "left_wrist_0_rgb"),
    state_names=DEMO_JOINTS,
    action_names=DEMO_JOINTS,
    state_stats=_band(DEMO_HOME, DEMO_STATE_BAND),
    action_stats=_band(DEMO_HOME, DEMO_ACTION_BAND),
    state_in_prompt=True,
)

# LIBERO's state is end-effector position (m), axis-angle (rad) and two finger positions (m); its actions are
# end-effector deltas in controller units and a gripper command. Values of the size that dataset has, rounded.
LIBERO = Preset(
    name="libero",
    horizon=10,
    action_rate_hz=20.0,
    views=("base_0_rgb", "left_wrist_0_rgb"),
    state_names=("x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"),
    action_names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
    state_stats={
        "mean": [-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027],
        "std": [0.10, 0.15, 0.38, 0.34, 0.91, 0.33, 0.014, 0.014],
        "q01": [-0.40, -0.27, 0.03, 1.82, -2.69, -1.08, 0.001, -0.040],
        "q99": [0.14, 0.33, 1.27, 3.31, 2.37, 0.60, 0.040, -0.001],
    },
    action_stats={
        "mean": [0.06, 0.08, -0.09, 0.001, 0.006, -0.005, -0.05],
        "std": [0.33, 0.37, 0.44, 0.04, 0.06, 0.08, 0.999],
        "q01": [-0.72, -0.80, -0.94, -0.11, -0.15, -0.27, -1.0],
        "q99": [0.94, 0.87, 0.93, 0.12, 0.17, 0.19, 1.0],
    },
    state_in_prompt=False,
)

PRESETS = {preset.name: preset for preset in (DEMO_ARM, LIBERO)}


def preset_named(name: str) -> Preset:
    """The preset of a name. Raises OptionError listing the known ones."""
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}: expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
