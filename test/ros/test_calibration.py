"""~/calibrate, ~/cancel_calibration and the parameter `calibration`, with a real fp8 policy on the CPU."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from ros_rig import wait_until
from std_srvs.srv import Trigger

from benchmarks.synthetic_bag import Entry, write_bag
from flashrt_ros.core.bag_source import BagSource
from flashrt_ros.core.contract import load_contract
from flashrt_ros.core.parameters import PARAMETERS, PolicyParameters
from flashrt_ros.core.reasons import Reason
from flashrt_ros.msg import PolicyStatus
from flashrt_ros.nodes.policy_node import load_policy
from flashrt_ros.srv import Calibrate, GetActionChunk, SetPrompt
from flashrt_runtime.errors import CalibrationNotFoundError
from flashrt_runtime.loading import load_model

CODES = Calibrate.Response


@pytest.fixture
def home(rig, tmp_path) -> Path:
    """The cache directory of the nodes of this test: a test must find no calibration of another."""
    rig.env["FLASH_RT_HOME"] = str(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def bag(tmp_path_factory) -> Path:
    """Four good seconds of the demo arm."""
    return write_bag(tmp_path_factory.mktemp("bags") / "good", load_contract("demo_arm"), 4.0)


class Lifecycle:
    """Transitions of the node under test, and what it says."""

    def __init__(self, rig, start) -> None:
        self.rig = rig
        self.statuses = rig.collect(PolicyStatus, "/policy_node/status")
        self.diagnostics = rig.collect(DiagnosticArray, "/diagnostics")
        self.start = lambda **parameters: start(**{"autostart": False, "precision": "fp8", **parameters})

    def change(self, name: str) -> bool:
        transition = Transition(id=getattr(Transition, f"TRANSITION_{name.upper()}"))
        answer = self.rig.call(ChangeState, "/policy_node/change_state", timeout=60.0, transition=transition)
        return answer.success

    def set_parameter(self, name: str, value: str) -> None:
        parameter = Parameter(name, value=value).to_parameter_msg()
        answer = self.rig.call(SetParameters, "/policy_node/set_parameters", parameters=[parameter])
        assert answer.results[0].successful, answer

    def trigger(self, name: str):
        return self.rig.call(Trigger, f"/policy_node/{name}")

    def calibrate(self, **fields):
        return self.rig.call(Calibrate, "/policy_node/calibrate", timeout=120.0, **fields)

    def state(self, state: int, timeout: float = 60.0):
        return self.statuses.wait_for(lambda message: message.state == state, timeout, since=time.monotonic())

    def reason(self, reason: Reason, timeout: float = 20.0):
        """The next status with this reason; /diagnostics has its number too."""
        now = time.monotonic()
        found = self.statuses.wait_for(lambda message: message.reason == reason, timeout, since=now)

        def told(message) -> bool:
            pairs = ((item.key, item.value) for status in message.status for item in status.values)
            return ("reason", str(int(reason))) in pairs

        self.diagnostics.wait_for(told, timeout, since=now)
        return found


@pytest.fixture
def node(rig, home, policy_node) -> Lifecycle:
    return Lifecycle(rig, policy_node)


def test_from_a_bag_while_everything_else_is_answered(node, rig, home, bag) -> None:
    """`required` finds nothing to configure with, until a bag has calibrated the node; a bad bag after that
    leaves the artifact as it is."""
    node.start(calibration="required")
    assert not node.change("configure")
    assert "flashrt calibrate" in node.reason(Reason.CALIBRATION_MISSING).message
    node.set_parameter("calibration", "auto")
    assert node.change("configure")
    request = rig.request(
        Calibrate, "/policy_node/calibrate", source="bag", path=str(bag), samples=60, save=True
    )
    running = node.state(PolicyStatus.STATE_CALIBRATING)
    assert running.reason == Reason.CALIBRATING
    assert "observations" in running.message
    assert rig.call(SetPrompt, "/policy_node/set_prompt", timeout=5.0, prompt="open").success
    busy = node.calibrate(source="live")
    assert (busy.code, busy.success) == (CODES.CODE_BUSY, False)
    chunk = rig.call(GetActionChunk, "/policy_node/get_action_chunk", timeout=5.0)
    assert chunk.status == GetActionChunk.Response.CODE_BUSY
    assert not node.change("activate")
    assert not request.done(), "the calibration was over before the other services were asked"
    wait_until(request.done, 120.0, "the answer of ~/calibrate")
    answer = request.result()
    assert (answer.code, answer.message) == (CODES.CODE_OK, "")
    assert (answer.samples_used, answer.held_out, answer.estimator) == (60, 7, "mse")
    assert 0 <= answer.error_rms < 0.5
    assert answer.error_max > 0
    assert 0.8 < answer.error_cosine <= 1.0001
    artifact = Path(answer.artifact)
    assert artifact.is_relative_to(home)
    progress = [message.progress for message in node.statuses.messages if message.progress]
    assert progress == sorted(progress)
    assert 0 < progress[0] < progress[-1] <= 1
    content = artifact.read_bytes()

    bad = node.calibrate(source="bag", path=str(bag / "metadata.yaml"), save=True)
    assert (bad.code, bad.reason) == (CODES.CODE_BAD_PATH, Reason.BAG_UNREADABLE)
    assert artifact.read_bytes() == content
    assert node.change("cleanup")
    node.set_parameter("calibration", "required")
    assert node.change("configure")


def test_cancel_and_refuse(node, rig) -> None:
    """Source live without a camera: it waits, says for what, and is told to stop."""
    node.start()
    assert node.calibrate(source="live").code == CODES.CODE_NOT_CONFIGURED
    assert node.change("configure")
    chunk = rig.call(GetActionChunk, "/policy_node/get_action_chunk", timeout=5.0)
    assert chunk.status == GetActionChunk.Response.CODE_NOT_CALIBRATED, "any picture would set the scales"
    assert "~/calibrate" in chunk.message
    nothing = node.trigger("cancel_calibration")
    assert (nothing.success, nothing.message) == (False, "no calibration is running")
    request = rig.request(Calibrate, "/policy_node/calibrate", source="live", samples=8)
    waiting = node.reason(Reason.NO_MESSAGE)
    assert waiting.state == PolicyStatus.STATE_CALIBRATING
    assert "0 of 9 observations; waiting" in waiting.message
    assert node.trigger("cancel_calibration").success
    wait_until(request.done, 10.0, "the answer of the cancelled calibration")
    answer = request.result()
    assert (answer.code, answer.reason) == (CODES.CODE_CANCELLED, Reason.CALIBRATION_CANCELLED)
    assert (answer.success, answer.artifact, answer.samples_used) == (False, "", 0)
    node.reason(Reason.CALIBRATION_CANCELLED)
    request = rig.request(Calibrate, "/policy_node/calibrate", source="live", samples=8)
    node.state(PolicyStatus.STATE_CALIBRATING)
    assert node.change("cleanup")
    wait_until(request.done, 10.0, "the answer of the calibration that was cleaned up")
    assert request.result().code == CODES.CODE_CANCELLED


def check_requests_that_make_no_sense(node, tmp_path, bag) -> None:
    missing = str(tmp_path / "no.mcap")
    for fields, code, words in (
        ({"source": "dream"}, CODES.CODE_BAD_SOURCE, "live, bag, dataset"),
        ({"source": "bag", "path": missing}, CODES.CODE_BAD_PATH, missing),
        ({"source": "live", "path": str(bag)}, CODES.CODE_BAD_ARGUMENT, "leave it empty"),
        ({"source": "live", "percentile": -1.0}, CODES.CODE_BAD_ARGUMENT, "percentile"),
        ({"source": "live", "percentile": 100.5}, CODES.CODE_BAD_ARGUMENT, "percentile"),
        ({"source": "live", "percentile": float("nan")}, CODES.CODE_BAD_ARGUMENT, "percentile"),
        ({"source": "live", "samples": 5000}, CODES.CODE_BAD_ARGUMENT, "4096"),
        ({"source": "bag", "path": str(bag), "task_filter": "x"}, CODES.CODE_BAD_ARGUMENT, "task_filter"),
    ):
        answer = node.calibrate(**fields)
        assert (answer.code, answer.success) == (code, False), answer
        assert words in answer.message
        assert np.isnan([answer.error_max, answer.error_rms, answer.error_cosine]).all()


@pytest.mark.slow
def test_a_precision_without_scales(node) -> None:
    node.start(precision="fp32")
    assert node.change("configure")
    answer = node.calibrate(source="live")
    assert (answer.code, answer.reason) == (CODES.CODE_NOT_SUPPORTED, Reason.PARAMETER_INVALID)
    assert "fp32" in answer.message


def test_activation_waits_for_eight_live_observations(node, home, demo_robot) -> None:
    """auto: nothing is commanded until scales are there, then the robot runs; held, it can be calibrated
    again; driving, it cannot (fault row 32)."""
    node.start(calibration="auto", prompt="wave")
    assert node.change("configure")
    assert node.change("activate")
    waiting = node.reason(Reason.NO_MESSAGE)
    assert waiting.state == PolicyStatus.STATE_CALIBRATING
    assert node.change("deactivate")
    assert node.change("activate")
    demo_robot()
    node.state(PolicyStatus.STATE_RUNNING)
    (artifact,) = home.glob("calibration/*.safetensors")
    active = node.calibrate(source="live", samples=2)
    assert (active.code, active.success) == (CODES.CODE_ACTIVE, False)
    assert "~/hold" in active.message
    before = artifact.read_bytes()
    assert node.trigger("hold").success
    held = node.calibrate(source="live", samples=2, percentile=99.9, save=True)
    assert (held.code, held.message) == (CODES.CODE_OK, "")
    assert (held.samples_used, held.held_out, held.estimator) == (2, 1, "percentile")
    assert held.artifact == str(artifact)
    assert artifact.read_bytes() != before
    assert node.trigger("resume").success
    node.state(PolicyStatus.STATE_RUNNING)


@pytest.mark.slow  # each bag by itself is a fast test of core
def test_bags_and_requests_of_no_use(node, home, tmp_path, bag) -> None:
    """Fault rows 28 and 29, and frozen cameras: an answer with a code, a reason on ~/status and
    /diagnostics, and the next, good bag is taken."""
    contract = load_contract("demo_arm")

    def without_wrist(entry: Entry) -> Entry | None:
        return None if entry[0] == "wrist_camera" else entry

    frames: dict[str, bytes] = {}

    def frozen(entry: Entry) -> Entry:
        name, index, stamp, time_, data = entry
        return (name, index, stamp, time_, frames.setdefault(name, data) if "camera" in name else data)

    truncated = tmp_path / "truncated"
    shutil.copytree(bag, truncated)
    file = next(truncated.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[:100_000])
    node.start()
    assert node.change("configure")
    check_requests_that_make_no_sense(node, tmp_path, bag)
    for path, code, reason in (
        (write_bag(tmp_path / "m", contract, 1.0, change=without_wrist), CODES.CODE_BAD_DATA,
         Reason.BAG_TOPIC_MISSING),
        (truncated, CODES.CODE_BAD_PATH, Reason.BAG_UNREADABLE),
        (write_bag(tmp_path / "f", contract, 1.0, change=frozen), CODES.CODE_BAD_DATA, Reason.BAG_FROZEN),
    ):
        answer = node.calibrate(source="bag", path=str(path), samples=4)
        assert (answer.code, answer.reason, answer.success) == (code, reason, False), answer
        assert str(path) in answer.message
        node.reason(reason)
    home.mkdir(exist_ok=True)
    (home / "calibration").write_text("in the way of the directory")
    unsaved = node.calibrate(source="bag", path=str(bag), samples=4, save=True)
    assert (unsaved.code, unsaved.samples_used, unsaved.artifact) == (CODES.CODE_NOT_SAVED, 4, "")
    assert "in force" in unsaved.message
    answer = node.calibrate(source="bag", path=str(bag), samples=64)
    assert answer.code == CODES.CODE_OK
    assert (answer.samples_used, answer.artifact) == (64, "")
    node.reason(Reason.OK)


@pytest.mark.slow
def test_a_dataset_and_a_directory_of_images(node, tmp_path) -> None:
    """The views are matched by name; what does not fit is said before a frame is read."""
    import cv2

    names = ("base_0_rgb", "left_wrist_0_rgb")
    folder = tmp_path / "images"
    folder.mkdir()
    entries = []
    for index in range(6):
        files = {name: f"{name}_{index}.png" for name in names}
        for seed, file in enumerate(files.values()):
            pixels = np.random.default_rng(10 * index + seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / file), pixels)
        entries.append({"images": files, "prompt": "wave", "state": [0.01 * index] * 7})
    (folder / "observations.json").write_text(json.dumps(entries))
    node.start()
    assert node.change("configure")
    answer = node.calibrate(source="dataset", path=str(folder), samples=5)
    assert (answer.code, answer.samples_used, answer.held_out) == (CODES.CODE_OK, 5, 1), answer.message
    few = node.calibrate(source="dataset", path=str(folder), samples=30)
    assert few.code == CODES.CODE_OK
    assert 0 < few.samples_used <= 6  # as many as there are
    assert few.warnings == ["6 observations of the 30 + 3 that were asked for: 5 calibrated on, 1 held out"]
    assert few.held_out == 1
    task = node.calibrate(source="dataset", path=str(folder), task_filter="wave")
    assert (task.code, task.reason) == (CODES.CODE_BAD_ARGUMENT, Reason.PARAMETER_INVALID)
    (folder / "meta").mkdir()
    broken = node.calibrate(source="dataset", path=str(folder))
    assert (broken.code, broken.reason) == (CODES.CODE_BAD_DATA, Reason.DATASET_INVALID)
    assert "info.json" in broken.message
    dataset = write_dataset(tmp_path / "lerobot")
    lerobot = node.calibrate(source="dataset", path=str(dataset), samples=4, task_filter="wave")
    assert (lerobot.code, lerobot.samples_used) == (CODES.CODE_OK, 4), lerobot.message
    nothing = node.calibrate(source="dataset", path=str(dataset), task_filter="dance")
    assert (nothing.code, nothing.reason) == (CODES.CODE_BAD_DATA, Reason.DATASET_INVALID)


def write_dataset(root: Path) -> Path:
    """A LeRobot v2 dataset of one episode whose cameras are called as the demo arm's views."""
    import cv2
    import pyarrow as arrow
    from pyarrow import parquet

    names = ("base_0_rgb", "left_wrist_0_rgb")
    rows = []
    for index in range(12):
        row: dict[str, object] = {"observation.state": [0.01 * index] * 7}
        for seed, name in enumerate(names):
            pixels = np.random.default_rng(10 * index + seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            encoded = cv2.imencode(".png", pixels)[1].tobytes()
            row[f"observation.images.{name}"] = {"bytes": encoded, "path": None}
        numbers = {"frame_index": index, "episode_index": 0, "index": index, "task_index": 0}
        rows.append({**row, **numbers, "timestamp": index / 10})
    features: dict[str, object] = {
        f"observation.images.{name}": {"dtype": "image", "shape": [48, 64, 3]} for name in names
    }
    features["observation.state"] = {"dtype": "float32", "shape": [7]}
    info = {
        "codebase_version": "v2.1", "fps": 10, "features": features, "total_episodes": 1, "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    for name in ("meta", "data/chunk-000"):
        (root / name).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "wave at them"}) + "\n")
    episode = {"episode_index": 0, "tasks": ["wave at them"], "length": 12}
    (root / "meta/episodes.jsonl").write_text(json.dumps(episode) + "\n")
    parquet.write_table(arrow.Table.from_pylist(rows), root / "data/chunk-000/episode_000000.parquet")
    return root


@pytest.mark.slow
def test_a_cancelled_activation_can_be_calibrated_from_a_bag(node, demo_robot, bag) -> None:
    """The wait for live observations is cancelled: nothing is commanded, with a reason; held, a bag helps."""
    node.start()
    assert node.change("configure")
    assert node.change("activate")
    node.state(PolicyStatus.STATE_CALIBRATING)
    assert node.trigger("cancel_calibration").success
    cancelled = node.reason(Reason.CALIBRATION_CANCELLED)
    assert cancelled.state == PolicyStatus.STATE_FAULT
    assert "nothing is commanded" in cancelled.message
    demo_robot()
    node.statuses.wait_for(lambda message: message.stream_rates[0] > 5, timeout=60.0)
    still = node.state(PolicyStatus.STATE_FAULT)
    assert (still.reason, still.sequence) == (Reason.CALIBRATION_CANCELLED, 0)
    assert node.trigger("hold").success
    bad = node.calibrate(source="bag", path=str(bag / "metadata.yaml"))
    assert bad.code == CODES.CODE_BAD_PATH
    node.state(PolicyStatus.STATE_FAULT)
    assert node.calibrate(source="bag", path=str(bag), samples=4).code == CODES.CODE_OK
    assert node.trigger("resume").success
    node.state(PolicyStatus.STATE_RUNNING)


@pytest.mark.slow
def test_live_topics_that_fall_silent(node) -> None:
    """~/calibrate gives up after ten seconds, and says what is missing."""
    node.start()
    assert node.change("configure")
    answer = node.calibrate(source="live", samples=2)
    assert (answer.code, answer.reason) == (CODES.CODE_NOT_ENOUGH_SAMPLES, Reason.NO_MESSAGE)
    assert "0 of 3 observations" in answer.message
    assert "base_camera" in answer.message


def test_numbers_of_the_codes() -> None:
    """They are part of the interface."""
    names = [name for name in vars(type(CODES)) if name.startswith("CODE_")]
    assert {name: getattr(CODES, name) for name in names} == {
        "CODE_OK": 0, "CODE_BAD_SOURCE": 1, "CODE_BAD_PATH": 2, "CODE_BAD_ARGUMENT": 3, "CODE_ACTIVE": 4,
        "CODE_NOT_CONFIGURED": 5, "CODE_NOT_SUPPORTED": 6, "CODE_CANCELLED": 7, "CODE_NOT_ENOUGH_SAMPLES": 8,
        "CODE_INTERNAL": 9, "CODE_BAD_DATA": 10, "CODE_BUSY": 11, "CODE_NOT_SAVED": 12,
    }


@pytest.mark.slow
def test_calibration_files_of_no_use(node, checkpoint_maker, bag, tmp_path, home) -> None:
    """Fault rows 24 and 26: the node refuses to configure and says why; with a good file it goes on."""
    node.start()
    assert node.change("configure")
    good = node.calibrate(source="bag", path=str(bag), samples=2, save=True).artifact
    assert node.change("cleanup")
    kept = shutil.move(good, tmp_path / "kept.safetensors")
    stranger = checkpoint_maker("--seed", "5")
    policy = load_model(stranger, num_views=2, precision="fp8", hardware="cpu")
    try:
        with BagSource(bag, load_contract("demo_arm"), samples=1) as source:
            policy.calibrate(source.mappings("wave"))
        other = policy.save_calibration(tmp_path / "other.safetensors")
    finally:
        policy.close()
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(Path(kept).read_bytes()[:-100])

    for file, reason in ((other, Reason.CALIBRATION_MISMATCH), (corrupt, Reason.CALIBRATION_CORRUPT)):
        node.set_parameter("calibration", str(file))
        assert not node.change("configure")
        assert str(file) in node.reason(reason).message
    node.set_parameter("calibration", str(kept))
    assert node.change("configure")


def test_required_insists_on_the_weights_of_a_calibration_too(checkpoint, tmp_path, monkeypatch) -> None:
    """`auto` goes on with the nearest ones and says so. Loaded as the node's worker loads."""
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path))
    contract = load_contract("demo_arm")

    def load(calibration: str):
        given = {"checkpoint": str(checkpoint), "robot": "demo_arm", "precision": "fp8"}
        given |= {"calibration": calibration, "num_steps": 1, "hardware": "cpu"}
        values = PolicyParameters.from_values({spec.name: spec.default for spec in PARAMETERS} | given)
        with ThreadPoolExecutor(1) as worker:
            return worker.submit(load_policy, values, contract).result()

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in contract.views]
    policy = load("auto")
    state = np.zeros(policy.spec.state_dim, np.float32)
    policy.calibrate([{"images": images, "prompt": "wave", "state": state}], weights="compensated")
    (weights,) = policy.save_calibration().parent.glob("*.weights.safetensors")
    policy.close()
    policy = load("required")
    assert policy.rounding == "compensated"
    policy.close()
    weights.unlink()
    with pytest.raises(CalibrationNotFoundError, match=f"'required': .*{weights.name} back"):
        load("required")
    policy = load("auto")
    assert (policy.calibrated, policy.rounding) == (True, "nearest")
    policy.close()
