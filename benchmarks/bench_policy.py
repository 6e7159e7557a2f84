"""A policy's latency on this GPU: graph and wall, stage by stage, beside the ceilings of the machine and its
peers.

    python -m benchmarks.bench_policy --policy pi05 --views 2 --precision fp8 --against lerobot

Weights are random, of the published dimensions, drawn on the GPU (see `random_policy`), so load_s covers
drawing, quantising, graph capture and autotune, and reads no file. Rows are merged into
docs/gpu_report.json by key (<policy>.<precision>.views<n>[.chunk<m>]), each as soon as it is measured, and
may be asked for by key (--rows); docs/gpu_report.md and the chart are written from that file alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers, rates, report, timing
from benchmarks.random_policy import random_checkpoint
from flashrt_runtime.engine import Engine
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.options import PRECISIONS, Target
from flashrt_runtime.policy import Policy

PROMPTS = ("pick up the red block", "open the drawer", "push the plate to the left", "close it")
CAMERA = (480, 640, 3)


class Example:
    """Observations of a robot with `views` cameras; every call draws another one."""

    def __init__(self, views: int, state_dim: int) -> None:
        self.rng = np.random.default_rng(0)
        self.views, self.state_dim = views, state_dim
        self.frames = [self.rng.integers(0, 256, CAMERA, dtype=np.uint8) for _ in range(8)]

    def images(self) -> list[np.ndarray]:
        return [self.frames[index] for index in self.rng.integers(0, len(self.frames), self.views)]

    def state(self) -> np.ndarray:
        return self.rng.uniform(-0.3, 0.3, self.state_dim).astype(np.float32)


def stages(engine: Engine, model: FlowPolicy, bucket: int) -> dict[str, float]:
    """Median milliseconds of each stage as a graph of its own."""
    tokens = engine.staging.tokens[:bucket]
    with torch.inference_mode(), torch.cuda.stream(engine.stream):
        patches = engine.images()
        features = model.paligemma.embed_images(patches)
        embedded = model.paligemma.embed(features, tokens)
        model.prefill_padded(features, tokens)
        from flashrt_runtime.layers.kv_cache import Window

        def prefix() -> None:
            window = Window.padded(embedded.shape[0], model.prefix_length)
            model.paligemma.fill_cache(embedded, model.rope, model.cache, window)

        def expert() -> None:
            engine.actions.copy_(engine.staging.noise)
            model.integrate(engine.actions)

        engine.stream.synchronize()
        with_calibration = {
            "images": engine.images,
            "vision": lambda: model.paligemma.vision(patches),
            "embed": lambda: model.paligemma.embed(features, tokens),
            "prefix": prefix,
            "expert": expert,
        }
        return {name: timing.graph_time(work) for name, work in with_calibration.items()}


def transfers(engine: Engine, example: Example) -> dict[str, float]:
    """Milliseconds of staging on the host, and of the copies to the device and back."""
    staging, config = engine.staging, engine.model.config
    noise = np.zeros((config.horizon, config.action_dim), np.float32)
    tokens = np.ones(40, np.int64)
    images = example.images()
    count = staging.write_images(images)

    def write_all() -> None:
        staging.write_images(images)
        staging.write(552, tokens, None, noise)

    def upload_all() -> None:
        staging.upload_images(count)
        staging.upload()

    write = timing.wall_times(write_all, 100)
    with torch.cuda.stream(engine.stream):
        up = timing.replay_times(upload_all, 100)
        down = timing.replay_times(lambda: staging.actions.copy_(engine.actions, non_blocking=True), 100)
    names = ("staging", "h2d", "d2h")
    return {name: timing.summary(times)["p50"] for name, times in zip(names, (write, up, down), strict=True)}


def prompt_changes(policy: Policy, example: Example, plain_ms: float, repeats: int = 200) -> dict[str, float]:
    """What a predict with another prompt and state costs more, and what it allocates and captures."""
    engine = policy._engine
    assert engine is not None
    allocated = "allocation.all.allocated"
    images = example.images()
    before, captures = torch.cuda.memory_stats()[allocated], engine.captures
    times = []
    for index in range(repeats):
        start = time.perf_counter()
        policy.predict(images, PROMPTS[index % len(PROMPTS)], example.state(), seed=index)
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "extra_ms": timing.summary(times)["p50"] - plain_ms,
        "device_allocations": torch.cuda.memory_stats()[allocated] - before,
        "captures": engine.captures - captures,
    }


@dataclass(frozen=True)
class Row:
    """What one row of the report measures."""

    policy: str
    precision: str
    views: int
    chunk: int = 10

    @property
    def key(self) -> str:
        """<policy>.<precision>.views<n>[.chunk<m>]"""
        chunk = "" if self.chunk == 10 else f".chunk{self.chunk}"
        return f"{self.policy}.{self.precision}.views{self.views}{chunk}"

    @classmethod
    def of(cls, key: str) -> Row:
        """The row of a key. Raises SystemExit for anything else."""
        found = re.fullmatch(r"(pi05|pi0)\.(\w+)\.views([123])(?:\.chunk(\d+))?", key)
        if found is None or found[2] not in PRECISIONS:
            sys.exit(f"--rows {key}: expected <policy>.<precision>.views<n>[.chunk<m>], as pi05.fp8.views2")
        return cls(found[1], found[2], int(found[3]), int(found[4] or 10))


def wanted_rows(args: argparse.Namespace) -> list[Row]:
    """Those of --rows, or one for each of --views."""
    if args.rows:
        return [Row.of(key) for key in args.rows]
    return [Row(args.policy, args.precision, views, args.chunk) for views in args.views]


def measure(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """One row of the report."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    checkpoint = random_checkpoint(row.policy, row.views, row.chunk, args.steps, device, args.size)
    policy = build_policy(
        checkpoint, Target(device, row.precision), Settings(row.views, None, 3, False, False)
    )
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    example = Example(row.views, checkpoint.state_dim or 0)
    images, state = example.images(), example.state()
    policy.predict(images, PROMPTS[0], state, seed=0)
    first_s = time.perf_counter() - started
    if row.precision == "fp8":
        policy.calibrate({"images": example.images(), "state": example.state(), "seed": i} for i in range(8))
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    tokens = len(policy._encode(images, state=state, seed=0).tokens)
    bucket = engine.bucket_of(tokens)
    with torch.cuda.stream(engine.stream):
        replays = timing.replay_times(partial(engine.replay, bucket), args.replays)
    calls = timing.wall_times(lambda: policy.predict(example.images(), None, state, seed=1), args.calls)
    graph, wall = timing.summary(replays), timing.summary(calls)
    moved = transfers(engine, example)
    result = {
        "graph_p50_ms": graph["p50"],
        "graph_p95_ms": graph["p95"],
        "graph_p99_ms": graph["p99"],
        "wall_p50_ms": wall["p50"],
        "wall_p95_ms": wall["p95"],
        "wall_p99_ms": wall["p99"],
        "host_ms": wall["p50"] - graph["p50"] - moved["h2d"] - moved["d2h"],
        "stages_ms": stages(engine, model, bucket) | moved,
        "prompt_tokens": tokens,
        "bucket": bucket,
        "chunk": row.chunk,
        "steps": args.steps,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "load_s": load_s,
        "first_action_s": first_s,
        "prompt_change": prompt_changes(policy, example, wall["p50"]),
    }
    policy.close()
    del engine, model
    return result


def commit() -> str:
    """The checkout's commit, "unknown" outside one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="pi05", choices=("pi05", "pi0"))
    parser.add_argument("--views", type=int, nargs="+", default=[2], help="camera counts, one row each")
    parser.add_argument("--precision", default="fp8", choices=tuple(PRECISIONS))
    parser.add_argument("--steps", type=int, default=10, help="denoise steps")
    parser.add_argument("--chunk", type=int, default=10, help="actions per chunk")
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--rows", nargs="+", help="rows by key, in place of the options above")
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--against", choices=("lerobot",), help="a peer measured in the same run")
    parser.add_argument(
        "--rates", action="store_true", help="also GEMM and attention rates, and the ceilings"
    )
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="directory of gpu_report.{json,md,png}"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_policy needs a CUDA GPU: none was found")
    header = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(),
        "command": report.command("bench_policy"),
    }
    walls = {}
    for row in wanted_rows(args):
        measured = measure(args, row)
        walls[row] = measured["wall_p50_ms"]
        print(row.key, json.dumps(measured, indent=1))
        report.write(args.out, header, {row.key: measured})
    if args.rates:
        report.write(args.out, header, {"rates": rates.measure(args.precision)})
    if args.against == "lerobot":  # last: compiling takes minutes
        for key, measured in peers.lerobot(args.views, args.steps, args.chunk):
            print(key, json.dumps(measured, indent=1))
            ours = {
                row.key: wall
                for row, wall in walls.items()
                if key.endswith(f".views{row.views}") and row.chunk == args.chunk
            }
            report.write(args.out, header, {key: measured | {"ours_wall_ms": ours}})


if __name__ == "__main__":
    main()
