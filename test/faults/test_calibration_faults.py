"""Rows 24, 26, 28 and 29: calibrations and bags of no use. What was in force stays, and nothing is commanded.

The real node in this process with a real fp8 policy on the CPU; files and bags are real.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from fault_bench import entry_of
from fault_table import NOT_COMMANDING, Outcome
from rclpy.executors import SingleThreadedExecutor
from ros_rig import Collector, Rig
from test_configure_faults import make_nodes, refused, works

from benchmarks.synthetic_bag import Entry, write_bag
from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.reasons import Reason
from flashrt_ros.nodes.policy_node import PolicyNode
from flashrt_ros.srv import Calibrate
from flashrt_runtime.loading import load_model
from flashrt_runtime.untrained import make_checkpoint


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def reports(rig) -> Collector:
    return rig.collect(DiagnosticArray, "/diagnostics")


@pytest.fixture
def node(rig, contract_path: Path, checkpoint: Path, tmp_path: Path, monkeypatch):
    """node(parameter=…) -> an unconfigured node for fp8, with a cache of its own."""
    monkeypatch.setenv("FLASH_RT_HOME", str(tmp_path / "home"))
    values = {"checkpoint": str(checkpoint), "robot": str(contract_path), "prompt": "wave"}
    with make_nodes(rig, {**values, "precision": "fp8"}) as make:
        yield make


@pytest.fixture
def calibration_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A calibration file of a checkpoint."""

    def make(directory: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        observation = {"images": [pixels, pixels], "state": np.zeros(7), "prompt": "wave", "seed": 0}
        policy = load_model(directory, num_views=2, precision="fp8", hardware="cpu")
        try:
            policy.calibrate([observation])
            return policy.save_calibration(tmp_path / f"{directory.name}.safetensors")
        finally:
            policy.close()

    return make


def test_24_calibration_of_another_checkpoint(
    node, reports, calibration_of, checkpoint, tmp_path, passed
) -> None:
    file = calibration_of(make_checkpoint(tmp_path / "other", preset="demo_arm", seed=9))
    it = node(calibration=str(file))
    code = refused(it, reports, Reason.CALIBRATION_MISMATCH, str(file), "checkpoint")
    shutil.copy(calibration_of(checkpoint), file)
    works(it)
    passed(Outcome(24, "calibration of another checkpoint", code, NOT_COMMANDING, "by configuring again"))


def test_26_corrupt_calibration(node, reports, calibration_of, checkpoint, passed) -> None:
    file = calibration_of(checkpoint)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    it = node(calibration=str(file))
    code = refused(it, reports, Reason.CALIBRATION_CORRUPT, str(file))
    file.write_bytes(whole)
    works(it)
    passed(Outcome(26, "corrupt calibration", code, NOT_COMMANDING, "by configuring again"))


class Calibrated:
    """A configured node whose policy was calibrated from a good bag; a thread answers its services."""

    def __init__(self, rig: Rig, reports: Collector, node: PolicyNode, good: Path) -> None:
        self.rig, self.reports, self.node, self.good = rig, reports, node, good
        self.executor = SingleThreadedExecutor(context=node.context)
        self.executor.add_node(node)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._spin)
        node.trigger_configure()
        self.thread.start()
        answer = self.ask(good)
        assert answer.success, answer.message
        self.artifact = Path(answer.artifact)

    def _spin(self) -> None:
        while not self.stop.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def end(self) -> None:
        self.stop.set()
        self.thread.join()
        self.executor.shutdown()
        del self.node, self.executor  # see nodes_here

    def ask(self, bag: Path) -> Calibrate.Response:
        name = "/policy_node/calibrate"
        return self.rig.call(Calibrate, name, timeout=60.0, source="bag", path=str(bag), samples=2, save=True)

    def refuses(self, bag: Path, code: int, reason: Reason) -> str:
        """The bag must be refused with these, the artifact and the scales stay; returns the code's name."""
        content, calibrated = self.artifact.read_bytes(), self.node.report()
        assert calibrated.reason == 0
        answer, answered = self.ask(bag), time.monotonic()
        assert (answer.success, answer.code, answer.reason) == (False, code, reason), answer.message
        assert self.artifact.read_bytes() == content
        report = self.node.report()
        assert (report.state, report.reason) == (report.STATE_INACTIVE, reason)
        entry = self.reports.wait_for(
            lambda found: entry_of(found).get("code") == reason.name, timeout=10.0, since=answered
        )
        again = self.ask(self.good)
        assert again.success, again.message
        assert self.node.report().reason == 0
        return entry_of(entry)["code"]


@pytest.fixture
def calibrated(rig, reports, node, tmp_path: Path):
    good = write_bag(tmp_path / "good", load_contract("demo_arm"), 1.0)
    it = Calibrated(rig, reports, node(), good)
    yield it
    it.end()


def test_28_bag_without_a_needed_topic(calibrated, tmp_path, passed) -> None:
    def without(entry: Entry) -> Entry | None:
        return None if entry[0] == "joint_states" else entry

    bag = write_bag(tmp_path / "without", load_contract("demo_arm"), 1.0, change=without)
    code = calibrated.refuses(bag, Calibrate.Response.CODE_BAD_DATA, Reason.BAG_TOPIC_MISSING)
    passed(Outcome(28, "bag without a needed topic", code, NOT_COMMANDING, "with the next good bag"))


def test_29_truncated_bag(calibrated, tmp_path, passed) -> None:
    bag = tmp_path / "truncated"
    shutil.copytree(calibrated.good, bag)
    file = next(bag.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code = calibrated.refuses(bag, Calibrate.Response.CODE_BAD_PATH, Reason.BAG_UNREADABLE)
    passed(Outcome(29, "truncated bag", code, NOT_COMMANDING, "with the next good bag"))
