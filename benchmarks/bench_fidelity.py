"""How far 16 bits move the actions: each precision as it is deployed, against float32, on realistic frames.

    python -m benchmarks.bench_fidelity --frames FRAMES.zip --precisions bf16 fp16 --out fidelity.json

frames: as `bench_calibration` takes them. Weights are random of the published dimensions, with attention
peaked by --query-scale; float32 runs with TF32 off. Actions are compared in model space, the robot's
dimensions, each sample by itself: a mean over samples hides the one that matters.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.bench_policy import commit
from benchmarks.calibration_rig import read_frames
from benchmarks.random_policy import random_checkpoint
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.options import Target
from flashrt_runtime.policy import Policy

RELATIVE_RMS, MAX_ABS, SIGN_FLOOR = 1e-2, 0.03, 0.05  # gates; signs count where |action| is above the floor


def actions(policy: Policy, frames: list[dict[str, Any]]) -> list[np.ndarray]:
    """Model-space actions of every frame, (horizon, robot's dof) float32 each, through what predict runs."""
    model, width = policy._model, policy.spec.action_dim
    assert model is not None
    return [np.asarray(policy._run(model, policy._encode(**frame)))[:, :width] for frame in frames]


def deployed(policy: str, precision: str, args: argparse.Namespace) -> list[np.ndarray]:
    """The same random weights in one precision."""
    device = torch.device(args.device)
    checkpoint = random_checkpoint(policy, 2, 10, 10, device, args.size, query_scale=args.query_scale)
    loaded = build_policy(checkpoint, Target(device, precision), Settings(2, None, 1, False, False))
    try:
        return actions(loaded, read_frames(args.frames)[: args.samples])
    finally:
        loaded.close()


def compare(got: list[np.ndarray], want: list[np.ndarray]) -> dict[str, Any]:
    """The worst sample in each measure, and which dimensions change their sign."""
    relative, largest, cosine, flips = [], [], [], []
    for mine, true in zip(got, want, strict=True):
        relative.append(float(np.linalg.norm(mine - true) / np.linalg.norm(true)))
        largest.append(float(np.abs(mine - true).max()))
        cosine.append(float((mine * true).sum() / (np.linalg.norm(mine) * np.linalg.norm(true))))
        changed = (np.sign(mine) != np.sign(true)) & (np.abs(true) > SIGN_FLOOR)
        flips.append(np.flatnonzero(changed.any(axis=0)).tolist())
    return {
        "samples": len(got),
        "relative_rms_worst": max(relative),
        "relative_rms_median": float(np.median(relative)),
        "max_abs_worst": max(largest),
        "cosine_worst": min(cosine),
        "sign_flips": sum(map(len, flips)),
        "flipped_dimensions": sorted({dimension for each in flips for dimension in each}),
        "holds": max(relative) <= RELATIVE_RMS and max(largest) <= MAX_ABS and not any(flips),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}, commit {result['commit']}; "
        f"random weights of size {result['size']}, q times {result['query_scale']:g}; against float32, worst "
        f"sample. Gates: relative rms {RELATIVE_RMS}, max-abs {MAX_ABS}, no sign flip above {SIGN_FLOOR}.",
        "",
        "| policy | samples | relative rms | median | max-abs | cosine | sign flips | gates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['samples']} | {row['relative_rms_worst']:.2e} | {row['relative_rms_median']:.2e} | "
        f"{row['max_abs_worst']:.4f} | {row['cosine_worst']:.6f} | {row['sign_flips']} | "
        f"{'hold' if row['holds'] else 'EXCEEDED'} |"
        for name, row in result["rows"].items()
    ]
    return "\n".join([*lines, "", f"- `{result['command']}`"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--policies", nargs="+", default=["pi05", "pi0"])
    parser.add_argument("--precisions", nargs="+", default=["bf16"])
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--query-scale", type=float, default=4.0, help="factor of q: 4 peaks the attention")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument("--out", type=Path, help="JSON to write; a .md beside it holds the table")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows = {}
    for policy in args.policies:
        want = deployed(policy, "fp32", args)
        for precision in args.precisions:
            rows[f"{policy}.{precision}"] = compare(deployed(policy, precision, args), want)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(),
        "command": report.command("bench_fidelity"),
        "size": args.size,
        "query_scale": args.query_scale,
        "rows": rows,
    }
    print(markdown(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
