"""What batching would cost and bring, computed: several robots on one GPU, one by one or together.

    python -m benchmarks.batching --compute-ms 4.4 --weights-ms 3.9 --robots 4 --period-ms 200

compute-ms is the part of an inference that grows with the batch (vision tower and prefix: products over 560
rows that fill the GPU), weights-ms the part that does not (the action expert: ten rows against weights that
are read once for the whole batch). Both are in docs/performance_log.md for one GPU. Robots ask periodically,
each at a phase of its own; the figures are of the time from asking to the answer, over many random phases.
"""

from __future__ import annotations

import argparse

import numpy as np


def service_ms(batch: int, compute_ms: float, weights_ms: float) -> float:
    """Time of one forward over a batch."""
    return batch * compute_ms + weights_ms


def simulate(
    phases: np.ndarray,
    period_ms: float,
    largest: int,
    window_ms: float,
    cost: tuple[float, float],
    rounds: int,
) -> np.ndarray:
    """Latencies of `rounds` observations of every robot.

    The server takes what waits, at most `largest` at once; with a window it first waits that long for others
    to come, unless the batch is full.
    """
    asked = np.sort((phases[None, :] + period_ms * np.arange(rounds)[:, None]).ravel())
    latencies = []
    free, index = 0.0, 0
    while index < len(asked):
        start = max(free, asked[index])
        full = index + largest - 1
        if largest > 1 and window_ms > 0:
            filled = asked[full] if full < len(asked) else np.inf
            start = max(start, min(asked[index] + window_ms, filled))
        taken = int(np.searchsorted(asked[index : index + largest], start, side="right"))
        free = start + service_ms(taken, *cost)
        latencies += list(free - asked[index : index + taken])
        index += taken
    return np.array(latencies)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute-ms", type=float, default=4.4)
    parser.add_argument("--weights-ms", type=float, default=3.9)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 4, 8, 16, 24])
    parser.add_argument("--period-ms", type=float, default=200.0, help="between the observations of a robot")
    parser.add_argument("--window-ms", type=float, default=5.0, help="wait for a batch to fill")
    parser.add_argument("--batch", type=int, default=8, help="largest batch")
    args = parser.parse_args()
    cost = (args.compute_ms, args.weights_ms)
    rng = np.random.default_rng(0)
    modes = {
        "one at a time": (1, 0.0),
        f"up to {args.batch}, no window": (args.batch, 0.0),
        f"up to {args.batch}, window {args.window_ms:g} ms": (args.batch, args.window_ms),
    }
    together = service_ms(args.batch, *cost)
    print(f"one inference {service_ms(1, *cost):.1f} ms, {args.batch} together {together:.1f} ms")
    print("| robots | " + " | ".join(f"{name}: p50, p99" for name in modes) + " |")
    print("| --- |" + " --- |" * len(modes))
    for robots in args.robots:
        cells = []
        for largest, window in modes.values():
            runs = [
                simulate(rng.uniform(0, args.period_ms, robots), args.period_ms, largest, window, cost, 20)
                for _ in range(100)
            ]
            p50, p99 = np.percentile(np.concatenate(runs), [50, 99])
            cells.append(f"{p50:.1f}, {p99:.1f} ms")
        print(f"| {robots} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
