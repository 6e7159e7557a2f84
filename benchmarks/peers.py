"""Peers measured in the same run, where they are installed: LeRobot's Pi0.5 on the same GPU, eager and
compiled.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import timing

TEXT_TOKENS = 48


def lerobot(
    views: list[int], steps: int, chunk: int, compiled: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows lerobot.eager.views<n> and lerobot.compiled.views<n>, each as soon as it is measured: wall of
    sample_actions in bfloat16, random weights.

    None, with a line that says so, where LeRobot cannot be imported. Compiling takes minutes, so that all of
    eager come first.
    """
    if importlib.util.find_spec("lerobot") is None:
        print("lerobot is not installed here: no rows of it (pip install lerobot==0.6.1)")
        return
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    for mode in ("eager", "compiled") if compiled else ("eager",):
        for count in views:
            config = PI05Config(
                dtype="bfloat16",
                chunk_size=chunk,
                n_action_steps=chunk,
                num_inference_steps=steps,
                device="cuda",
            )
            with torch.device("cuda"):
                model = PI05Pytorch(config).eval()
            images = [torch.rand(1, 3, 224, 224, device="cuda") * 2 - 1 for _ in range(count)]
            masks = [torch.ones(1, dtype=torch.bool, device="cuda")] * count
            tokens = torch.randint(3, 1000, (1, TEXT_TOKENS), device="cuda")
            valid = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device="cuda")
            sample = torch.compile(model.sample_actions) if mode == "compiled" else model.sample_actions

            @torch.no_grad()
            def call(
                sample: Any = sample,
                images: Any = images,
                masks: Any = masks,
                tokens: Any = tokens,
                valid: Any = valid,
            ) -> None:
                sample(images, masks, tokens, valid)
                torch.cuda.synchronize()

            started = time.perf_counter()
            call()
            first_s = time.perf_counter() - started
            wall = timing.summary(timing.wall_times(call, 30, warm=5))
            yield f"lerobot.{mode}.views{count}", {
                "wall_p50_ms": wall["p50"],
                "wall_p99_ms": wall["p99"],
                "first_call_s": first_s,
                "precision": "bf16",
                "chunk": chunk,
                "steps": steps,
            }
            del model, sample
            torch.cuda.empty_cache()
