import json
import re

import cv2
import numpy as np
import pytest

from flashrt_ros.demo.recording import Recording, summarise
from flashrt_ros.demo.report import MEANINGS, write_report

PICTURES = {"joints.png", "latency.png", "control.png", "cameras.png"}
REQUIRED = {
    "chunks_per_s",
    "control_rate_hz",
    "control_rate_target_hz",
    "control_jitter_p99_ms",
    "control_gap_max_ms",
    "limit_violations",
    "joint_travel_rad",
    "tracking_rms_rad",
    "stamp_to_publish_p50_ms",
    "stamp_to_publish_p99_ms",
    "inference_p50_ms",
}
NOTES = {"policy": "untrained (random weights)", "prompt": "pick"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, known_run, robot):
    directory = tmp_path_factory.mktemp("demo") / "report"
    write_report(directory, known_run, robot, summarise(known_run, robot), NOTES)
    return directory


def test_pictures_lie_at_the_top_and_are_not_blank(written):
    assert {path.name for path in written.glob("*.png")} == PICTURES
    for name in PICTURES:
        image = cv2.imread(str(written / name))
        assert min(image.shape[:2]) > 200
        assert image.std() > 5


def test_contact_sheet_shows_the_frames(written):
    image = cv2.imread(str(written / "cameras.png"))
    for grey in (80, 120, 160):  # frames of the run are uniform grey
        assert np.sum(np.all(image == grey, axis=2)) > 500


def test_summary_has_the_figures(written):
    summary = json.loads((written / "summary.json").read_text())
    assert set(summary) >= REQUIRED
    assert summary["control_rate_hz"] == 50.0
    assert summary["policy"] == NOTES["policy"]


def test_report_links_every_picture_and_explains_every_figure(written):
    text = (written / "report.md").read_text()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert set(links) == PICTURES
    assert "untrained" in text
    for key in REQUIRED:
        assert key in MEANINGS
        assert f"| {key} |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    # every row of the first table has three cells
    assert all(line.count("|") in (3, 4) for line in rows)


def test_a_picture_of_an_earlier_run_does_not_stay(tmp_path, robot):
    empty = Recording()
    (tmp_path / "joints.png").write_bytes(b"of an earlier run")
    write_report(tmp_path, empty, robot, summarise(empty, robot), NOTES)
    assert not list(tmp_path.glob("*.png"))
    assert "not seen" in (tmp_path / "report.md").read_text()
