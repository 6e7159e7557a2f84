#!/usr/bin/env python3
"""The pictures and the table of docs/rtc.md: `python scripts/rtc_figures.py [--out docs/images]`.

One joint follows chunks of 50 actions at 50 Hz; an inference takes 6 periods. The chunks are drawn from a
Gaussian process around a sine, off by a random offset for each observation, through the runtime's own loop
over denoise steps; the velocity is that of the process, exact, in place of a network. The timeline is the
node's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from flashrt_ros.core.contract import Representation
from flashrt_ros.core.delay import DelayEstimate
from flashrt_ros.core.timeline import Accepted, Timeline
from flashrt_runtime.models.flow import FlowPolicy, Guide
from flashrt_runtime.processing.guidance import SCHEDULES, gains, prefix_weights

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PERIOD = 20_000_000  # [ns]
ROWS, STEPS, LATENCY, HORIZON = 50, 10, 6, 20
SMOOTH, SPREAD, OFFSET = 12.0, 0.06, 0.05  # correlation [actions], deviation within and between chunks [rad]
MODES = ("off", "blend", "guided", "trained")
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


class ProcessFlow:
    """The loop of FlowPolicy over the flow of a Gaussian process: x1 ~ N(mean, covariance)."""

    fused_expert = None
    guide: Guide | None = None
    integrate = FlowPolicy.integrate
    guided_velocity = FlowPolicy.guided_velocity

    def __init__(self) -> None:
        rows = torch.arange(ROWS, dtype=torch.float64)
        distance = rows[:, None] - rows
        self.covariance = SPREAD**2 * torch.exp(-0.5 * (distance / SMOOTH) ** 2)
        self.covariance += 1e-8 * torch.eye(ROWS, dtype=torch.float64)
        self.mean = torch.zeros(ROWS, dtype=torch.float64)
        self.config = type("Config", (), {"num_steps": STEPS})

    def begin_suffix(self) -> None:
        """Nothing to place."""

    def velocity(self, x: torch.Tensor, step: int, clean: torch.Tensor | None = None) -> torch.Tensor:
        """(x - E[x1 | x]) / t, given the clean rows as they are."""
        time = 1.0 - step / STEPS
        mean, covariance = self.mean, self.covariance
        values = x[:, 0].double()
        if clean is not None and bool(clean.any()):
            known = clean.nonzero()[:, 0]
            factor = torch.linalg.solve(covariance[known][:, known], covariance[known]).T
            mean = mean + factor @ (values[known] - mean[known])
            covariance = covariance - factor @ covariance[known]
        total = (1.0 - time) ** 2 * covariance + time**2 * torch.eye(ROWS, dtype=torch.float64)
        residual = torch.linalg.solve(total, values - (1.0 - time) * mean)
        expected = mean + (1.0 - time) * covariance @ residual
        return ((values - expected) / time).float().unsqueeze(-1)


def sine(start: int, count: int) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * (start + np.arange(count)) / 110.0)


Drawn = list[tuple[int, np.ndarray]]


def drive(mode: str, chunks: int, seed: int = 0) -> tuple[np.ndarray, Drawn, list[int]]:
    """Commands (ticks,), chunks as (tick of action 0, actions), and the ticks of the seams."""
    flow, rng = ProcessFlow(), np.random.default_rng(seed)
    line = Timeline(
        1, Representation.ABSOLUTE, PERIOD, PERIOD, 40 * PERIOD, 4 if mode == "blend" else 0, PERIOD,
        clock=lambda: 0,
    )
    delay, sent, drawn, seams = DelayEstimate(1), [], [], []
    for _ in range(chunks):
        mark = line.mark_observation()
        plan = line.plan(mark)
        frozen = min(delay.actions, len(plan))
        flow.mean = torch.from_numpy(sine(len(sent), ROWS) + OFFSET * rng.normal())
        target = np.zeros((ROWS, 1), np.float32)
        target[: len(plan)] = plan[:ROWS]
        guided = mode in ("guided", "trained")
        flow.guide = Guide(
            torch.from_numpy(target),
            torch.from_numpy(prefix_weights("linear", frozen, min(HORIZON, len(plan)), ROWS)),
            torch.arange(ROWS) < frozen,
            torch.from_numpy(gains(STEPS, 10.0)),
            trained=mode == "trained",
        ) if guided else None
        x = torch.from_numpy(rng.normal(size=(ROWS, 1)).astype(np.float32))
        flow.integrate(x)
        begin = len(sent)
        sent += [float(c.values[0]) for c in (line.tick() for _ in range(LATENCY)) if c.values is not None]
        outcome = line.submit(x.numpy(), mark, frozen=frozen if guided else 0)
        assert isinstance(outcome, Accepted)
        delay.add(mark, outcome)
        drawn.append((begin, x[:, 0].numpy()))
        seams.append(len(sent))
        sent += [float(c.values[0]) for c in (line.tick() for _ in range(9)) if c.values is not None]
    return np.array(sent), drawn, seams


def draw_schedules(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for schedule, colour, style in zip(SCHEDULES, COLOURS, ("-", "--", "-", "-"), strict=True):
        axes.plot(prefix_weights(schedule, 4, 16, 24), style, marker=".", color=colour, label=schedule)
    axes.axvspan(-0.5, 3.5, color="0.9", label="frozen: delay 4")
    axes.axvline(15.5, color="0.6", linewidth=0.8)
    axes.annotate("horizon 16", (15.6, 0.9), fontsize=8)
    axes.set(xlabel="action of the new chunk", ylabel="weight", xlim=(-0.5, 23))
    axes.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=110)


def draw_chunks(path: Path) -> None:
    figure, grid = plt.subplots(len(MODES), 1, figsize=(7, 8), sharex=True, layout="constrained")
    for axes, mode in zip(grid, MODES, strict=True):
        sent, drawn, seams = drive(mode, 7)
        for number, (begin, actions) in enumerate(drawn):
            axes.plot(begin + np.arange(ROWS), actions, color=COLOURS[number % 4], linewidth=0.8, alpha=0.6)
        axes.plot(sent, color="black", linewidth=1.8, label="sent")
        for seam in seams[1:]:
            axes.axvline(seam - 0.5, color="0.8", linewidth=0.8, zorder=0)
        axes.set(ylabel="joint [rad]", xlim=(0, 100), ylim=(-0.65, 0.65), title=mode)
    grid[-1].set_xlabel("control tick of 20 ms; grey: a new chunk takes over; coloured: chunks as drawn")
    figure.savefig(path, dpi=110)


def table(chunks: int = 300) -> str:
    lines = ["| mode | largest step where a chunk takes over [rad] | median there | median elsewhere |"]
    lines.append("| --- | --- | --- | --- |")
    for mode in MODES:
        sent, _, seams = drive(mode, chunks)
        steps = np.abs(np.diff(sent))
        near = {seam + k for seam in seams[3:] for k in range(-1, 1)}
        at = np.array([steps[seam - 1] for seam in seams[3:] if seam - 1 < len(steps)])
        others = np.delete(steps, [i for i in near if 0 <= i < len(steps)])
        lines.append(f"| {mode} | {at.max():.3f} | {np.median(at):.3f} | {np.median(others):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    out = parser.parse_args().out
    draw_schedules(out / "rtc_schedules.png")
    draw_chunks(out / "rtc_chunks.png")
    print(table())


if __name__ == "__main__":
    main()
