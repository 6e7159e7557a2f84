"""Robots that random checkpoints can be made for: widths, names, views, rate and plausible statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .architecture import EMBEDDING_KEY, EXPERT


@dataclass(frozen=True)
class Motion:
    """How an untrained policy is made fit to be watched; see `DEMO_MOTION`.

    weight_scales: factors on drawn tensors, by canonical key or a pattern of `fnmatch`.
    query_scale: factor on attention queries.
    output_scale: factor on the velocity that comes with weight_scales.
    travel: (dof,) motion in the robot's units that one unit of the unscaled velocity gives, for any draw.
    chosen_seed, chosen_travel: the draw that stands for seed 0 of a tiny pi0.5, and what suits it.
    """

    weight_scales: Mapping[str, float]
    query_scale: float
    output_scale: float
    travel: tuple[float, ...]
    chosen_seed: int
    chosen_travel: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """A robot as a policy sees it. Statistics are lists per dimension, in the robot's units."""

    name: str
    horizon: int
    action_rate_hz: float
    views: tuple[str, ...]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    state_stats: Mapping[str, list[float]]
    action_stats: Mapping[str, list[float]]
    state_in_prompt: bool
    action_representation: str = "absolute"
    motion: Motion | None = None

    def norm_stats(self, action_stats: Mapping[str, list[float]] | None = None) -> dict[str, Any]:
        """The content of openpi's norm_stats.json; other statistics of the actions may be given."""
        actions = dict(self.action_stats if action_stats is None else action_stats)
        return {"norm_stats": {"state": dict(self.state_stats), "actions": actions}}


def band(centre: list[float], half: list[float]) -> dict[str, list[float]]:
    """Statistics of data that fills [centre - half, centre + half] evenly: std of a uniform band is half /
    sqrt(3)."""
    return {
        "mean": centre,
        "std": [round(value / 3**0.5, 9) for value in half],
        "q01": [round(middle - value, 9) for middle, value in zip(centre, half, strict=True)],
        "q99": [round(middle + value, 9) for middle, value in zip(centre, half, strict=True)],
    }


# The demo robot's home pose (rad; gripper in m), how far from it its state is expected to be, and how far
# from it the actions of a network that nobody tuned may go.
DEMO_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper")
DEMO_HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02]
DEMO_STATE_BAND = [0.8, 0.6, 0.6, 0.8, 0.8, 0.8, 0.02]
DEMO_ACTION_BAND = [0.15, 0.08, 0.08, 0.15, 0.15, 0.2, 0.004]

# The flow starts from white noise and random weights leave it in: actions = noise - mean velocity. So that
# the arm does not vibrate with it, the velocity is made much larger than the noise (action_out_proj) and
# hardly dependent on it (action_in_proj: small weight; its bias carries the tokens instead), and the
# statistics scale it back. Attention is left unpeaked, so that the velocity varies slowly along the horizon,
# and the text is made quieter than the images, so that one bin of one joint does not turn the arm around.
#
# A policy without memory, whose target is a fixed function of what it sees, comes to rest where image and
# target agree, unless its gain is high enough to overshoot. Draw 8 was picked among 13 for a steady sway of a
# tenth of a radian, and its travel set so that no joint reaches its speed limit (simulated arm, 12 chunks/s,
# seams blended over 0.3 s; without blending it is jerky).
DEMO_OUTPUT_SCALE = 2000.0
DEMO_MOTION = Motion(
    weight_scales={
        "action_in_proj.weight": 1e-3,
        "action_in_proj.bias": 50.0,
        "action_out_proj.weight": DEMO_OUTPUT_SCALE,
        f"{EXPERT}layers.*.self_attn.q_proj.weight": 0.25,
        EMBEDDING_KEY: 1e-3,
    },
    query_scale=1.0,
    output_scale=DEMO_OUTPUT_SCALE,
    travel=(0.6, 0.3, 0.3, 0.6, 0.6, 0.8, 0.015),
    chosen_seed=8,
    chosen_travel=(3.0, 1.8, 0.9, 3.0, 0.85, 2.5, 0.06),
)

DEMO_ARM = Preset(
    name="demo_arm",
    horizon=50,
    action_rate_hz=50.0,
    views=("base_0_rgb", "left_wrist_0_rgb"),
    state_names=DEMO_JOINTS,
    action_names=DEMO_JOINTS,
    state_stats=band(DEMO_HOME, DEMO_STATE_BAND),
    action_stats=band(DEMO_HOME, DEMO_ACTION_BAND),
    state_in_prompt=True,
    motion=DEMO_MOTION,
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
    action_representation="delta",
)

ALOHA_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ALOHA_JOINTS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ALOHA_ARM)
# The start pose of ALOHA's recordings, counted as openpi's checkpoints do: shoulder and elbow the other way.
ALOHA_HOME = [0.0, 0.96, -1.16, 0.0, -0.3, 0.0, 0.5] * 2

ALOHA = Preset(
    name="aloha",
    horizon=50,
    action_rate_hz=50.0,
    views=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    state_names=ALOHA_JOINTS,
    action_names=ALOHA_JOINTS,
    state_stats=band(ALOHA_HOME, [0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.5] * 2),
    action_stats=band(ALOHA_HOME, [0.15, 0.15, 0.15, 0.15, 0.15, 0.15, 0.1] * 2),
    state_in_prompt=True,
)

# LeRobot's names and units: degrees, the gripper from 0 (closed) to 100 (open).
SO101_JOINTS = tuple(
    f"{joint}.pos"
    for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
)
SO101_HOME = [0.0, -45.0, 45.0, 30.0, 0.0, 30.0]

SO101 = Preset(
    name="so101",
    horizon=50,
    action_rate_hz=30.0,
    views=("base_0_rgb", "left_wrist_0_rgb"),
    state_names=SO101_JOINTS,
    action_names=SO101_JOINTS,
    state_stats=band(SO101_HOME, [60.0, 40.0, 40.0, 50.0, 60.0, 30.0]),
    action_stats=band(SO101_HOME, [10.0, 8.0, 8.0, 10.0, 10.0, 10.0]),
    state_in_prompt=True,
)

# Joints in rad; the gripper as openpi's UR5 example has it, from 0 (open) to 1 (closed).
UR5E_JOINTS = (
    "shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint",
    "wrist_3_joint", "gripper",
)
UR5E_HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.5]

UR5E = Preset(
    name="ur5e",
    horizon=50,
    action_rate_hz=20.0,
    views=("base_0_rgb", "left_wrist_0_rgb"),
    state_names=UR5E_JOINTS,
    action_names=UR5E_JOINTS,
    state_stats=band(UR5E_HOME, [0.8, 0.6, 0.6, 0.8, 0.8, 0.8, 0.5]),
    action_stats=band(UR5E_HOME, [0.15, 0.08, 0.08, 0.15, 0.15, 0.2, 0.1]),
    state_in_prompt=True,
)

PRESETS = {preset.name: preset for preset in (DEMO_ARM, LIBERO, ALOHA, SO101, UR5E)}


def preset_named(name: str) -> Preset:
    """The preset of a name. Raises OptionError listing the known ones."""
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}: expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
