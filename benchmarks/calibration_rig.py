"""A policy and frames of a robot to calibrate it on, for the benchmarks."""

from __future__ import annotations

import argparse
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.random_policy import random_checkpoint
from flashrt_runtime import models
from flashrt_runtime.checkpoints import Checkpoint, open_checkpoint
from flashrt_runtime.inputs import ModelInputs
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.options import Target
from flashrt_runtime.parity.stages import Inputs
from flashrt_runtime.policy import Policy
from flashrt_runtime.processing.images import prepare_image
from flashrt_runtime.quantization.calibration import estimate
from flashrt_runtime.quantization.estimators import resolve_estimator

ESTIMATORS = {
    "mse": ("mse", None),
    "percentile 99.9": ("percentile", 99.9),
    "percentile 99.99": ("percentile", 99.99),
    "percentile 99.999": ("percentile", 99.999),
    "max": ("max", None),
}


class Rig:
    """An fp8 policy on the device, and its frames in model space."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.checkpoint = self.open()
        settings = Settings(2, args.steps, 1, False, False)
        self.policy: Policy = build_policy(self.checkpoint, Target(self.device, "fp8"), settings)
        assert self.policy._model is not None
        assert self.policy._calibration is not None
        self.model, self.calibrator = self.policy._model, self.policy._calibration.calibrator
        self.observations = read_frames(args.frames)
        self.frames: list[ModelInputs] = [self.policy._encode(**frame) for frame in self.observations]
        self.width = self.policy.spec.action_dim or self.policy.spec.model_action_dim

    def open(self) -> Checkpoint:
        """The checkpoint anew, the same weights every time."""
        if self.args.checkpoint is not None:
            opened = open_checkpoint(self.args.checkpoint, config="auto")
            opened.config = opened.config.with_steps(self.args.steps)
            return opened
        args = self.args
        return random_checkpoint(
            "pi05", 2, args.chunk, args.steps, self.device, args.size, query_scale=args.query_scale
        )

    def plain(self, dtype: torch.dtype) -> FlowPolicy:
        """The same policy unquantised: the definition, no graphs."""
        opened = self.open()
        model = models.build(
            opened.config, 2, dtype, opened.rules.rope_bf16, opened.rules.accumulate_time
        )
        load_weights(model, opened.config, opened, self.device)
        model.eval()
        model.prepare(self.device)
        assert isinstance(model, FlowPolicy)
        return model

    def inputs(self, frame: ModelInputs) -> Inputs:
        """A frame as the parity tools take it."""
        size, rule = self.checkpoint.config.vision.image_size, self.checkpoint.rules.resize
        pixels = [prepare_image(view, size, rule, self.device).float().cpu().numpy() for view in frame.views]
        state = frame.state
        return Inputs(
            np.stack(pixels),
            np.ones(len(pixels), np.bool_),
            frame.tokens,
            np.ones(len(frame.tokens), np.bool_),
            np.zeros(self.checkpoint.config.action_dim, np.float32) if state is None else state,
            frame.noise.numpy(),
        )

    def put(self, draw: Sequence[int], estimators: dict[str, tuple[str, float | None]]) -> Any:
        """Scales by each estimator from the frames of a draw."""
        collector = self.calibrator.collector()
        for index in draw:
            with collector.observe():
                self.policy._eager(self.model, self.frames[index])
        return {name: estimate(collector, *resolve_estimator(*each))[0] for name, each in estimators.items()}

    def compensate(self, draw: Sequence[int]) -> float:
        """Calibrate on the frames of a draw with compensated weights; seconds that it took."""
        started = time.perf_counter()
        self.policy.calibrate([self.observations[index] for index in draw], weights="compensated")
        return time.perf_counter() - started

    def deployed(self, index: int) -> np.ndarray:
        """Actions of what predict runs, model space, the robot's dimensions."""
        actions = self.policy._run(self.model, self.frames[index])
        return np.asarray(actions)[:, : self.width]

    def unquantised(self, index: int) -> np.ndarray:
        """The same weights with activations as they are."""
        with self.calibrator.unquantised():
            return self.policy._eager(self.model, self.frames[index]).float().cpu().numpy()[:, : self.width]


def read_frames(file: Path) -> list[dict[str, Any]]:
    """Observations of a LIBERO robot: two views, prompt, state (position, axis-angle, gripper), a seed."""
    with zipfile.ZipFile(file) as archive:
        entries = json.loads(archive.read("meta.json"))

        def image(name: str) -> np.ndarray:
            pixels = cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_COLOR)
            return np.ascontiguousarray(pixels[..., ::-1])

        return [
            {
                "images": [image(f"{entry['index']:03d}_{view}.png") for view in ("base", "wrist")],
                "prompt": entry["prompt"],
                "state": [*entry["eef_pos"], *axis_angle(entry["eef_quat_xyzw"]), *entry["gripper_qpos"]],
                "seed": entry["index"],
            }
            for entry in entries
        ]


def axis_angle(quaternion: Sequence[float]) -> np.ndarray:
    """Rotation axis times angle [rad] of a unit quaternion x, y, z, w."""
    vector, w = np.array(quaternion[:3]), float(np.clip(quaternion[3], -1, 1))
    sine = float(np.linalg.norm(vector))
    return vector * (2 * np.arctan2(sine, w) / sine) if sine > 1e-9 else np.zeros(3)
