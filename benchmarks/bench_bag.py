"""Time and memory that sampling observations from a bag takes.

    . scripts/env.sh && python -m benchmarks.bench_bag [--seconds 60] [--samples 64] [--storage mcap,sqlite3]
        [--compression none,message] [--directory DIR] [--json out.json]

Writes a bag of two raw 640 x 480 cameras at 30 Hz and joint states at 100 Hz (about 3.3 GB for 60 s) for each
combination, drops it from the page cache, and reads it in a process of its own, whose peak resident memory is
that of the whole process with numpy and OpenCV.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flashrt_ros.core.contract import RobotContract, StreamType, load_contract

SIZE, CAMERA_RATE = (640, 480), 30.0
GOAL_SECONDS, GOAL_MB = 10.0, 600.0


def raw_contract() -> RobotContract:
    """The demo arm with raw images only."""
    contract = load_contract("demo_arm")
    streams = {
        name: replace(stream, type=StreamType.IMAGE) if stream.is_image else stream
        for name, stream in contract.streams.items()
    }
    return replace(contract, streams=MappingProxyType(streams))


def evict(path: Path) -> None:
    """Drop a bag's files from the page cache, as far as the system allows."""
    for file in path.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(path: Path, samples: int) -> dict[str, Any]:
    """Sample the bag in this process."""
    from flashrt_ros.core.bag_source import BagSource

    begin = time.perf_counter()
    with BagSource(path, raw_contract(), samples=samples) as source:
        for _ in source:
            pass
    # Not ru_maxrss: that of the process which started this one is carried over into it.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time(),
        "peak_mb": peak / 1024,
        "used": source.used,
    }


def run(directory: Path, storage: str, compression: str, seconds: float, samples: int) -> dict[str, Any]:
    """Write, evict and measure one bag."""
    from .synthetic_bag import write_bag

    path = directory / f"{storage}_{compression or 'none'}"
    write_bag(
        path, raw_contract(), seconds, storage=storage, compression=compression, size=SIZE,
        camera_rate=CAMERA_RATE,
    )
    evict(path)
    module = [sys.executable, "-m", "benchmarks.bench_bag"]
    command = [*module, "--measure", str(path), "--samples", str(samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    for file in path.iterdir():
        file.unlink()
    figures: dict[str, Any] = json.loads(done.stdout)
    return {"storage": storage, "compression": compression or "none", "bag_mb": megabytes, **figures}


def main() -> int:
    """Command line; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--storage", default="mcap,sqlite3")
    parser.add_argument("--compression", default="none")
    parser.add_argument("--directory", type=Path, help="where the bags are written; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.samples)))
        return 0
    results = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for storage in options.storage.split(","):
            for compression in options.compression.split(","):
                kind = "" if compression == "none" else compression
                result = run(Path(directory), storage, kind, options.seconds, options.samples)
                results.append(result)
                print(
                    "{storage:8s} {compression:8s} {bag_mb:7.0f} MB: {used} observations in {seconds:.2f} s "
                    "({cpu_seconds:.2f} s CPU), peak {peak_mb:.0f} MB".format(**result),
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    missed = [item for item in results if item["seconds"] > GOAL_SECONDS or item["peak_mb"] > GOAL_MB]
    print(f"goal: {GOAL_SECONDS:g} s, {GOAL_MB:g} MB: {'missed' if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
