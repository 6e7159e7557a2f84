"""Times of GPU work: medians and tails of graph replays and of calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

Summary = dict[str, float]


def summary(milliseconds: list[float]) -> Summary:
    """p50, p95 and p99, in milliseconds."""
    values = np.percentile(milliseconds, (50, 95, 99))
    return {"p50": float(values[0]), "p95": float(values[1]), "p99": float(values[2])}


def replay_times(replay: Callable[[], None], repeats: int, warm: int = 20) -> list[float]:
    """Device time of each call of `replay` on the current stream, by events, in milliseconds."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(warm):
        replay()
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        replay()
        end.record()
        end.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def wall_times(call: Callable[[], object], repeats: int, warm: int = 10) -> list[float]:
    """Wall time of each call, in milliseconds; the call waits for its own result."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def graph_time(work: Callable[[], object], repeats: int = 50) -> float:
    """Median device milliseconds of `work` replayed as a graph."""
    graph = capture(work)
    return summary(replay_times(graph.replay, repeats, warm=5))["p50"]
