"""From a checkpoint on disk to the first action, each in a process of its own, files in the page cache.

    python -m benchmarks.bench_load --checkpoint DIR --precisions bf16 fp8 --out load.json

Without --checkpoint, one of the published dimensions is written first (`flashrt make-checkpoint --size full`,
7.5 GB). A precision is loaded twice: with an empty cache of quantised weights, and with what that run left.
Times exclude the start of the interpreter and the import of torch; they begin with CUDA not yet initialised.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench_policy import commit

LOAD_S, FIRST_ACTION_S, HOST_SHARE = 5.0, 6.0, 1.3  # of 7 GB in the page cache
CAMERA = (480, 640, 3)


def child(directory: str, precision: str, hardware: str) -> dict[str, float]:
    """Load and predict in this process; seconds and GiB."""
    import numpy as np
    import torch

    import flashrt_runtime

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    policy = flashrt_runtime.load_model(directory, config="auto", hardware=hardware, precision=precision)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, CAMERA, dtype=np.uint8) for _ in policy.spec.views]
    policy.predict(images, "pick up the red block", np.zeros(policy.spec.state_dim or 0, np.float32), seed=0)
    first = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    policy.close()
    return {
        "load_s": loaded,
        "first_action_s": first,
        "host_peak_gib": peak / 2**20,
        "host_peak_before_gib": before / 2**20,
    }


def measure(directory: Path, precision: str, hardware: str, cache: str) -> dict[str, float]:
    """`child` in a fresh process with its own cache directory."""
    code = (
        "import json, sys; from benchmarks.bench_load import child; "
        f"print('RESULT' + json.dumps(child({str(directory)!r}, {precision!r}, {hardware!r})))"
    )
    environment = os.environ | {"FLASHRT_CACHE_DIR": cache, "FLASH_RT_HOME": cache}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"loading in {precision} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(lines[0].removeprefix("RESULT"))
    return result


def device_name() -> str:
    """What the children load to."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def markdown(result: dict[str, Any]) -> str:
    """The table, and whether the bounds hold."""
    size, rows = result["file_gib"], result["rows"]
    lines = [
        f"{result['device']}, {result['date']}, commit {result['commit']}; {size:.2f} GiB in the page "
        "cache. cold: nothing in the cache of quantised weights; warm: what the cold load left.",
        "",
        "| precision | load s | first action s | host peak GiB | of the file |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['load_s']:.2f} | {row['first_action_s']:.2f} | {row['host_peak_gib']:.2f} | "
        f"{row['host_peak_gib'] / size:.2f} |"
        for name, row in rows.items()
    ]
    return "\n".join([*lines, "", *gates(size, rows), f"- `{result['command']}`"]) + "\n"


def gates(size: float, rows: dict[str, Any]) -> list[str]:
    """Each bound of a checkpoint of the published size, and whether it holds; none for a smaller one."""
    if size < 1.0:
        return []
    checks = [
        (name, rows[name][figure], bound)
        for name, figure, bound in (
            ("bf16.warm", "load_s", LOAD_S),
            ("fp8.warm", "first_action_s", FIRST_ACTION_S),
        )
        if name in rows
    ]
    lines = [
        report.gate(value <= bound, f"{name} {value:.2f} s <= {bound} s") for name, value, bound in checks
    ]
    peak = max(row["host_peak_gib"] for row in rows.values()) / size
    text = f"host peak over the file's size {peak:.2f} <= {HOST_SHARE}"
    lines.append(report.gate(peak <= HOST_SHARE, text))
    return [f"- {line}" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument("--out", type=Path, help="JSON to write; a .md beside it holds the table")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = args.checkpoint
        if directory is None:
            from flashrt_runtime.untrained.random import make_checkpoint

            directory = make_checkpoint(Path(folder) / "checkpoint", size=args.size)
        weights = directory / "model.safetensors"
        size = weights.stat().st_size / 2**30
        with weights.open("rb") as stream:  # into the page cache
            while stream.read(1 << 26):
                pass
        for precision in args.precisions:
            cache = str(Path(folder) / f"cache-{precision}")
            for name in ("cold", "warm"):
                rows[f"{precision}.{name}"] = measure(directory, precision, args.hardware, cache)
    result = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": args.commit or commit(),
        "command": report.command("bench_load"),
        "file_gib": size,
        "rows": rows,
    }
    print(markdown(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
