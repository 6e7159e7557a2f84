"""Writes a case's checkpoint, runs our policy on it, and measures distances."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from parity_cases import Case, golden
from safetensors.numpy import save_file

import flashrt_runtime
from flashrt_runtime.config import GemmaConfig, PolicyConfig, SiglipConfig
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.stages import Inputs, Stages

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "test" / "data" / "goldens"
MAX_ABS = {"pi05": 5e-5, "pi0": 5e-4}
STAGE_L2 = 1e-5
REFERENCE_L2 = 2e-6
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@dataclass(frozen=True)
class Run:
    """A case and what our policy made of it: through the public entry, and stage by stage."""

    case: Case
    actions: np.ndarray
    stages: Stages


def run_ours(case: Case, folder: Path, *, accumulate_time: bool = False) -> Run:
    """Write the checkpoint, load it and run it; accumulate_time: the flow's time as openpi counts it."""
    inputs = case.inputs()
    with loaded(case, folder, accumulate_time=accumulate_time) as policy:
        actions = policy.sample_actions(**inputs)
        return Run(case, actions, capture(model_of(policy), Inputs(**inputs)))


@contextmanager
def loaded(
    case: Case, folder: Path, *, accumulate_time: bool = False
) -> Iterator[flashrt_runtime.Policy]:
    """The case's policy, from a checkpoint written to `folder`."""
    write_checkpoint(case, folder)
    policy = flashrt_runtime.load_model(
        folder,
        config="auto",
        hardware="cpu",
        precision="fp32",
        num_views=case.views,
        num_steps=case.steps,
        rules={"accumulate_time": accumulate_time},
    )
    try:
        yield policy
    finally:
        policy.close()


def model_of(policy: flashrt_runtime.Policy) -> FlowPolicy:
    """The module inside a policy."""
    model = policy._model
    assert model is not None
    return model


def write_checkpoint(case: Case, folder: Path, *, prefix: str = "", tied: bool = True) -> None:
    """model.safetensors and config.json in openpi's layout; with prefix and untied as LeRobot saves it."""
    weights = case.weights()
    tensors = {key: weights(key) for key in weights.shapes}
    if tied:
        tensors[LM_HEAD] = tensors.pop(EMBEDDING)
    save_file({prefix + key: value for key, value in tensors.items()}, folder / "model.safetensors")
    config = {"action_dim": 32, "action_horizon": case.horizon, "flashrt_dims": case.dims}
    (folder / "config.json").write_text(json.dumps(config))


def config_of(case: Case) -> PolicyConfig:
    """The case's dimensions as our configuration."""
    return PolicyConfig(
        policy=case.policy,
        vision=SiglipConfig(**case.dims["vision"]),
        prefix=GemmaConfig(**case.dims["prefix"]),
        expert=GemmaConfig(**case.dims["expert"]),
        vocab_size=case.dims["vocab_size"],
        horizon=case.horizon,
        prompt_capacity=200,
        num_steps=case.steps,
    )


class TorchWeights:
    """A case's weights as the loader wants them."""

    def __init__(self, weights: Callable[[str], np.ndarray]) -> None:
        self._weights = weights

    def tensor(self, key: str) -> torch.Tensor:
        """float32 tensor by openpi key."""
        return torch.from_numpy(self._weights(key))


@cache
def goldens(policy: str) -> dict[str, np.ndarray]:
    """LeRobot's stored numbers of a policy, `<case>/<array>`."""
    with np.load(GOLDENS / f"lerobot_{policy}.npz") as stored:
        return dict(stored)


def golden_of(case: Case) -> dict[str, np.ndarray]:
    """LeRobot's stored numbers of one case."""
    return {
        name.split("/")[1]: value
        for name, value in goldens(case.policy).items()
        if name.startswith(f"{case.name}/")
    }


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    other = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - other) / np.linalg.norm(other))


def check_actions(case: Case, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Max-abs of every action of the chunk, and no sign flip; the cosine goes into the message only."""
    assert ours.shape == theirs.shape == (case.horizon, 32)
    per_action = np.abs(ours - theirs).max(axis=1)
    cosine = float((ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs))
    assert per_action.max() <= MAX_ABS[case.policy], (
        f"action {int(per_action.argmax())}: max-abs {per_action.max():.2e} > {MAX_ABS[case.policy]:.0e} "
        f"(cosine {cosine:.8f})"
    )
    flips = (np.abs(theirs) > 0.05) & (np.sign(ours) != np.sign(theirs))
    assert not flips.any(), f"signs differ at (action, dimension) {np.argwhere(flips)[:5].tolist()}"


def check_golden_stages(case: Case, stages: Stages, stored: dict[str, np.ndarray]) -> None:
    """Prefix embeddings, every layer's K and V, and v at t = 1, each by relative L2."""
    ours = golden(case, stages.arrays())
    pairs = {name: (ours[name], stored[name]) for name in ("prefix_embeddings", "velocity")}
    for name in ("keys", "values"):
        for layer, (mine, other) in enumerate(zip(ours[name], stored[name], strict=True)):
            pairs[f"{name}, layer {layer}"] = (mine, other)
    for name, (mine, other) in pairs.items():
        distance = relative_l2(mine, other)
        assert distance <= STAGE_L2, f"{name}: relative L2 {distance:.2e} > {STAGE_L2:.0e}"
