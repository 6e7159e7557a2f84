import io
import re

from rich.console import Console

from flashrt_ros.demo.live import LiveView, live_figures, plain_line, summary_table
from flashrt_ros.demo.recording import Recording, summarise

MS = 1_000_000
START = 1_700_000_000_000 * MS
NOW = START + 10_010 * MS
TOPICS = {"base": "base_camera/image_raw", "joint_states": "joint_states"}


def shown(recording, robot, table, now=NOW, width=110):
    out = io.StringIO()
    console = Console(file=out, force_terminal=table, width=width, height=60, color_system=None)
    with LiveView(recording, robot, TOPICS, "the headline", lambda: now, console, table) as view:
        view.update("3.0 of 20 s")
        view.say("a warning [WARN] of a node")
    return out.getvalue()


def test_table_shows_rates_ages_latency_sequence_and_joint_error(recording, robot):
    text = shown(recording, robot, table=True)
    for part in (
        "the headline",
        "base_camera/image_raw",
        "25.0 Hz",
        "10 ms",
        "running",
        "10.0 /s, number 100",
    ):
        assert part in text, part
    for part in ("50.0 Hz", "40 ms", "60 ms / 60 ms", "pan", "gripper", "+0.020", "3.0 of 20 s", "[WARN]"):
        assert part in text, part


def test_table_fits_a_narrow_terminal(recording, robot):
    text = shown(recording, robot, table=True, width=80)
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert max(len(line) for line in visible.splitlines()) <= 80
    assert "running" in text


def test_plain_lines_come_at_intervals(recording, robot):
    out = io.StringIO()
    clock = [NOW]
    console = Console(file=out, width=80)
    with LiveView(recording, robot, TOPICS, "", lambda: clock[0], console, table=False) as view:
        for _ in range(10):
            view.update("running")
            clock[0] += 500 * MS
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("[running] running  ") for line in lines)


def test_plain_line_of_a_run(recording, robot):
    line = plain_line(live_figures(recording, robot, NOW), "1 s")
    for part in (
        "base 25.0 Hz",
        "chunks 10.0/s (number 100)",
        "control 50.0 Hz",
        "inference 40 ms",
        "0.0158 rad",
    ):
        assert part in line, part


def test_nothing_seen_yet(robot):
    for table in (True, False):
        text = shown(Recording(), robot, table)
        assert "starting" in text
    assert "none came" in shown(Recording(), robot, table=True)


def test_the_policy_nodes_message_is_shown(recording, robot):
    recording.statuses[-1] |= {"state_name": "holding", "message": "base: no message for 0.4 s"}
    for table in (True, False):
        text = shown(recording, robot, table)
        assert "holding" in text
        assert "base: no message for 0.4 s" in text


def test_summary_names_what_was_not_seen(recording, robot):
    out = io.StringIO()
    Console(file=out, width=100).print(summary_table(summarise(Recording(), robot)))
    assert "not seen" in out.getvalue()
    Console(file=out, width=100).print(summary_table(summarise(recording, robot)))
    assert "10 /s (101 in 10 s)" in out.getvalue()
