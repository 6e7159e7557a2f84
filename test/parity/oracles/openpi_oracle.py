#!/usr/bin/env python
"""Runs openpi's torch model on cases: every stage, one file per case. Needs `make parity-env`.

PYTHONPATH=.venv-parity/openpi .venv-parity/bin/python test/parity/oracles/openpi_oracle.py --out DIR CASE …
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
import torch

torch.compile = lambda function, *_, **__: function  # the package compiles unconditionally

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import parity_cases  # noqa: E402
from lerobot_oracle import load_worker  # noqa: E402


def build(case):
    """openpi's model with the dimensions of a case and undefined weights."""
    import openpi.models.gemma as variants
    import openpi.models_pytorch.gemma_pytorch as parts
    import openpi.models_pytorch.pi0_pytorch as policies

    dims, vision = case.dims, case.dims["vision"]
    paligemma, expert = parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM

    def resized_paligemma(config):
        config.vision_config.hidden_size = vision["width"]
        config.vision_config.num_hidden_layers = vision["depth"]
        config.vision_config.intermediate_size = vision["mlp_dim"]
        config.vision_config.num_attention_heads = vision["num_heads"]
        config.vision_config.image_size = vision["image_size"]
        config.vision_config.projection_dim = config.projection_dim = dims["prefix"]["width"]
        config.text_config.vocab_size = config._vocab_size = dims["vocab_size"]
        return paligemma(config)

    def resized_expert(config):
        config.vocab_size = dims["vocab_size"]
        return expert(config)

    settings = types.SimpleNamespace(
        pi05=case.policy == "pi05",
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        dtype="float32",
        action_dim=32,
        action_horizon=case.horizon,
        pytorch_compile_mode=None,
    )
    kept = variants.get_config
    variants.get_config = lambda name: variants.Config(**dims["prefix" if name == "gemma_2b" else "expert"])
    parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM = resized_paligemma, resized_expert
    try:
        return policies.PI0Pytorch(settings).eval()
    finally:
        variants.get_config = kept
        parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM = paligemma, expert


@torch.no_grad()
def run_case(worker, case) -> dict[str, np.ndarray]:
    """All stages of one case."""
    model = build(case)
    worker.load(model, case.weights())
    inputs = {name: torch.from_numpy(np.array(value))[None] for name, value in case.inputs().items()}
    images, masks = list(inputs["images"].unbind(1)), list(inputs["image_mask"].unbind(1))
    prepared = (images, masks, inputs["tokens"], inputs["token_mask"], inputs["state"])
    model._preprocess_observation = lambda *_, **__: prepared  # the case is in model space already
    with worker.recorded(model) as record:
        observation = types.SimpleNamespace(state=inputs["state"])
        actions = model.sample_actions("cpu", observation, noise=inputs["noise"], num_steps=case.steps)
    return worker.stages(record, actions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("cases", nargs="+", help="names of cases")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    worker = load_worker()
    for name in arguments.cases:
        np.savez(arguments.out / f"{name}.npz", **run_case(worker, parity_cases.BY_NAME[name]))
        print(name, flush=True)


if __name__ == "__main__":
    main()
