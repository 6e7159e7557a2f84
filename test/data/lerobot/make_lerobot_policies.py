#!/usr/bin/env python
"""Writes the policy directories beside this script with LeRobot itself, and what it makes of some inputs.

    make parity-env && .venv-parity/bin/python test/data/lerobot/make_lerobot_policies.py

Each directory holds config.json and the pre- and postprocessor as LeRobot saves them (no weights);
expected.npz: states (n, dof), normalised (n, dof), actions (horizon, dof) in model space, and physical
(n, horizon, dof), one chunk for each state; texts.json: tasks and the text that reached the tokenizer.
LeRobot 0.6.1, seed 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lerobot.processor.tokenizer_processor as tokenizer_processor
import numpy as np
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.processor_pi0 import make_pi0_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors

HERE = Path(__file__).resolve().parent
DOF, HORIZON, SAMPLES = 7, 5, 12
NAMES = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "Gripper_left"]
TASKS = ["Pick up_the red block\n", "  fold the towel ", "open\nthe drawer", "put it down"]
SEEN: list[str] = []

MODES = {
    "VISUAL": NormalizationMode.IDENTITY,
    "STATE": NormalizationMode.MIN_MAX,
    "ACTION": NormalizationMode.QUANTILE10,
}
SHORT = {"chunk_size": 15, "n_action_steps": 15, "num_inference_steps": 5}
VARIANTS = {
    "pi05": {},
    "pi0": {},
    "pi05_relative": {"use_relative_actions": True, "action_feature_names": NAMES},
    "pi0_relative_unnamed": {"use_relative_actions": True},
    "pi05_min_max": {"normalization_mapping": MODES},
    "pi05_no_statistics": {},
    "pi05_empty_camera": {"empty_cameras": 1, **SHORT},
}


class RecordingTokenizer:
    """LeRobot asks a hub for PaliGemma's tokenizer; here only the text that it would get matters."""

    def __call__(self, texts, max_length, **_):
        SEEN.extend(texts)
        ones = torch.ones(len(texts), max_length, dtype=torch.int64)
        return {"input_ids": ones, "attention_mask": ones}


tokenizer_processor.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: RecordingTokenizer())


def statistics(generator: np.random.Generator) -> dict[str, dict[str, torch.Tensor]]:
    """Plausible statistics; one joint never moves."""
    stats = {}
    for name in ("observation.state", "action"):
        q01, q99 = generator.uniform(-1.5, -0.5, DOF), generator.uniform(0.5, 1.5, DOF)
        q01[3] = q99[3] = 0.25
        moving = np.arange(DOF) != 3
        values = {
            "mean": generator.normal(size=DOF),
            "std": generator.uniform(0.1, 1, DOF) * moving,
            "min": q01 - 0.5 * moving,
            "max": q99 + 0.5 * moving,
            "q01": q01,
            "q10": q01 + 0.1 * moving,
            "q90": q99 - 0.1 * moving,
            "q99": q99,
            "count": np.array([100.0]),
        }
        stats[name] = {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}
    return stats


def write(name: str, options: dict) -> None:
    """One policy directory."""
    SEEN.clear()
    generator = np.random.default_rng(0)
    if name.startswith("pi05"):
        kind, make = PI05Config, make_pi05_pre_post_processors
    else:
        kind, make = PI0Config, make_pi0_pre_post_processors
    camera = PolicyFeature(FeatureType.VISUAL, (3, 240, 320))
    cameras = {f"observation.images.{view}": camera for view in ("wrist", "front")}
    config = kind(
        input_features=cameras | {"observation.state": PolicyFeature(FeatureType.STATE, (DOF,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DOF,))},
        device="cpu",
        **options,
    )
    config.validate_features()
    stats = None if name.endswith("no_statistics") else statistics(generator)
    before, after = make(config, stats)
    states = generator.uniform(-2, 2, (SAMPLES, DOF)).astype(np.float32)
    actions = generator.normal(0, 1.5, (HORIZON, DOF)).astype(np.float32)
    normalised, physical, tasks = [], [], []
    for index, state in enumerate(states):
        tasks.append(TASKS[index % len(TASKS)])
        raw = {"observation.state": torch.from_numpy(state), "task": tasks[-1]}
        normalised.append(before(raw)["observation.state"][0].numpy())
        physical.append(after(torch.from_numpy(actions)[None])[0].numpy())
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    config._save_pretrained(folder)
    before.save_pretrained(folder)
    after.save_pretrained(folder)
    results = {"states": states, "normalised": normalised, "actions": actions, "physical": physical}
    np.savez(folder / "expected.npz", **results)
    (folder / "texts.json").write_text(json.dumps({"tasks": tasks, "texts": SEEN}, indent=1) + "\n")


for variant, settings in VARIANTS.items():
    write(variant, settings)
    print(variant, *sorted(file.name for file in (HERE / variant).iterdir()))
