"""Writes the demo report: plots (PNG), report.md that links them, summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .recording import FloatArray, Recording, RobotView, commanded_series, latencies

mpl.use("Agg")
import matplotlib.pyplot as plt

COMMANDED, MEASURED, SEAM = "#d1495b", "#00798c", "#b8b8b8"
ZOOM = 1.5  # length of the magnified stretch in the joint plot [s]
LEAD = 1_000_000_000  # of the time before the first chunk this much is shown [ns]
MAX_FRAMES = 8  # columns of the contact sheet

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#ececec",
        "figure.dpi": 110,
    }
)


def write_report(
    directory: Path,
    recording: Recording,
    robot: RobotView,
    summary: Mapping[str, Any],
    notes: Mapping[str, str],
) -> list[Path]:
    """Write plots, report.md and summary.json into `directory` (made if need be); the files written.

    notes: lines of the report's head, name -> text (checkpoint, prompt, command …). Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, draw in (
        ("joints.png", plot_joints),
        ("latency.png", plot_latency),
        ("cameras.png", plot_cameras),
        ("control.png", plot_control),
    ):
        path = directory / name
        figure = draw(recording, robot)
        # a picture of an earlier run must not pass for one of this run
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    path = directory / "summary.json"
    path.write_text(json.dumps({**summary, **notes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written.append(path)
    path = directory / "report.md"
    pictures = [file.name for file in written if file.suffix == ".png"]
    path.write_text(report_text(summary, notes, pictures, robot), encoding="utf-8")
    written.append(path)
    return written


def plot_joints(recording: Recording, robot: RobotView) -> Figure | None:
    """Commanded against measured, one row a joint; on the right a stretch magnified, with chunk seams."""
    origin, shown = _start(recording), np.array(recording.joint_times, dtype=np.int64)
    keep = shown >= origin - LEAD
    if not keep.any():
        return None
    seconds = (shown[keep] - origin) * 1e-9
    measured, commanded = np.array(recording.joint_positions)[keep], commanded_series(recording)[keep]
    seams = (np.array([chunk.published for chunk in recording.chunks], dtype=np.int64) - origin) * 1e-9
    seams = seams[seams <= seconds[-1]]
    rows = len(robot.joint_names)
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(13, 1.35 * rows + 0.8),
        sharex="col",
        squeeze=False,
        gridspec_kw={"width_ratios": [2, 1]},
    )
    # in the middle, away from start and end
    zoom_start = max(0.0, 0.6 * float(seconds[-1]) - ZOOM / 2)
    zoom = (seconds >= zoom_start) & (seconds <= zoom_start + ZOOM)
    for row, name in enumerate(robot.joint_names):
        unit = "rad" if robot.angular[row] else "m"
        for axis, part in ((axes[row, 0], slice(None)), (axes[row, 1], zoom)):
            axis.plot(seconds[part], measured[part, row], color=MEASURED, linewidth=1.6, label="measured")
            axis.plot(
                seconds[part],
                commanded[part, row],
                color=COMMANDED,
                linewidth=1.1,
                linestyle="--",
                label="commanded",
            )
        axes[row, 0].set_ylabel(f"{name}\n[{unit}]")
        _draw_seams(axes[row, 0], seams, 0.4)
        _draw_seams(axes[row, 1], seams[(seams >= zoom_start) & (seams <= zoom_start + ZOOM)], 1.0)
    axes[0, 0].set_title("whole run", loc="left")
    axes[0, 1].set_title(f"{ZOOM} s of it; grey: a new chunk takes over", loc="left")
    axes[0, 0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("time [s]")
    figure.align_ylabels(axes[:, 0])
    figure.suptitle("Commanded and measured joints", x=0.06, ha="left", fontweight="bold")
    figure.tight_layout()
    return figure


def _start(recording: Recording) -> int:
    """Time 0 of the plots [ns]: the first chunk; without one, the first joint state."""
    if recording.chunks:
        return recording.chunks[0].published
    return recording.joint_times[0] if recording.joint_times else 0


def _draw_seams(axis: Axes, seams: FloatArray, width: float) -> None:
    faint = min(1.0, 60 / max(1, len(seams)))  # hundreds of them must not hide the curves
    for seam in seams:
        axis.axvline(seam, color=SEAM, linewidth=width, alpha=faint, zorder=0)


def plot_latency(recording: Recording, robot: RobotView) -> Figure | None:
    """Histograms of inference time and of newest camera stamp -> chunk published."""
    inference, whole = latencies(recording)
    if not len(whole):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for axis, values, title, colour in (
        (axes[0], 1e3 * inference, "inference", MEASURED),
        (axes[1], 1e3 * whole, "newest camera stamp → chunk published", COMMANDED),
    ):
        axis.hist(values, bins=40, color=colour, alpha=0.85)
        for percent, style in ((50, "-"), (99, "--")):
            mark = float(np.percentile(values, percent))
            axis.axvline(
                mark, color="#333333", linestyle=style, linewidth=1.0, label=f"p{percent} {mark:.1f} ms"
            )
        axis.set_title(title, loc="left")
        axis.set_xlabel("ms")
        axis.set_ylabel("chunks")
        axis.legend(frameon=False)
    figure.suptitle(f"Latency of {len(recording.chunks)} chunks", x=0.06, ha="left", fontweight="bold")
    figure.tight_layout()
    return figure


def plot_control(recording: Recording, robot: RobotView) -> Figure | None:
    """Intervals between commands over time, and their histogram."""
    times = np.array([published for published, _ in recording.commands], dtype=np.int64)
    if len(times) < 2:
        return None
    intervals = np.diff(times) * 1e-6
    nominal = 1e3 / robot.control_rate
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), gridspec_kw={"width_ratios": [2, 1]})
    axes[0].plot((times[1:] - times[0]) * 1e-9, intervals, ".", markersize=2.5, color=MEASURED)
    axes[0].axhline(
        nominal, color="#333333", linewidth=0.8, linestyle="--", label=f"nominal {nominal:.0f} ms"
    )
    axes[0].set_xlabel("time [s]")
    axes[0].set_ylabel("interval [ms]")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, loc="upper right")
    axes[1].hist(intervals, bins=50, color=MEASURED, alpha=0.85)
    axes[1].set_yscale("log")
    axes[1].set_xlabel("interval [ms]")
    axes[1].set_ylabel("commands")
    figure.suptitle("Time between commands", x=0.06, ha="left", fontweight="bold")
    figure.tight_layout()
    return figure


def plot_cameras(recording: Recording, robot: RobotView) -> Figure | None:
    """Contact sheet: a row a camera, evenly spread moments of the run."""
    origin = _start(recording)
    kept = [frame for frame in recording.frames if frame.stamp >= origin - LEAD]
    streams = sorted({frame.stream for frame in kept})
    if not streams:
        return None
    rows = [[frame for frame in kept if frame.stream == stream] for stream in streams]
    columns = min(MAX_FRAMES, max(len(row) for row in rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.9 * columns + 0.4, 2.15 * len(rows) + 0.5), squeeze=False
    )
    for row, frames in enumerate(rows):
        chosen = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int))
        for column in range(columns):
            axis = axes[row, column]
            axis.set_axis_off()
            if column < len(chosen):
                frame = frames[chosen[column]]
                axis.imshow(frame.image)
                axis.set_title(f"{(frame.stamp - origin) * 1e-9:.1f} s", fontsize=8, color="#555555", pad=2)
        axes[row, 0].text(
            -0.06, 0.5, streams[row], rotation=90, va="center", ha="right", transform=axes[row, 0].transAxes
        )
    figure.suptitle("What the policy saw", x=0.06, ha="left", fontweight="bold")
    figure.tight_layout(pad=0.4)
    return figure


# key of summary.json -> (what it is, how it is measured); report.md lists them in this order
MEANINGS: dict[str, str] = {
    "chunks_per_s": "action chunks per second, between the first and the last; publish times of the messages",
    "chunks_not_seen": "gaps in the chunks' sequence numbers",
    "control_rate_hz": "commands per second, between the first and the last; publish times of the messages",
    "control_rate_target_hz": "the rate the robot contract asks for",
    "control_jitter_p99_ms": "abs(period - nominal) of commands by the policy node's clock (last ~/status)",
    "observed_control_jitter_p99_ms": "the same from the publish times of the command messages, whole run",
    "control_gap_max_ms": "longest time between two commands after the first chunk; publish times",
    "limit_violations": "commands with any point outside the contract's position limits, of all",
    "velocity_limit_violations": "steps between commands beyond the contract's velocity limits (+1 %)",
    "invalid_commands": "commands a joint_trajectory_controller would reject (NaN, wrong joints, no points)",
    "joint_travel_rad": "summed absolute change of the measured revolute joints, from joint_states",
    "tracking_rms_rad": "RMS of commanded - measured over revolute joints, at each joint state's stamp",
    "tracking_max_rad": "the largest such error",
    "gripper_tracking_rms_m": "the same RMS for the gripper",
    "stamp_to_publish_p50_ms": "newest camera stamp in the chunk's observation -> the chunk's publish time",
    "stamp_to_publish_p99_ms": "the same, 99th percentile",
    "node_stamp_to_publish_p50_ms": "the same by the policy node's own clock (its last ~/status)",
    "node_stamp_to_publish_p99_ms": "the same, 99th percentile",
    "inference_p50_ms": "time each chunk carries: observation handed to the model -> actions in memory",
    "inference_p95_ms": "the same, 95th percentile",
    "inference_p99_ms": "the same, 99th percentile",
}
CAPTIONS = {
    "joints.png": "Commanded and measured joints",
    "latency.png": "Latency",
    "control.png": "Time between commands",
    "cameras.png": "Camera frames",
}


def report_text(
    summary: Mapping[str, Any], notes: Mapping[str, str], pictures: list[str], robot: RobotView
) -> str:
    """report.md: head, figures with how each is measured, pictures."""
    lines = ["# Demo report", ""]
    lines += [f"- {name.replace('_', ' ')}: {text}" for name, text in notes.items()]
    lines += [
        f"- recorded: {summary['duration_s']} s, {summary['chunks']} chunks, "
        f"{summary['control_commands']} commands",
        "",
        "Unless the table says otherwise, a figure comes from an observer node that subscribed to the real",
        "topics; a message's publish time is the source timestamp that its publisher's middleware gave it.",
        "All numbers: [summary.json](summary.json).",
        "",
    ]
    lines += ["| figure | value | how it is measured |", "|---|---|---|"]
    lines += [f"| {key} | {_shown(summary.get(key))} | {meaning} |" for key, meaning in MEANINGS.items()]
    lines += ["", "## Streams", "", "| stream | received |", "|---|---|"]
    lines += [f"| {name} | {rate} Hz |" for name, rate in summary["stream_rates_hz"].items()]
    if summary["robot_diagnostics"]:
        lines += ["", "## The robot's own account", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in summary["robot_diagnostics"].items() if value]
    for name in pictures:
        lines += ["", f"## {CAPTIONS[name]}", "", f"![{CAPTIONS[name]}]({name})"]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "not seen" if value is None else str(value)
