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
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.bench_policy import commit
from benchmarks.calibration_rig import Rig
from benchmarks.calibration_tables import drift_table, held_out_table, median_time
from flashrt_runtime.cache import content_digest
from flashrt_runtime.quantization import artifact
from flashrt_runtime.quantization.artifact import Calibration, CalibrationIdentity
from flashrt_runtime.quantization.calibration import estimate

GATE_RATIO, GATE_COSINE = 1.5, 0.998


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

        load_s = median_time(load, 7)
        weights = Path(directory) / "weights"
        block = np.random.default_rng(0).bytes(1 << 26)
        with weights.open("wb") as stream:
            for _ in range(rig.args.digest_gb * 15):
                stream.write(block)
        size = weights.stat().st_size / 1e9
        digest_s = median_time(lambda: content_digest([weights]), 3)
        remember = Path(directory) / "digests.json"
        content_digest([weights], remember)
        remembered_s = median_time(lambda: content_digest([weights], remember), 3)
    rig.deployed(0)
    return {
        "scales_load_ms": load_s * 1e3,
        "recaptures": (engine.captures if engine is not None else 0) - captures,
        "digest_s_per_gb": digest_s / size,
        "digest_7gb_s": 7 * digest_s / size,
        "digest_remembered_ms": remembered_s * 1e3,
        "one_sample_s": median_time(lambda: rig.put([0], {}), 3),
        "estimate_s": _estimate_time(rig),
    }


def _estimate_time(rig: Rig) -> float:
    collector = rig.calibrator.collector()
    with collector.observe():
        rig.policy._eager(rig.model, rig.frames[0])
    return median_time(lambda: estimate(collector, "mse", None), 3)


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}, commit {result['commit']}; "
        f"{result['weights']}; {result['frames']} frames, {result['held_out']} held out, "
        f"{result['draws']} draws, {result['steps']} denoise steps, {result['chunk']} actions.",
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
    parser.add_argument("--chunk", type=int, default=10, help="actions of a random policy's chunk")
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
        "chunk": rig.checkpoint.config.horizon,
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
