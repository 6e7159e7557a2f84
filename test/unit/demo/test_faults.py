import cv2
import numpy as np
import pytest

from flashrt_ros.demo.faults import (
    RAW_ENCODINGS,
    CameraFaults,
    FaultGate,
    JointFaults,
    StreamFaults,
    encode_compressed,
    encode_raw,
)

MS = 1_000_000
NAMES = ("pan", "lift", "elbow")
POSITIONS = np.array([0.1, 0.2, 0.3])


def test_a_healthy_gate_passes_everything_at_once():
    gate = FaultGate(StreamFaults())
    assert [gate.stamp(time) for time in (1, 2, 3)] == [1, 2, 3]
    assert gate.send(5, "a") == ["a"]


def test_drop_silences_and_recovers():
    gate = FaultGate(StreamFaults(drop=1.0))
    assert gate.stamp(1) is None
    gate.faults = StreamFaults()
    assert gate.stamp(2) == 2


def test_partial_drop_takes_that_fraction():
    gate = FaultGate(StreamFaults(drop=0.3))
    sent = sum(gate.stamp(time) is not None for time in range(1, 4001))
    assert 0.67 < sent / 4000 < 0.73


def test_frozen_stamp_stays_until_released():
    gate = FaultGate(StreamFaults())
    assert gate.stamp(10) == 10
    gate.faults = StreamFaults(freeze_stamp=True)
    assert [gate.stamp(time) for time in (20, 30, 40)] == [20, 20, 20]
    gate.faults = StreamFaults()
    assert gate.stamp(50) == 50


def test_stamp_offset_shifts_either_way():
    gate = FaultGate(StreamFaults(stamp_offset=-0.5))
    assert gate.stamp(2000 * MS) == 1500 * MS


def test_delay_keeps_order_and_time():
    gate = FaultGate(StreamFaults(delay=0.05))
    assert gate.send(0, "a") == []
    assert gate.send(30 * MS, "b") == []
    assert gate.send(50 * MS, None) == ["a"]
    assert gate.send(100 * MS, "c") == ["b"]


def test_joints_missing_renamed_reversed():
    names, (values,) = JointFaults(missing="lift").apply(NAMES, POSITIONS)
    assert names == ["pan", "elbow"]
    np.testing.assert_array_equal(values, [0.1, 0.3])
    names, (values,) = JointFaults(rename="lift:knee").apply(NAMES, POSITIONS)
    assert names == ["pan", "knee", "elbow"]
    np.testing.assert_array_equal(values, POSITIONS)
    names, (values,) = JointFaults(reverse=True).apply(NAMES, POSITIONS)
    assert names == ["elbow", "lift", "pan"]
    np.testing.assert_array_equal(values, [0.3, 0.2, 0.1])


def test_nan_and_inf_hit_the_named_joint_even_when_reversed():
    _, (values, other) = JointFaults(nan="pan", inf="elbow", reverse=True).apply(NAMES, POSITIONS, POSITIONS)
    np.testing.assert_array_equal(values, [np.inf, 0.2, np.nan])
    np.testing.assert_array_equal(other, POSITIONS[::-1])
    np.testing.assert_array_equal(POSITIONS, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        (StreamFaults(drop=1.5), "drop"),
        (StreamFaults(delay=-1.0), "delay"),
        (CameraFaults(truncate=2.0), "truncate"),
        (CameraFaults(drop=-0.1), "drop"),
        (JointFaults(missing="knee"), "knee"),
        (JointFaults(nan="knee"), "knee"),
        (JointFaults(rename="lift"), "joint:new_name"),
        (JointFaults(rename="knee:lift"), "knee"),
    ],
)
def test_options_out_of_range_are_named(faults, word):
    with pytest.raises(ValueError, match=word):
        faults.check(NAMES)


def test_raw_encodings_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    channels = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "mono16": 2}
    for encoding in RAW_ENCODINGS:
        data, step = encode_raw(image, encoding)
        assert data.dtype == np.uint8
        assert step == 5 * channels[encoding]
        assert data.size == 6 * step
    np.testing.assert_array_equal(encode_raw(image, "bgr8")[0].reshape(6, 5, 3)[..., ::-1], image)
    np.testing.assert_array_equal(encode_raw(image, "bgra8")[0].reshape(6, 5, 4)[..., 2::-1], image)
    mono = encode_raw(image, "mono8")[0]
    np.testing.assert_array_equal(encode_raw(image, "mono16")[0].view("<u2"), mono.astype(np.uint16) * 257)
    with pytest.raises(ValueError, match="yuv422"):
        encode_raw(image, "yuv422")


def test_compressed_encodings_decode_to_the_same_colours():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 0] = 200
    for encoding, tolerance in (("png", 0), ("jpeg", 6)):
        decoded = cv2.imdecode(encode_compressed(image, encoding), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
        assert np.abs(decoded - image).max() <= tolerance
    with pytest.raises(ValueError, match="gif"):
        encode_compressed(image, "gif")
