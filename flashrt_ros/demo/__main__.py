"""Run the demo: a simulated arm driven by the policy node, watched live, with a report at the end.

    python -m flashrt_ros.demo --checkpoint DIR [--duration 20] [--report demo_report] [--no-table]

Exit status: 0 the run was completed; 1 a node ended or no chunk came; 2 bad arguments; 130 stopped by Ctrl-C
or SIGTERM (everything is stopped within two seconds, and no report is written).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flashrt_ros.bringup import DEMO_PROMPT, DEMO_SEED, BringupError, node_environment
from flashrt_ros.core.contract import RobotContract, load_contract

from .live import LiveView, summary_table
from .observer import Observer
from .processes import Processes, demo_processes
from .recording import statuses_reason, still_missing, summarise

ROBOT = "demo_arm"
UPDATE_PERIOD = 0.5  # of the live view [s]; drawing it costs the nodes CPU time
GRACE = 0.6  # a node that ignores SIGINT gets SIGTERM after this long, and SIGKILL after as long again [s]
FRAMES = 8  # images kept of each camera
LAST_LINES = 15  # of a node's output, shown when it fails


class Demo:
    """One run of the demo; run() does everything and returns the exit status."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options, self._console = options, console
        self._contract: RobotContract = load_contract(ROBOT)
        self._lines: dict[str, deque[str]] = {}
        self._stop = threading.Event()
        self._view: LiveView | None = None
        self._untrained = is_untrained(Path(options.checkpoint))
        arguments = {"checkpoint": options.checkpoint, "robot": ROBOT, "prompt": options.prompt}
        self._nodes: Processes = demo_processes(arguments, self._on_line, GRACE)
        self._directory = Path(options.report)
        self._directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """The whole demo. Ctrl-C and SIGTERM end it early, with everything stopped."""
        previous = {
            number: signal.signal(number, lambda *_: self._stop.set())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        observer: Observer | None = None
        try:
            observer = Observer(self._contract, frame_period=max(0.2, self._options.duration / FRAMES))
            observer.start()
            self._nodes.start()
            problem = self._watch(observer)
        finally:
            # The observer first: how the nodes end is not part of the figures.
            if observer is not None:
                observer.stop()
            self._nodes.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._stop.is_set():
            self._console.print("Stopped on request; no report written.")
            return 130
        if problem:
            self._show_failure(problem)
            return 1
        self._report(observer)
        return 0

    def _watch(self, observer: Observer) -> str:
        """Show the run until its time is over (""), it is stopped (""), or something fails (what)."""
        recording, duration = observer.recording, self._options.duration
        topics = {name: stream.topic for name, stream in self._contract.streams.items()}
        table = self._console.is_terminal and not self._options.no_table
        view = LiveView(
            recording, observer.robot, topics, self._headline(), observer.now, self._console, table
        )
        if not table:
            self._console.print(Text(self._headline()), soft_wrap=True)
        begin, running_since = time.monotonic(), None
        with view as self._view:
            while not self._stop.wait(UPDATE_PERIOD):
                now = time.monotonic()
                if (status := self._nodes.poll()) is not None:
                    return f"A node ended while the demo ran (status {status})."
                if observer.failure is not None:
                    return f"The observer failed: {observer.failure!r}."
                if running_since is None:
                    view.update(f"starting, {now - begin:.0f} s")
                    lacking = still_missing(recording)
                    if not lacking:
                        running_since = now
                    elif now - begin > self._options.startup_timeout:
                        reason = statuses_reason(recording.statuses) or "nothing on its status topic"
                        return f"No {lacking} came within {now - begin:.0f} s. The policy node says {reason}."
                    continue
                if now - running_since >= duration:
                    return ""
                view.update(f"{now - running_since:.1f} of {duration:g} s")
        return ""

    def _headline(self) -> str:
        untrained = ", untrained policy (random weights): its motion means nothing"
        return "FlashRT demo" + (untrained if self._untrained else "")

    def _on_line(self, node: str, line: str) -> None:
        self._lines.setdefault(node, deque(maxlen=LAST_LINES)).append(line)
        if self._view is not None and any(f"[{level}]" in line for level in ("WARN", "ERROR", "FATAL")):
            self._view.say(f"{node}: {line}")

    def _show_failure(self, problem: str) -> None:
        for node, lines in self._lines.items():
            self._console.print(Text(f"Last lines of {node}:", style="bold"))
            for line in lines:
                self._console.print(Text(f"  {line}"), soft_wrap=True)
        self._console.print(Text(problem, style="bold red"), soft_wrap=True)

    def _report(self, observer: Observer) -> None:
        from .report import write_report  # matplotlib takes a second to import, not wanted while nodes run

        summary = summarise(observer.recording, observer.robot)
        untrained = "untrained (random weights): its motion means nothing"
        notes = {
            "policy": untrained if self._untrained else "a checkpoint that is not marked as untrained",
            "checkpoint": self._options.checkpoint,
            "prompt": self._options.prompt,
            "noise": f"seed {DEMO_SEED}, the same for every chunk",
            "command": shlex.join(["python", "-m", "flashrt_ros.demo", *sys.argv[1:]]),
            "machine": f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f} at the end",
        }
        written = write_report(self._directory, observer.recording, observer.robot, summary, notes)
        self._console.print(summary_table(summary))
        if self._untrained:
            self._console.print(
                "The policy is untrained (random weights): this shows the plumbing, not a skill."
            )
        report = next(path for path in written if path.name == "report.md")
        self._console.print(Text(f"Report: {report}"), soft_wrap=True)


def is_untrained(checkpoint: Path) -> bool:
    """Whether the checkpoint's config.json marks it as random weights."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what is wrong with it, the policy node will say
    marks = config.get("flashrt") if isinstance(config, dict) else None
    return isinstance(marks, dict) and marks.get("untrained") is True


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flashrt_ros.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", required=True, help="directory of the policy's checkpoint")
    parser.add_argument(
        "--duration", type=float, default=20.0, help="seconds from the first chunk on (%(default)s)"
    )
    parser.add_argument("--report", default="demo_report", help="directory for the report (%(default)s)")
    parser.add_argument("--prompt", default=DEMO_PROMPT, help="task prompt (%(default)s)")
    parser.add_argument("--no-table", action="store_true", help="plain lines instead of the live table")
    parser.add_argument(
        "--startup-timeout",
        type=float,
        default=90.0,
        help="seconds to wait for the first chunk (%(default)s)",
    )
    options = parser.parse_args(argv)
    if not 1.0 <= options.duration <= 3600.0:
        parser.error(f"--duration must lie in 1..3600 s, got {options.duration:g}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    options = parse_arguments(argv)
    try:
        for variable, value in node_environment().items():
            os.environ.setdefault(variable, value)  # the observer discovers and receives as the nodes do
        demo = Demo(options, Console())
        return demo.run()
    except (BringupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
