"""What calibration buys on this device: held-out error by estimator and number of samples, drift of every
stage against rounding the weights alone, by nearest and by compensated rounding, and the time that rounding,
a digest and a load of scales take.

    python -m benchmarks.bench_calibration --frames FRAMES.zip [--checkpoint DIR] --out calibration.json

frames: a ZIP of NNN_base.png and NNN_wrist.png with a meta.json (prompt, eef_pos, eef_quat_xyzw, gripper_qpos
of each). Without --checkpoint, weights are random of the dimensions of --size, drawn on the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks import report
from benchmarks.bench_policy import commit
from benchmarks.random_policy import random_checkpoint
from flashrt_runtime import models
from flashrt_runtime.cache import content_digest
from flashrt_runtime.checkpoints import Checkpoint, open_checkpoint
from flashrt_runtime.inputs import ModelInputs
from flashrt_runtime.layers.linear import Linear
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.ops import E4M3_MAX, quantise
from flashrt_runtime.options import Target
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.stages import Inputs, Stages
from flashrt_runtime.policy import Policy
from flashrt_runtime.processing.images import prepare_image
from flashrt_runtime.quantization import artifact
from flashrt_runtime.quantization.artifact import Calibration, CalibrationIdentity
from flashrt_runtime.quantization.calibration import action_error, estimate
from flashrt_runtime.quantization.estimators import resolve_estimator
from flashrt_runtime.quantization.fp8 import fp8_linears

ESTIMATORS = {
    "mse": ("mse", None),
    "percentile 99.9": ("percentile", 99.9),
    "percentile 99.99": ("percentile", 99.99),
    "percentile 99.999": ("percentile", 99.999),
    "max": ("max", None),
}
GATE_RATIO, GATE_COSINE = 1.5, 0.998


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
            "pi05", 2, 10, args.steps, self.device, args.size, query_scale=args.query_scale
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
        predict_s = _median(lambda: rig.deployed(held[0]), 50)
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


def times(rig: Rig) -> dict[str, float]:
    """Seconds: a load of scales into the live buffers, and the digest of a file in the page cache."""
    calibration = rig.policy._calibration
    assert calibration is not None
    identity = CalibrationIdentity("0", "0", dataclasses.asdict(rig.checkpoint.config), "fp8", ("a", "b"))
    scales = rig.calibrator.scales()
    content = Calibration(scales, np.ones((256, len(scales)), np.float32), 256, "mse")
    engine = rig.policy._engine
    captures = engine.captures if engine is not None else 0
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "scales.safetensors"
        artifact.write(file, content, identity)

        def load() -> None:
            calibration.put(artifact.read(file, identity))
            if rig.device.type == "cuda":
                torch.cuda.synchronize()

        load_s = _median(load, 7)
        weights = Path(directory) / "weights"
        block = np.random.default_rng(0).bytes(1 << 26)
        with weights.open("wb") as stream:
            for _ in range(rig.args.digest_gb * 15):
                stream.write(block)
        size = weights.stat().st_size / 1e9
        digest_s = _median(lambda: content_digest([weights]), 3)
        remember = Path(directory) / "digests.json"
        content_digest([weights], remember)
        remembered_s = _median(lambda: content_digest([weights], remember), 3)
    rig.deployed(0)
    return {
        "scales_load_ms": load_s * 1e3,
        "recaptures": (engine.captures if engine is not None else 0) - captures,
        "digest_s_per_gb": digest_s / size,
        "digest_7gb_s": 7 * digest_s / size,
        "digest_remembered_ms": remembered_s * 1e3,
        "one_sample_s": _median(lambda: rig.put([0], {}), 3),
        "estimate_s": _estimate_time(rig),
    }


def _estimate_time(rig: Rig) -> float:
    collector = rig.calibrator.collector()
    with collector.observe():
        rig.policy._eager(rig.model, rig.frames[0])
    return _median(lambda: estimate(collector, "mse", None), 3)


def _median(call: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}, commit {result['commit']}; "
        f"{result['weights']}; {result['frames']} frames, {result['held_out']} held out, "
        f"{result['draws']} draws, {result['steps']} denoise steps.",
        "",
        "| samples | estimator | relative rms, mean ± spread | max-abs, mean ± spread | worst cosine |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['samples']} | {row['estimator']} | {row['relative_rms']:.5f} ± "
        f"{row['relative_rms_spread']:.5f} | {row['max_abs']:.5f} ± {row['max_abs_spread']:.5f} | "
        f"{row['cosine_worst']:.6f} |"
        for row in result["held_out_error"]
    ]
    drift = result["drift"]
    lines += ["", "| stage | fp8 | weights alone | ratio | fp8, compensated | compensated alone |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {row['stage']} | {row['fp8']:.4f} | {row['weights_alone']:.4f} | {row['ratio']:.2f} | "
        f"{row['fp8_compensated']:.4f} | {row['compensated_alone']:.4f} |"
        for row in drift["stages"]
    ]
    lines += ["", "| actions | max-abs | relative rms | worst cosine |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['max_abs']:.4f} | {row['relative_rms']:.4f} | {row['cosine_worst']:.6f} |"
        for name, row in drift["actions"].items()
    ]
    lines += [""] + [f"- {text}" for text in result["gates"]]
    lines += [f"- {name}: {value:.4g}" for name, value in (drift["times"] | result["times"]).items()]
    lines.append(f"- `{result['command']}`")
    return "\n".join(lines) + "\n"


def gates(drift: dict[str, Any]) -> list[str]:
    """Each bound, and whether it holds."""
    worst = max(drift["stages"], key=lambda row: row["ratio"])
    checks = [
        (worst["ratio"] <= GATE_RATIO, f"worst stage {worst['stage']}: {worst['ratio']:.2f} <= {GATE_RATIO}")
    ]
    for name in ("fp8 against fp32", "fp8, compensated weights, against fp32"):
        cosine = drift["actions"][name]["cosine_worst"]
        text = f"worst sample's cosine, {name}: {cosine:.5f} >= {GATE_COSINE}"
        checks.append((cosine >= GATE_COSINE, text))
    return [report.gate(held, text) for held, text in checks]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--query-scale", type=float, default=1.0, help="of random weights: 4 peaks attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10, help="denoise steps")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--digest-gb", type=int, default=2, help="size of the file that is digested")
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument("--out", type=Path, help="JSON to write; a .md beside it holds the tables")
    args = parser.parse_args()
    started = time.perf_counter()
    rig = Rig(args)
    order = np.random.default_rng(0).permutation(len(rig.frames)).tolist()
    held, rest = order[: args.held_out], order[args.held_out :]
    name = torch.cuda.get_device_name() if rig.device.type == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(),
        "command": report.command("bench_calibration"),
        "weights": str(args.checkpoint or f"random weights of size {args.size}, q x {args.query_scale:g}"),
        "frames": len(rig.frames),
        "held_out": len(held),
        "draws": args.draws,
        "steps": rig.checkpoint.config.num_steps,
        "held_out_error": held_out_table(rig, held, rest),
        "drift": drift_table(rig, held, rest),
    }
    result["gates"] = gates(result["drift"])
    result["times"] = times(rig) | {"whole_run_s": time.perf_counter() - started}
    print(markdown(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
