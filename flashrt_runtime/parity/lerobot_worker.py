"""LeRobot's own Pi0 and Pi0.5 on one observation, stage by stage. Runs in LeRobot's environment.

    .venv-parity/bin/python lerobot_worker.py JOB.json

The job names weights, inputs and output (`run_job`). This file imports nothing of this package: the two sides
share only the checkpoint's keys and the names of the stages. Nothing is fetched from a hub.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import torch

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
HEADS = (
    "paligemma_with_expert.paligemma.lm_head.weight",
    "paligemma_with_expert.gemma_expert.lm_head.weight",
)
GEMMA_FIELDS = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
INITIALISERS = (
    "kaiming_uniform_",
    "uniform_",
    "normal_",
    "trunc_normal_",
    "xavier_uniform_",
    "lecun_normal_",
)


def build(
    policy: str, dims: dict[str, Any], horizon: int, views: int, action_dim: int = 32, dtype: str = "float32"
) -> Any:
    """LeRobot's policy module ("pi05" or "pi0") with the given dimensions and undefined weights.

    dims: {"prefix" | "expert": {width, depth, mlp_dim, num_heads, num_kv_heads, head_dim},
    "vision": {width, depth, mlp_dim, num_heads, image_size}, "vocab_size"}.
    """
    configs = importlib.import_module("lerobot.configs")
    kinds, feature = configs.FeatureType, configs.PolicyFeature
    module = importlib.import_module(f"lerobot.policies.{policy}.modeling_{policy}")
    settings = importlib.import_module(f"lerobot.policies.{policy}.configuration_{policy}")
    size = dims["vision"]["image_size"]
    cameras = {f"observation.images.view{i}": feature(kinds.VISUAL, (3, size, size)) for i in range(views)}
    state = {"observation.state": feature(kinds.STATE, (action_dim,))}
    config = getattr(settings, f"{policy.upper()}Config")(
        input_features=cameras | state,
        output_features={"action": feature(kinds.ACTION, (action_dim,))},
        device="cpu",
        dtype=dtype,
        chunk_size=horizon,
        n_action_steps=horizon,
        max_state_dim=action_dim,
        max_action_dim=action_dim,
        image_resolution=(size, size),
    )
    with resized(module, dims), without_initialisation():
        return getattr(module, f"{policy.upper()}Pytorch")(config).eval()


@contextlib.contextmanager
def resized(module: Any, dims: dict[str, Any]) -> Iterator[None]:
    """Let LeRobot build the model with `dims`: its widths are constants of the named variants."""
    names = ("get_gemma_config", "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    kept = {name: getattr(module, name) for name in names}
    vision, vocabulary = dims["vision"], dims["vocab_size"]

    def variant(name: str) -> Any:
        part = dims["prefix" if name == "gemma_2b" else "expert"]
        return module.GemmaConfig(**{field: part[field] for field in GEMMA_FIELDS})

    def paligemma(config: Any) -> Any:
        config.vision_config.hidden_size = vision["width"]
        config.vision_config.num_hidden_layers = vision["depth"]
        config.vision_config.intermediate_size = vision["mlp_dim"]
        config.vision_config.num_attention_heads = vision["num_heads"]
        config.vision_config.image_size = vision["image_size"]
        config.vision_config.projection_dim = dims["prefix"]["width"]
        config.projection_dim = dims["prefix"]["width"]
        config.text_config.vocab_size = config._vocab_size = vocabulary
        return kept["PaliGemmaForConditionalGenerationWithPiGemma"](config)

    def expert(config: Any) -> Any:
        config.vocab_size = vocabulary
        return kept["PiGemmaForCausalLM"](config)

    for name, replacement in zip(names, (variant, paligemma, expert), strict=True):
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Skip random initialisation: every parameter is overwritten, and at full size it takes a minute."""
    places = [torch.nn.init]
    with contextlib.suppress(ImportError):
        places.append(importlib.import_module("transformers.initialization"))
    kept = [
        (place, name, getattr(place, name))
        for place in places
        for name in INITIALISERS
        if hasattr(place, name)
    ]
    for place, name, _ in kept:
        setattr(place, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def load(model: Any, tensor: Callable[[str], Any]) -> None:
    """Fill every parameter that inference uses from `tensor(openpi key)`.

    Raises KeyError for a missing key and ValueError for a shape that differs.
    """
    for key, parameter in model.named_parameters():
        if key in HEADS:
            continue
        value = torch.as_tensor(tensor(key))
        if value.shape != parameter.shape:
            raise ValueError(
                f"{key}: LeRobot has shape {tuple(parameter.shape)}, the checkpoint {tuple(value.shape)}"
            )
        parameter.data.copy_(value)


@torch.no_grad()
def run(model: Any, policy: str, inputs: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """All stages of one observation, as NumPy arrays without a batch axis.

    inputs: images float32 (views, 3, H, W) in [-1, 1], image_mask (views,), tokens (L,), token_mask (L,),
    state (action_dim,), noise (horizon, action_dim). Works with LeRobot's and with openpi's torch module.
    """
    with recorded(model) as record:
        batch = {name: torch.from_numpy(np.array(value))[None] for name, value in inputs.items()}
        images, masks = list(batch["images"].unbind(1)), list(batch["image_mask"].unbind(1))
        state = (batch["state"],) if policy == "pi0" else ()
        actions = model.sample_actions(
            images,
            masks,
            batch["tokens"],
            batch["token_mask"],
            *state,
            noise=batch["noise"],
            num_steps=num_steps,
        )
    return stages(record, actions)


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[dict[str, Any]]:
    """Record what passes through the vision tower, `embed_prefix` and `denoise_step` of a model."""
    record: dict[str, Any] = {"vision": [], "velocities": []}
    embed_prefix, denoise_step = model.embed_prefix, model.denoise_step

    def embed(*args: Any, **kwargs: Any) -> Any:
        result = embed_prefix(*args, **kwargs)
        record["prefix_embeddings"], record["valid"] = result[0], result[1]
        return result

    def denoise(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"] if "past_key_values" in kwargs else args[2]
        if not record["velocities"]:
            record["keys"], record["values"] = zip(
                *((layer[0].clone(), layer[1].clone()) for layer in cache), strict=True
            )
        record["velocities"].append(denoise_step(*args, **kwargs))
        return record["velocities"][-1]

    tower = model.paligemma_with_expert.paligemma.model.vision_tower
    hook = tower.register_forward_hook(lambda _, __, out: record["vision"].append(out.last_hidden_state))
    model.embed_prefix, model.denoise_step = embed, denoise
    try:
        yield record
    finally:
        hook.remove()
        del model.embed_prefix, model.denoise_step


def stages(record: dict[str, Any], actions: Any) -> dict[str, Any]:
    """The record in the shapes of `flashrt_runtime.parity.stages.Stages`."""

    def caches(layers: Any) -> Any:  # each (1, kv_heads, P, head_dim)
        return torch.cat([layer.transpose(1, 2) for layer in layers])

    found = {
        "vision": torch.cat(record["vision"]),
        "valid": record["valid"][0],
        "prefix_embeddings": record["prefix_embeddings"][0],
        "keys": caches(record["keys"]),
        "values": caches(record["values"]),
        "velocities": torch.cat(record["velocities"]),
        "actions": actions[0],
    }
    return {
        name: (value if value.dtype == torch.bool else value.float()).numpy() for name, value in found.items()
    }


def run_job(job: dict[str, Any]) -> None:
    """Run one job and write its stages.

    job: policy, dims, horizon, action_dim, num_steps; files (safetensors) and keys {openpi key: stored key};
    inputs and out (.npz files).
    """
    safe_open: Any = importlib.import_module("safetensors").safe_open
    opened = [safe_open(file, "pt") for file in job["files"]]
    places = {stored: file for file in opened for stored in file.keys()}  # noqa: SIM118
    inputs = dict(np.load(job["inputs"]))
    model = build(job["policy"], job["dims"], job["horizon"], len(inputs["images"]), job["action_dim"])
    load(model, lambda key: places[job["keys"][key]].get_tensor(job["keys"][key]))
    np.savez(job["out"], **run(model, job["policy"], inputs, job["num_steps"]))


if __name__ == "__main__":
    run_job(json.loads(Path(sys.argv[1]).read_text()))
