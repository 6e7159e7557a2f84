"""The demo's live view: a `rich` table on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .recording import Recording, RobotView, joint_error, latencies, recent_rate

RECENT = 2.0  # rates and percentiles of the live view look this far back [s]
LINE_PERIOD = 2.0  # between two plain lines [s]


class LiveView:
    """Shows a recording as it grows. Use as a context manager and call update() a few times a second.

    headline: one line said all the time. topics: stream name -> topic.
    """

    def __init__(
        self,
        recording: Recording,
        robot: RobotView,
        topics: Mapping[str, str],
        headline: str,
        clock: Callable[[], int],
        console: Console,
        table: bool,
    ) -> None:
        self._recording, self._robot, self._topics = recording, robot, topics
        self._headline, self._clock, self._console = headline, clock, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if table else None
        self._next_line = 0

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the table, or among the plain lines."""
        self._console.print(Text(text))

    def update(self, progress: str) -> None:
        """Show the present state; progress: time so far, in words."""
        now = self._clock()
        if self._live is None and now < self._next_line:
            return
        self._next_line = now + round(LINE_PERIOD * 1e9)
        figures = live_figures(self._recording, self._robot, now)
        if self._live is None:
            self._console.print(Text(plain_line(figures, progress)), soft_wrap=True)
        else:
            self._live.update(self._render(figures, progress, now), refresh=True)

    def _render(self, figures: Mapping[str, Any], progress: str, now: int) -> RenderableType:
        streams = Table(
            "stream", "topic", "rate", "age", title="robot → policy", title_justify="left", expand=True
        )
        for name, topic in self._topics.items():
            age = self._recording.age(name, now)
            late = age is None or age > 0.25
            streams.add_row(
                name,
                topic,
                f"{self._recording.rate(name, now):.1f} Hz",
                Text(
                    "none came" if age is None else _milliseconds(age), style="bold red" if late else "green"
                ),
            )
        policy = Table(
            "state",
            "chunks",
            "control",
            "inference p50",
            "camera → chunk p50 / p99",
            expand=True,
            box=box.SIMPLE_HEAD,
        )
        policy.title, policy.title_justify = "policy → robot", "left"
        running = figures["state"] == "running"
        policy.add_row(
            Text(figures["state"], style="bold green" if running else "bold yellow"),
            f"{figures['chunk_rate']:.1f} /s, number {figures['sequence']}",
            f"{figures['control_rate']:.1f} Hz",
            _milliseconds(figures["inference"]),
            f"{_milliseconds(figures['latency_p50'])} / {_milliseconds(figures['latency_p99'])}",
        )
        parts: list[RenderableType] = [streams, policy, self._joint_table()]
        if figures["message"]:
            parts.append(Text(figures["message"], style="yellow"))
        return Panel(Group(*parts), title=f"{self._headline}", subtitle=progress, border_style="blue")

    def _joint_table(self) -> Table:
        table = Table(title="joints", title_justify="left", expand=True, box=box.SIMPLE_HEAD)
        table.add_column("")
        for name in self._robot.joint_names:
            table.add_column(name, justify="right")
        if not self._recording.joint_positions:
            return table
        measured = self._recording.joint_positions[-1]
        commanded = self._recording.commanded_at(self._recording.joint_times[-1])
        table.add_row("measured", *(f"{value:+.3f}" for value in measured))
        if commanded is not None:
            table.add_row("commanded", *(f"{value:+.3f}" for value in commanded))
            table.add_row("error", *(f"{value:+.3f}" for value in commanded - measured), style="cyan")
        return table


def live_figures(recording: Recording, robot: RobotView, now: int) -> dict[str, Any]:
    """What the live view shows of the policy, over the last seconds; None where nothing is known yet."""
    since = now - round(RECENT * 1e9)
    recent = Recording(chunks=[chunk for chunk in recording.chunks[-200:] if chunk.published >= since])
    inference, whole = latencies(recent)
    status = recording.statuses[-1] if recording.statuses else None
    return {
        "state": status["state_name"] if status else "starting",
        "message": status["message"] if status else "",
        "sequence": recording.chunks[-1].sequence if recording.chunks else "-",
        "chunk_rate": recent_rate([chunk.published for chunk in recording.chunks[-200:]], now, RECENT),
        "control_rate": recent_rate([published for published, _ in recording.commands[-400:]], now, RECENT),
        "inference": float(np.median(inference)) if len(inference) else None,
        "latency_p50": float(np.median(whole)) if len(whole) else None,
        "latency_p99": float(np.percentile(whole, 99)) if len(whole) else None,
        "joint_error": joint_error(recording, robot),
        "stream_rates": {name: recording.rate(name, now) for name in recording.arrivals},
    }


def plain_line(figures: Mapping[str, Any], progress: str) -> str:
    """The figures on one line."""
    streams = "  ".join(f"{name} {rate:.1f} Hz" for name, rate in figures["stream_rates"].items())
    error = "-" if figures["joint_error"] is None else f"{figures['joint_error']:.4f} rad"
    return (
        f"[{progress}] {figures['state']}  {streams}  chunks {figures['chunk_rate']:.1f}/s "
        f"(number {figures['sequence']})  control {figures['control_rate']:.1f} Hz  "
        f"inference {_milliseconds(figures['inference'])}  "
        f"camera→chunk {_milliseconds(figures['latency_p50'])}  "
        f"joint error {error}" + (f"  {figures['message']}" if figures["message"] else "")
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The figures a person looks at first."""
    table = Table(title="Summary", title_justify="left", show_header=False)

    def shown(key: str, unit: str) -> str:
        return "not seen" if summary[key] is None else f"{summary[key]:g} {unit}".strip()

    for label, value in (
        (
            "action chunks",
            f"{shown('chunks_per_s', '/s')} ({summary['chunks']} in {summary['duration_s']:g} s)",
        ),
        ("commands", f"{shown('control_rate_hz', 'Hz')}, asked for {shown('control_rate_target_hz', 'Hz')}"),
        ("command period jitter, p99", shown("control_jitter_p99_ms", "ms")),
        ("longest gap between commands", shown("control_gap_max_ms", "ms")),
        ("commands beyond joint limits", shown("limit_violations", "")),
        ("joint travel", shown("joint_travel_rad", "rad")),
        ("tracking error, RMS", shown("tracking_rms_rad", "rad")),
        ("inference, p50", shown("inference_p50_ms", "ms")),
        (
            "newest camera stamp → chunk, p50 / p99",
            f"{shown('stamp_to_publish_p50_ms', 'ms')} / {shown('stamp_to_publish_p99_ms', 'ms')}",
        ),
    ):
        table.add_row(label, value)
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"
