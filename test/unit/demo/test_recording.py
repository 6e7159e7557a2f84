import dataclasses

import numpy as np
import pytest

from flashrt_ros.demo.recording import (
    ChunkSeen,
    Recording,
    joint_error,
    mean_rate,
    recent_rate,
    statuses_reason,
    still_missing,
    summarise,
)
from flashrt_ros.demo.trajectory import Trajectory

MS = 1_000_000
START = 1_700_000_000_000 * MS


def test_figures_of_a_known_run(recording, robot):
    figures = summarise(recording, robot)
    assert figures["duration_s"] == 10.0
    assert figures["chunks"] == 101
    assert figures["chunks_per_s"] == 10.0
    assert figures["chunks_not_seen"] == 0
    assert figures["control_commands"] == 501
    assert figures["control_rate_hz"] == 50.0
    assert figures["control_rate_target_hz"] == 50.0
    assert figures["control_gap_max_ms"] == 20.0
    assert figures["observed_control_jitter_p99_ms"] == pytest.approx(0.0, abs=1e-3)
    assert figures["joint_travel_rad"] == pytest.approx(1.0)
    assert figures["tracking_rms_rad"] == pytest.approx(np.sqrt((0.01**2 + 0.02**2) / 2), abs=1e-5)
    assert figures["tracking_max_rad"] == pytest.approx(0.02)
    assert figures["gripper_tracking_rms_m"] == pytest.approx(0.001)
    assert figures["inference_p50_ms"] == 40.0
    assert figures["stamp_to_publish_p50_ms"] == 60.0
    assert figures["stamp_to_publish_p99_ms"] == 60.0
    assert figures["stream_rates_hz"] == {"base": 25.0, "joint_states": 100.0, "wrist": 25.0}
    assert figures["limit_violations"] == figures["velocity_limit_violations"] == 0
    assert figures["robot_diagnostics"] == recording.robot


def test_the_nodes_own_figures_are_passed_on_and_unknown_ones_are_none(recording, robot):
    figures = summarise(recording, robot)
    assert figures["control_jitter_p99_ms"] == 1.5
    assert figures["node_stamp_to_publish_p50_ms"] == 58.0
    assert figures["node_stamp_to_publish_p99_ms"] is None


def test_late_command_shows_as_gap_and_jitter(recording, robot):
    shifted = [
        (time + (150 * MS if time > START + 5000 * MS else 0), path) for time, path in recording.commands
    ]
    recording.commands[:] = shifted
    figures = summarise(recording, robot)
    assert figures["control_gap_max_ms"] == 170.0
    # one interval in 500 lies beyond the 99th percentile
    assert figures["observed_control_jitter_p99_ms"] < 1.0


def test_a_gap_before_the_first_chunk_does_not_count(recording, robot):
    path = recording.commands[0][1]
    recording.commands.insert(0, (START - 3000 * MS, path))
    assert summarise(recording, robot)["control_gap_max_ms"] == 20.0


def test_commands_beyond_position_limits_are_counted(recording, robot):
    for index in (100, 200, 201):
        time, path = recording.commands[index]
        beyond = path.positions.copy()
        beyond[-1, 1] = 1.0 + 1e-5
        recording.commands[index] = (time, dataclasses.replace(path, positions=beyond))
    time, path = recording.commands[300]
    edge = path.positions.copy()
    edge[0, 2] = np.float32(0.04)
    recording.commands[300] = (time, dataclasses.replace(path, positions=edge))
    assert summarise(recording, robot)["limit_violations"] == 3


def test_steps_beyond_velocity_limits_are_counted(recording, robot):
    time, path = recording.commands[250]
    jump = path.positions + np.array([0.05, 0.0, 0.0])  # 0.05 rad in 20 ms, there and back
    recording.commands[250] = (time, dataclasses.replace(path, positions=jump))
    figures = summarise(recording, robot)
    assert figures["velocity_limit_violations"] == 2
    assert figures["limit_violations"] == 0


def test_lost_chunks_show_in_the_sequence(recording, robot):
    del recording.chunks[20:23]
    assert summarise(recording, robot)["chunks_not_seen"] == 3


def test_chunks_without_a_camera_have_no_camera_latency(recording, robot):
    recording.chunks[:] = [dataclasses.replace(chunk, newest_image_stamp=None) for chunk in recording.chunks]
    figures = summarise(recording, robot)
    assert figures["stamp_to_publish_p50_ms"] is None
    assert figures["inference_p50_ms"] == 40.0


def test_nothing_seen_gives_no_figures_rather_than_zeros(robot):
    figures = summarise(Recording(), robot)
    for key in (
        "control_gap_max_ms",
        "control_jitter_p99_ms",
        "tracking_rms_rad",
        "stamp_to_publish_p50_ms",
        "inference_p50_ms",
    ):
        assert figures[key] is None, key
    assert figures["chunks"] == 0
    assert figures["joint_travel_rad"] == 0


def test_the_newest_published_command_counts(recording):
    early = recording.commanded_at(START - 1)
    assert early is None
    np.testing.assert_allclose(recording.commanded_at(START + 30 * MS), [0.003, 0.5, 0.02])
    # a command published later, for the same moment, is not known yet
    path = Trajectory(np.array([START]), np.array([[9.0, 9.0, 9.0]]))
    recording.commands.append((START + 20_000 * MS, path))
    np.testing.assert_allclose(recording.commanded_at(START + 50 * MS), [0.005, 0.5, 0.02])


def test_live_figures_use_the_last_moments(recording, robot):
    assert joint_error(recording, robot) == pytest.approx(np.sqrt((0.01**2 + 0.02**2) / 2), rel=1e-6)
    now = START + 10_000 * MS
    assert recording.rate("base", now) == pytest.approx(25.0)
    assert recording.rate("none", now) == 0.0
    assert recording.age("wrist", now) == pytest.approx(0.0)
    assert recording.age("none", now) is None


def test_rates_of_nothing_and_of_one_event_are_zero():
    assert mean_rate([]) == mean_rate([5]) == 0.0
    assert recent_rate([], 10, 1.0) == recent_rate([5], 10, 1.0) == 0.0
    assert recent_rate([0, 10 * MS, 20 * MS], 5000 * MS, 1.0) == 0.0


def test_what_is_missing_is_named():
    empty = Recording()
    assert still_missing(empty) == "joint state, no action chunk, no command"
    empty.joint_times.append(1)
    empty.chunks.append(ChunkSeen(1, 1, 0, 0.1, None, ""))
    assert still_missing(empty) == "command"
    empty.commands.append((1, Trajectory(np.array([1]), np.zeros((1, 3)))))
    assert still_missing(empty) == ""


def test_the_policy_nodes_reason_in_words():
    assert statuses_reason([]) == ""
    status = {"state_name": "waiting", "message": "no message of base_camera has come", "reason": 101}
    assert statuses_reason([status]) == "waiting: no message of base_camera has come (code 101)"


def test_an_early_tick_is_no_velocity_violation(recording, robot):
    paths = [path for _, path in recording.commands[:3]]
    early = dataclasses.replace(paths[1], times=paths[1].times - 19 * MS)
    fast = early.positions + np.array([0.015, 0.0, 0.0])  # 17 mrad in 1 ms, but within 20 ms of motion
    commands = [paths[0], dataclasses.replace(early, positions=fast)]
    recording.commands[:] = [(int(path.times[0]), path) for path in commands]
    assert summarise(recording, robot)["velocity_limit_violations"] == 0
