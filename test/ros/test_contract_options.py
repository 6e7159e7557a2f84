"""What a contract may ask of the pipeline beyond the demo arm's: a watermark, a camera that may be absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pipeline_driver
import pytest
from pipeline_driver import Driver
from ros_rig import wait_until

from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.reasons import Reason

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """drive(old=new, …) is a driver of the demo arm with these replacements in its contract."""
    made: list[Driver] = []

    def start(*changes: tuple[str, str]) -> Driver:
        text = (ROOT / "config" / "robots" / "demo_arm.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "robot.yaml"
        path.write_text(text)
        made.append(Driver(load_contract(path)))
        return made[-1]

    yield start
    for driver in made:
        driver.close()


def test_on_a_watermark_inference_waits_until_little_is_left(drive) -> None:
    """Chunks reach as far as the cap, 0.5 s; back to back there would be some thirty a second."""
    driver = drive(("inference: back_to_back", "inference: {watermark: 0.2}"))
    left: list[int] = []
    driver.policy.behave = lambda _: left.append(driver.pipeline.commander.timeline.remaining)
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 6, 30.0, "six chunks")
    assert left[0] == 0
    assert max(left) < 200_000_000
    # An inference that began with time to spare leaves no gap.
    assert {out.reason for out, _ in driver.commands[-50:]} == {Reason.OK}


def test_without_its_optional_camera_the_policy_is_told_that_it_is_absent(drive, monkeypatch) -> None:
    everything = pipeline_driver.messages
    monkeypatch.setattr(
        pipeline_driver, "messages",
        lambda *given: [item for item in everything(*given) if item[0] != "wrist_camera"],
    )
    driver = drive(("view: left_wrist_0_rgb", "view: left_wrist_0_rgb\n    optional: true"))
    driver.policy.spec.optional_views = ("left_wrist_0_rgb",)
    seen: list[dict] = []
    predict = driver.policy.predict

    def watch(images, *given, **named):
        seen.append(images)
        return predict(images, *given, **named)

    driver.policy.predict = watch
    driver.begin()
    wait_until(lambda: len(driver.chunks) >= 2, 30.0, "chunks without the wrist camera")
    assert seen[0]["left_wrist_0_rgb"] is None
    assert seen[0]["base_0_rgb"].shape == (8, 8, 3)
    monkeypatch.setattr(pipeline_driver, "messages", everything)
    wait_until(lambda: seen[-1]["left_wrist_0_rgb"] is not None, 30.0, "the wrist camera is back")
