"""Joint messages by name, snapshots to observations, measured start positions. Messages are stand-ins."""

import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt_ros.core.contract import RobotContract, load_contract
from flashrt_ros.core.errors import IngestError
from flashrt_ros.core.ingest import Ingest, JointReader, MeasuredPositions
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.refusals import MessageInspector, RefusedMessages
from flashrt_ros.core.sync import Snapshot, Stamped, Synchroniser

Messages = Callable[..., SimpleNamespace]
NAMES = ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3", "gripper"]
VALUES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.007]


def refused(action: Callable[[], Any], reason: Reason, text: str) -> None:
    with pytest.raises(IngestError, match=text) as caught:
        action()
    assert caught.value.reason is reason
    assert caught.value.stream == "joint_states"


def test_state_in_policy_order_and_units(tmp_path: Path, demo_text: str, joint_message: Messages) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(
        demo_text.replace("unit: m, ", "unit: m, sign: -1, scale: 25, offset: 1, ")
        .replace("joints: [shoulder_pan, shoulder_lift,", "joints: [shoulder_lift, shoulder_pan,", 1)
    )
    state = JointReader(load_contract(path)).state_from_message(joint_message(NAMES, VALUES))
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 1 - 25 * 0.007], rtol=1e-6)


@given(order=st.permutations(range(9)))
def test_order_of_the_message_does_not_matter(demo: RobotContract, order: list[int]) -> None:
    names, values = [*NAMES, "left_finger", "right_finger"], [*VALUES, np.nan, 5.0]
    message = SimpleNamespace(
        name=[names[i] for i in order], position=array.array("d", [values[i] for i in order]), velocity=[]
    )
    np.testing.assert_allclose(JointReader(demo).state_from_message(message), VALUES, rtol=1e-6)


def test_order_may_change_between_messages(demo: RobotContract, joint_message: Messages) -> None:
    reader = JointReader(demo)
    for names, values in ((NAMES, VALUES), (NAMES[::-1], VALUES[::-1]), (NAMES, VALUES)):
        np.testing.assert_allclose(reader.state_from_message(joint_message(names, values)), VALUES, rtol=1e-6)


@pytest.mark.parametrize(("names", "values", "reason", "text"), [
    (NAMES[:-1], VALUES[:-1], Reason.JOINT_MISSING, "gripper is not in the message, which has shoulder_pan"),
    ([*NAMES[:-1], "Gripper"], VALUES, Reason.JOINT_MISSING, "joint gripper is not in the message"),
    ([], [], Reason.JOINT_MISSING, "which has none"),
    ([*NAMES, "elbow"], [*VALUES, 0.0], Reason.JOINT_DUPLICATE, "joint elbow is named more than once"),
    (NAMES, VALUES[:-1], Reason.JOINT_FIELD, "7 joint names, but 6 values of position"),
    (NAMES, [], Reason.JOINT_FIELD, "but 0 values"),
    (NAMES, [*VALUES[:-1], np.nan], Reason.JOINT_NOT_FINITE, "position of joint gripper is nan"),
    (NAMES, [-np.inf, *VALUES[1:]], Reason.JOINT_NOT_FINITE, "position of joint shoulder_pan is -inf"),
    (NAMES, [1e300, *VALUES[1:]], Reason.JOINT_NOT_FINITE, "shoulder_pan is beyond what a policy can take"),
])
def test_bad_joint_messages(
    demo: RobotContract, joint_message: Messages, names: list[str], values: list[float], reason: Reason,
    text: str,
) -> None:
    reader = JointReader(demo)
    reader.state_from_message(joint_message(NAMES, VALUES))
    refused(lambda: reader.state_from_message(joint_message(names, values)), reason, text)
    np.testing.assert_allclose(reader.state_from_message(joint_message(NAMES, VALUES)), VALUES, rtol=1e-6)


def test_state_from_two_streams_and_fields(tmp_path: Path, demo_text: str, joint_message: Messages) -> None:
    before, after = demo_text.split("state:\n")[0], demo_text[demo_text.index("action:\n") :]
    sources = (
        "state:\n  - {stream: joint_states, joints: [elbow]}\n"
        "  - {stream: joint_states, field: velocity, joints: [elbow]}\n"
        "  - {stream: hand, joints: [gripper]}\n"
    )
    hand = "streams:\n  hand: {topic: hand, type: sensor_msgs/msg/JointState}\n"
    text = (
        (before + sources + after.replace(f"joints: [{', '.join(NAMES)}]", "joints: [gripper, elbow]"))
        .replace("streams:\n", hand)
        .replace("name: elbow,", "name: elbow, offset: 10,")
    )
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    contract = load_contract(path)
    arm = joint_message(NAMES, VALUES, [7.0] * 7)
    fingers = joint_message(["gripper"], [0.03])
    state = JointReader(contract).state({"joint_states": arm, "hand": fingers})
    np.testing.assert_allclose(state, [10.3, 7.0, 0.03], rtol=1e-6)
    sync = Synchroniser(contract)
    sync.push("joint_states", 0, 5, arm)
    sync.push("hand", 0, 5, fingers)
    np.testing.assert_allclose(MeasuredPositions(contract, sync)(6), [0.03, 0.3])


def snapshot_of(joint_message: Messages, base: np.ndarray, wrist: np.ndarray, **changes: Any) -> Snapshot:
    """A complete set for the demo arm: raw base camera, JPEG wrist camera."""
    done, jpeg = cv2.imencode(".png", wrist[..., ::-1])
    assert done
    payloads = {
        "base_camera": SimpleNamespace(
            height=base.shape[0], width=base.shape[1], step=base.shape[1] * 3, encoding="rgb8",
            data=array.array("B", base.tobytes()),
        ),
        "wrist_camera": SimpleNamespace(format="png", data=array.array("B", jpeg.tobytes())),
        "joint_states": joint_message(NAMES, VALUES),
    }
    payloads.update(changes)
    stamps = {"base_camera": 30, "wrist_camera": 50, "joint_states": 60}
    return Snapshot({name: Stamped(stamps[name], 0, payload) for name, payload in payloads.items()}, 30)


BASE = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
WRIST = np.random.default_rng(2).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_observation_of_a_snapshot(demo: RobotContract, joint_message: Messages) -> None:
    observation = Ingest(demo).observe(snapshot_of(joint_message, BASE, WRIST))
    assert list(observation.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    np.testing.assert_array_equal(observation.images["base_0_rgb"], BASE)
    np.testing.assert_array_equal(observation.images["left_wrist_0_rgb"], WRIST)
    np.testing.assert_allclose(observation.state, VALUES, rtol=1e-6)
    assert observation.stamps == {"base_camera": 30, "wrist_camera": 50, "joint_states": 60}
    assert observation.newest_image_stamp == 50


def test_crop_of_the_contract(tmp_path: Path, demo_text: str, joint_message: Messages) -> None:
    path = tmp_path / "robot.yaml"
    crop = "crop: {x: 4, y: 2, width: 8, height: 6}"
    path.write_text(
        demo_text.replace("view: base_0_rgb", f"view: base_0_rgb\n    {crop}")
        .replace("view: left_wrist_0_rgb", f"view: left_wrist_0_rgb\n    {crop}")
    )
    observation = Ingest(load_contract(path)).observe(snapshot_of(joint_message, BASE, WRIST))
    np.testing.assert_array_equal(observation.images["base_0_rgb"], BASE[2:8, 4:12])
    np.testing.assert_array_equal(observation.images["left_wrist_0_rgb"], WRIST[2:8, 4:12])


def test_a_camera_that_changes_its_format_is_refused_until_reset(
    demo: RobotContract, joint_message: Messages
) -> None:
    ingest = Ingest(demo)
    ingest.observe(snapshot_of(joint_message, BASE, WRIST))
    with pytest.raises(IngestError, match="size changed from 32 x 24 to 16 x 12 pixels") as caught:
        ingest.observe(snapshot_of(joint_message, WRIST, WRIST))
    assert (caught.value.reason, caught.value.stream) == (Reason.IMAGE_SIZE, "base_camera")
    turned = SimpleNamespace(height=24, width=32, step=96, encoding="bgr8", data=BASE.tobytes())
    with pytest.raises(IngestError, match="encoding changed from 'rgb8' to 'bgr8'") as caught:
        ingest.observe(snapshot_of(joint_message, BASE, WRIST, base_camera=turned))
    assert caught.value.reason is Reason.IMAGE_ENCODING
    ingest.observe(snapshot_of(joint_message, BASE, WRIST))
    ingest.reset()
    ingest.observe(snapshot_of(joint_message, WRIST, WRIST))


def test_fallback_decoder_is_handed_through(demo: RobotContract, joint_message: Messages) -> None:
    exotic = SimpleNamespace(height=24, width=32, step=64, encoding="yuv422", data=bytes(24 * 64))
    ingest = Ingest(demo, fallback_decoder=lambda message: BASE)
    observation = ingest.observe(snapshot_of(joint_message, BASE, WRIST, base_camera=exotic))
    np.testing.assert_array_equal(observation.images["base_0_rgb"], BASE)


def test_measured_positions_are_fresh_or_an_error(demo: RobotContract, joint_message: Messages) -> None:
    sync = Synchroniser(demo)
    measured = MeasuredPositions(demo, sync)
    refused(lambda: measured(0), Reason.NO_MESSAGE, "no joint positions yet")
    sync.push("joint_states", 0, 1000, joint_message(NAMES[::-1], VALUES[::-1]))
    np.testing.assert_allclose(measured(1000), VALUES)
    refused(lambda: measured(400_001_000), Reason.STALE_RECEIPT, "joint positions are 0.400 s old")
    sync.push("joint_states", 0, 400_000_000, joint_message(NAMES[:3], VALUES[:3]))
    refused(lambda: measured(400_000_000), Reason.JOINT_MISSING, "wrist_1, wrist_2, wrist_3, gripper")


def test_an_optional_camera_that_is_silent_is_absent(
    tmp_path: Path, demo_text: str, joint_message: Messages
) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(demo_text.replace("view: left_wrist_0_rgb", "view: left_wrist_0_rgb\n    optional: true"))
    ingest = Ingest(load_contract(path))
    whole = snapshot_of(joint_message, BASE, WRIST)
    assert ingest.observe(whole).absent == ()
    messages = {name: item for name, item in whole.messages.items() if name != "wrist_camera"}
    observation = ingest.observe(Snapshot(messages, 30))
    assert observation.absent == ("left_wrist_0_rgb",)
    assert list(observation.images) == ["base_0_rgb"]
    assert observation.newest_image_stamp == 30
    images = observation.policy_images
    assert set(images) == {"base_0_rgb", "left_wrist_0_rgb"}
    assert images["left_wrist_0_rgb"] is None
    np.testing.assert_array_equal(images["base_0_rgb"], BASE)


@pytest.mark.parametrize("kind", ["damaged", "not an image", "another size"])
def test_an_optional_camera_that_sends_garbage_is_absent_too(
    tmp_path: Path, demo_text: str, joint_message: Messages, kind: str
) -> None:
    """Unplugging it would not stop the robot; neither may a bad frame. The needed camera's still does."""
    text = demo_text.replace("type: sensor_msgs/msg/Image", "type: sensor_msgs/msg/CompressedImage")
    path = tmp_path / "robot.yaml"
    path.write_text(text.replace("view: left_wrist_0_rgb", "view: left_wrist_0_rgb\n    optional: true"))
    contract, told = load_contract(path), RefusedMessages()
    inspector, ingest = MessageInspector(contract, told), Ingest(contract, on_refused=told.count)
    noise = np.random.default_rng(4).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    good = jpeg_of(cv2.GaussianBlur(noise, (0, 0), 1))
    torn = good.data[:800] + good.data[1500:]
    bad, reason = {
        "damaged": (SimpleNamespace(format="jpeg", data=torn), Reason.IMAGE_DECODE),
        "not an image": (SimpleNamespace(format="jpeg", data=b"soup" * 99), Reason.IMAGE_ENCODING),
        "another size": (jpeg_of(noise[:48]), Reason.IMAGE_SIZE),
    }[kind]

    def sent(base: SimpleNamespace, wrist: SimpleNamespace) -> Snapshot:
        payloads = {"base_camera": base, "wrist_camera": wrist, "joint_states": joint_message(NAMES, VALUES)}
        for name, payload in payloads.items():
            inspector.inspect(name, 0, 0, payload)
        stamps = {"base_camera": 30, "wrist_camera": 40, "joint_states": 35}
        return Snapshot({name: Stamped(stamps[name], 0, item) for name, item in payloads.items()}, 10)

    assert ingest.observe(sent(good, good)).absent == ()
    observation = ingest.observe(sent(good, bad))
    assert observation.absent == ("left_wrist_0_rgb",)
    assert list(observation.images) == ["base_0_rgb"]
    assert observation.newest_image_stamp == 30
    assert sorted(observation.stamps) == ["base_camera", "joint_states"]
    assert told.counts() == {"wrist_camera": {reason: 1}}
    assert ingest.observe(sent(good, good)).absent == (), "it comes back by itself"
    with pytest.raises(IngestError, match="base_camera"):
        ingest.observe(sent(bad, good))


@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("crop", [None, "crop: {x: 4, y: 2, width: 8, height: 6}"])
def test_raw_pixels_are_the_messages_own(
    tmp_path: Path, demo_text: str, joint_message: Messages, padding: int, crop: str | None
) -> None:
    """From the message to the policy's argument nothing is copied, whatever the row padding and the crop."""
    path = tmp_path / "robot.yaml"
    path.write_text(demo_text.replace("view: base_0_rgb", f"view: base_0_rgb\n    {crop or 'crop: null'}"))
    rows = np.concatenate([BASE.reshape(24, 96), np.full((24, padding), 9, np.uint8)], axis=1)
    message = SimpleNamespace(
        height=24, width=32, step=96 + padding, encoding="rgb8", data=array.array("B", rows.tobytes())
    )
    observation = Ingest(load_contract(path)).observe(
        snapshot_of(joint_message, BASE, WRIST, base_camera=message)
    )
    image = observation.policy_images["base_0_rgb"]
    assert image is not None
    assert np.shares_memory(image, np.frombuffer(message.data, np.uint8))
    np.testing.assert_array_equal(image, BASE[2:8, 4:12] if crop else BASE)


def jpeg_of(image: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(format="jpeg", data=cv2.imencode(".jpg", image)[1].tobytes())


def test_three_compressed_cameras_are_decoded_in_their_own_places(
    tmp_path: Path, demo_text: str, joint_message: Messages
) -> None:
    """On the pool's threads; the first bad one in the contract's order is reported, and once only."""
    third = "  third: {topic: third, type: sensor_msgs/msg/CompressedImage, view: right_wrist_0_rgb}\n"
    text = demo_text.replace("type: sensor_msgs/msg/Image", "type: sensor_msgs/msg/CompressedImage")
    path = tmp_path / "robot.yaml"
    path.write_text(text.replace("streams:\n", f"streams:\n{third}"))
    told: list[tuple[str, Reason]] = []
    ingest = Ingest(load_contract(path), on_refused=lambda *refused: told.append(refused))
    shades = {"third": 10, "base_camera": 90, "wrist_camera": 200}
    packed = {name: jpeg_of(np.full((96, 128, 3), shade, np.uint8)) for name, shade in shades.items()}
    payloads = {**packed, "joint_states": joint_message(NAMES, VALUES)}
    for _ in range(20):
        whole = Snapshot({name: Stamped(1, 0, payload) for name, payload in payloads.items()}, 0)
        images = ingest.observe(whole).images
        assert [int(image.mean()) for image in images.values()] == [10, 90, 200]
    noise = np.random.default_rng(4).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    data = jpeg_of(cv2.GaussianBlur(noise, (0, 0), 1)).data
    broken = SimpleNamespace(format="jpeg", data=data[:800] + data[1500:])
    bad = {**payloads, "base_camera": broken, "wrist_camera": broken}
    damaged = Snapshot({name: Stamped(1, 0, payload) for name, payload in bad.items()}, 0)
    for _ in range(3):
        with pytest.raises(IngestError, match="base_camera: JPEG is damaged"):
            ingest.observe(damaged)
    assert told == [("base_camera", Reason.IMAGE_DECODE)]


def test_one_message_for_both_arms_names_joints_as_the_contract_does(joint_message: Messages) -> None:
    """Two arms share their drivers' names: a message that held both by them would be ambiguous."""
    contract = load_contract("aloha")
    names = list(contract.action.joints)
    message = joint_message(names, np.linspace(0.0, 1.3, 14))
    reader = JointReader(contract, contract_names=True)
    state = reader.state({"left_joint_states": message, "right_joint_states": message})
    np.testing.assert_allclose(state[[0, 3, 7]], [0.0, 0.3, 0.7], rtol=1e-6)
    with pytest.raises(IngestError, match=r"joint waist, shoulder, .* is not in the message"):
        JointReader(contract).state({"left_joint_states": message, "right_joint_states": message})
