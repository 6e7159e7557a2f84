"""Weights beside a calibration: whole and readable or refused, and gone once nothing names them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt_runtime import Policy, cache
from flashrt_runtime.errors import CalibrationCorruptError, CalibrationError, CalibrationNotFoundError
from flashrt_runtime.quantization import artifact, in_force, tensor_files
from flashrt_runtime.quantization.weights_file import SUFFIX, WeightsFile


def scales_of(policy: Policy) -> dict[str, float]:
    return policy._calibration.calibrator.scales()


def kept_at(calibration: Path) -> dict[str, int]:
    """Inode of each file of weights beside a calibration."""
    return {each.name: each.stat().st_ino for each in calibration.parent.glob("*.weights.safetensors")}


def test_weights_replaced_are_deleted(compensated, observations) -> None:
    """Gigabytes that no calibration names any more do not stay in the cache."""
    policy = compensated()
    file = policy.save_calibration()
    policy.calibrate(observations(4, 50), weights="compensated")
    policy.save_calibration()
    (kept,) = file.parent.glob("*.weights.safetensors")
    policy.calibrate(observations(2), weights="nearest")
    policy.save_calibration()
    assert not kept.exists()
    assert [each.name for each in file.parent.iterdir()] == [file.name]


DAMAGES = {
    "missing": CalibrationNotFoundError,
    "unreadable": CalibrationError,
    "truncated": CalibrationCorruptError,
    "flipped": CalibrationCorruptError,
    "another": CalibrationCorruptError,
}


def damage(kept: Path, how: str) -> None:
    """The size and time of modification of "flipped" stay."""
    content, state = bytearray(kept.read_bytes()), kept.stat()
    content[-5] ^= 1
    if how in ("missing", "unreadable"):
        kept.unlink()
    if how == "unreadable":  # whoever runs the tests may read every file, but no directory
        kept.mkdir()
    elif how != "missing":
        kept.write_bytes({"truncated": content[:-9], "flipped": content, "another": b"no tensors"}[how])
        os.utime(kept, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("how", DAMAGES)
def test_weights_that_cannot_be_had_are_a_warning_for_the_cache_alone(
    compensated, load, observations, how: str, caplog
) -> None:
    policy = compensated()
    policy.calibrate(observations(3), held_out=1)
    file = policy.save_calibration()
    scales = scales_of(policy)
    assert load(num_steps=1).rounding == "compensated", "its digest is remembered from here on, if ever"
    (kept,) = file.parent.glob("*.weights.safetensors")
    damage(kept, how)
    with caplog.at_level(logging.WARNING):
        found = load(num_steps=1)
    (record,) = (each for each in caplog.records if "compensated" in each.getMessage())
    for text in (file.name, kept.name, "rounded to nearest", "--weights compensated"):
        assert text in record.getMessage()
    assert (found.calibrated, found.rounding, scales_of(found)) == (True, "nearest", scales)
    assert kept.name in found.weights_missing
    assert found._calibration._current.held_out_error is None, "it was measured with other weights"
    with pytest.raises(CalibrationError, match="--weights compensated") as raised:
        load(num_steps=1, calibration=file)
    assert type(raised.value) is DAMAGES[how]
    with pytest.raises(DAMAGES[how]):
        policy.load_calibration(file)
    assert (policy.rounding, policy.weights_missing) == ("compensated", "")
    there = kept.exists()
    found.calibrate(observations(2))
    found.save_calibration()
    assert kept.exists() == there, "what this policy could not read is not its to delete"
    assert found.weights_missing == ""


def test_a_full_disk_leaves_the_earlier_calibration(
    compensated, load, observations, monkeypatch, tmp_path
) -> None:
    policy = compensated()
    file = policy.save_calibration()
    written = kept_at(file)
    policy.calibrate(observations(2), estimator="max")
    policy.save_calibration()  # the same weights: gigabytes that are there already
    assert kept_at(file) == written
    before = {each.name: each.read_bytes() for each in file.parent.iterdir()}
    policy.calibrate(observations(4, 50), weights="compensated")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            policy.save_calibration()
    with monkeypatch.context() as patched:
        patched.setattr(in_force.artifact, "write_atomically", full)
        with pytest.raises(OSError, match="no space"):
            policy.save_calibration()
    with monkeypatch.context() as patched:
        patched.setattr(policy._calibration, "_identity", None)
        patched.setattr(policy._calibration, "_identify", full)
        with pytest.raises(OSError, match="no space"):
            policy.save_calibration(tmp_path / "elsewhere.safetensors")
    assert before == {each.name: each.read_bytes() for each in file.parent.iterdir()}
    assert not list(tmp_path.glob("elsewhere*"))
    assert not list(file.parent.glob(".*"))
    assert load(num_steps=1).rounding == "compensated"


def test_who_may_read_the_calibration_may_read_its_weights(compensated) -> None:
    policy = compensated()
    before = os.umask(0o027)
    try:
        file = policy.save_calibration()
    finally:
        os.umask(before)
    (kept,) = file.parent.glob(f"*{SUFFIX}")
    assert [each.stat().st_mode & 0o777 for each in (file, kept)] == [0o640, 0o640]


def test_synced_renamed_and_the_name_synced(compensated, monkeypatch) -> None:
    """The order in which a power cut leaves the old file or the new one."""
    policy, done = compensated(), []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(cache.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    file = policy.save_calibration()
    (kept,) = file.parent.glob(f"*{SUFFIX}")
    folder = ("sync", file.parent.name)
    at = done.index(("rename", kept.name))
    assert done[at - 1 : at + 2] == [("sync", "weights"), ("rename", kept.name), folder]
    at = done.index(("rename", file.name))
    assert (done[at - 1][0], done[at + 1]) == ("sync", folder)
    assert at > done.index(("rename", kept.name)), "the calibration named weights that were not there yet"


def test_what_a_copy_of_the_calibration_names_stays(compensated, load, observations, tmp_path) -> None:
    policy = compensated()
    file = policy.save_calibration(tmp_path / "scales.safetensors")
    (kept,) = tmp_path.glob(f"*{SUFFIX}")
    good = shutil.copy(file, tmp_path / "good.safetensors")
    (tmp_path / "frame.jpg").write_bytes(b"\xff\xd8 no calibration")
    for seed in (50, 60):
        policy.calibrate(observations(4, seed), weights="compensated")
        policy.save_calibration(file)
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2, "the copy's and those of the last"
    assert load(num_steps=1, calibration=good).rounding == "compensated"
    Path(good).unlink()
    assert kept.exists()


def test_what_killed_writers_left_is_removed_and_nothing_else(compensated, tmp_path) -> None:
    policy = compensated()
    left = tmp_path / f".a{SUFFIX}.1.beef.part"
    others = [tmp_path / name for name in (".tmpNOTES", f".a.b{SUFFIX}.1.beef.part", ".a.part")]
    for each in (left, *others):
        each.mkdir()
        (each / ".tmpX").write_bytes(b"gigabytes")
        os.utime(each, (0, 0))
    policy.save_calibration(tmp_path / "a.safetensors")
    assert not left.exists()
    assert all(each.exists() for each in others)


@pytest.mark.parametrize(
    "stored",
    [
        {"name": f"../x{SUFFIX}", "digest": "0"},
        {"name": f"/etc/x{SUFFIX}", "digest": "0"},
        {"name": "model.safetensors", "digest": "0"},
        {"name": f"x\0{SUFFIX}", "digest": "0"},
        {"name": 5, "digest": "0"},
        {"name": f"x{SUFFIX}", "digest": None},
        {"name": f"x{SUFFIX}"},
        {"name": f"x{SUFFIX}", "digest": "0", "more": 1},
        "x",
    ],
)
def test_names_of_weights_are_checked(compensated, load, monkeypatch, stored: object) -> None:
    policy = compensated()
    file = policy.save_calibration()
    calibration = artifact.read(file)
    monkeypatch.setattr(artifact, "asdict", lambda each: stored if isinstance(each, WeightsFile) else {
        "checkpoint": "0", "version": "0"})
    monkeypatch.setattr(artifact.CalibrationIdentity, "key", "0")
    artifact.write(file, calibration, policy._calibration.identity)
    with pytest.raises(CalibrationCorruptError, match="calibrate again"):
        artifact.read(file)


def test_formats(compensated, observations, monkeypatch) -> None:
    """A version that knows no weights refuses a file that has them; one of format 1 is still read."""
    policy = compensated()
    file = policy.save_calibration()

    def number() -> str:
        size = int.from_bytes(file.read_bytes()[:8], "little")
        return json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"][artifact.MARK]

    assert number() == "2"
    key = policy.calibration_key
    monkeypatch.setattr(artifact, "FORMAT_WITH_WEIGHTS", 1)
    policy.save_calibration()
    assert number() == "1"
    monkeypatch.undo()
    assert artifact.read(file, policy._calibration.identity).weights is not None
    assert policy._calibration.identity.key == key
    without = replace(artifact.read(file), weights=None)
    artifact.write(file, without, policy._calibration.identity)
    assert number() == "1"


def test_an_interrupt_after_the_rename_leaves_what_is_named(compensated, load, monkeypatch) -> None:
    policy = compensated()
    real = in_force.artifact.write_atomically

    def interrupted(path: Path, content: bytes) -> None:
        real(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(in_force.artifact, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        policy.save_calibration()
    assert load(num_steps=1).rounding == "compensated"
