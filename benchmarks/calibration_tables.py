"""Tables of `bench_calibration`: error on held-out frames, and drift of every stage from float32."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.calibration_rig import ESTIMATORS, Rig
from flashrt_runtime.layers.linear import Linear
from flashrt_runtime.ops import E4M3_MAX, quantise
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.stages import Stages
from flashrt_runtime.quantization.calibration import action_error
from flashrt_runtime.quantization.fp8 import fp8_linears


def held_out_table(rig: Rig, held: list[int], rest: list[int]) -> list[dict[str, Any]]:
    """Error on the held-out frames for each number of samples and estimator, over several draws."""
    reference = {index: rig.unquantised(index) for index in held}
    rows = []
    for count in rig.args.samples:
        errors: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in ESTIMATORS}
        for draw in range(rig.args.draws):
            chosen = np.roll(rest, -(draw * len(rest) // rig.args.draws))[:count].tolist()
            for name, scales in rig.put(chosen, ESTIMATORS).items():
                rig.calibrator.apply(scales)
                errors[name].append([action_error(rig.deployed(i), reference[i]) for i in held])
        for name, draws in errors.items():
            relative = [statistics.fmean(row[1] for row in draw) for draw in draws]
            worst = [max(row[0] for row in draw) for draw in draws]
            rows.append(
                {
                    "samples": count,
                    "estimator": name,
                    "relative_rms": statistics.fmean(relative),
                    "relative_rms_spread": statistics.stdev(relative) if len(relative) > 1 else 0.0,
                    "max_abs": statistics.fmean(worst),
                    "max_abs_spread": statistics.stdev(worst) if len(worst) > 1 else 0.0,
                    "cosine_worst": min(row[2] for draw in draws for row in draw),
                }
            )
    return rows


def stage_arrays(stages: Stages) -> dict[str, np.ndarray]:
    """Every stage whose drift is gated, by name."""
    found = {"vision": stages.vision}
    for layer in range(len(stages.keys)):
        found[f"keys {layer}"] = stages.keys[layer][stages.valid]
        found[f"values {layer}"] = stages.values[layer][stages.valid]
    return found | {f"velocity {step}": each for step, each in enumerate(stages.velocities)}


@torch.no_grad()
def drift_table(rig: Rig, held: list[int], rest: list[int]) -> dict[str, Any]:
    """Drift of every stage from float32, of fp8 and of float32 with its weights rounded alone."""
    frames = [rig.inputs(rig.frames[index]) for index in held]
    exact_model = rig.plain(torch.float32)
    exact = [capture(exact_model, frame) for frame in frames]
    for module in exact_model.modules():
        if isinstance(module, Linear):
            scale = module.weight.abs().amax() / E4M3_MAX
            module.weight.copy_(quantise(module.weight, scale).float() * scale)
    rounded = [capture(exact_model, frame) for frame in frames]
    del exact_model
    bf16_model = rig.plain(torch.bfloat16)
    bf16 = [capture(bf16_model, frame).actions[:, : rig.width] for frame in frames]
    del bf16_model
    rig.calibrator.apply(rig.put(rest[:8], {"mse": ESTIMATORS["mse"]})["mse"])

    def as_deployed() -> tuple[list[np.ndarray], list[Stages], float]:
        actions = [rig.deployed(index) for index in held]
        predict_s = median_time(lambda: rig.deployed(held[0]), 50)
        fused, rig.model.fused_expert = rig.model.fused_expert, None  # it has no velocities to record
        stages = [capture(rig.model, frame) for frame in frames]
        rig.model.fused_expert = fused
        return actions, stages, predict_s

    fp8, ours, nearest_s = as_deployed()
    compensate_s = rig.compensate(rest[:8])
    better, better_stages, compensated_s = as_deployed()
    compensated_model = rig.plain(torch.float32)
    for name, linear in fp8_linears(rig.model).items():
        compensated_model.get_submodule(name).weight.copy_(linear.weight.float() * linear.weight_scale)
    compensated = [capture(compensated_model, frame) for frame in frames]
    del compensated_model

    def worst(runs: list[Stages]) -> dict[str, float]:
        found: dict[str, float] = {}
        for run, want in zip(runs, exact, strict=True):
            true = stage_arrays(want)
            for name, array in stage_arrays(run).items():
                error = float(np.linalg.norm(array - true[name]) / np.linalg.norm(true[name]))
                found[name] = max(error, found.get(name, 0.0))
        return found

    mine, bound = worst(ours), worst(rounded)
    after, least = worst(better_stages), worst(compensated)
    rows = [
        {
            "stage": name,
            "fp8": mine[name],
            "weights_alone": bound[name],
            "ratio": mine[name] / bound[name],
            "fp8_compensated": after[name],
            "compensated_alone": least[name],
        }
        for name in mine
    ]
    true = [each.actions[:, : rig.width] for each in exact]
    actions = {
        name: [action_error(one, other) for one, other in zip(got, want, strict=True)]
        for name, got, want in (
            ("fp8 against fp32", fp8, true),
            ("fp8 against bf16", fp8, bf16),
            ("bf16 against fp32", bf16, true),
            ("weights alone against fp32", [each.actions[:, : rig.width] for each in rounded], true),
            ("fp8, compensated weights, against fp32", better, true),
            (
                "compensated weights alone against fp32",
                [each.actions[:, : rig.width] for each in compensated],
                true,
            ),
        )
    }
    return {
        "stages": rows,
        "actions": {
            name: {
                "max_abs": max(row[0] for row in each),
                "relative_rms": max(row[1] for row in each),
                "cosine_worst": min(row[2] for row in each),
            }
            for name, each in actions.items()
        },
        "times": {
            "compensate_s": compensate_s,
            "predict_nearest_ms": nearest_s * 1e3,
            "predict_compensated_ms": compensated_s * 1e3,
        },
    }


def median_time(call: Callable[[], object], repeats: int) -> float:
    """Seconds."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
