"""A calibration file belongs to one policy, is whole or refused, and is written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flashrt_runtime
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.errors import (
    CalibrationCorruptError,
    CalibrationError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
    OptionError,
)
from flashrt_runtime.quantization import artifact
from flashrt_runtime.quantization.artifact import CalibrationIdentity, identity_of

VIEWS = ("base_0_rgb", "left_wrist_0_rgb")


def identity(
    checkpoint: Path, views: tuple[str, ...] = VIEWS, precision: str = "fp8", **options: object
) -> CalibrationIdentity:
    with open_checkpoint(checkpoint, config="auto", **options) as opened:
        return identity_of(opened, views, precision)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def saved(load, observations) -> tuple[flashrt_runtime.Policy, Path]:
    policy = load(num_steps=1)
    policy.calibrate(observations(6), held_out=1, source="unit test")
    return policy, policy.save_calibration()


def test_what_is_saved_is_loaded(saved, load, observations, caplog) -> None:
    policy, file = saved
    assert file == policy._calibration.identity.cached_file
    assert policy.calibration_key in file.name
    (observation,) = observations(1, 99)
    want = policy.predict(**observation)
    caplog.clear()
    other = load(num_steps=1)
    assert other.calibrated
    assert np.array_equal(other.predict(**observation), want)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert other.calibration_key == policy.calibration_key


def test_content(saved) -> None:
    policy, file = saved
    content = artifact.read(file, policy._calibration.identity)
    assert content.scales == policy._calibration.calibrator.scales()
    assert (content.samples, content.estimator, content.source) == (5, "mse", "unit test")
    assert content.maxima.shape == (5, len(content.scales))
    assert content.held_out_error is not None
    assert len(content.held_out_error.per_sample) == 1
    assert content.date.endswith("+00:00")
    stored = artifact.stored_identity(file)
    assert stored["version"] == flashrt_runtime.__version__
    assert stored["precision"] == "fp8"
    assert stored["views"] == list(VIEWS)
    assert load_file(file).keys() == {"scales", "maxima"}, "not a plain safetensors file"


def test_saved_again_it_is_the_same_calibration(saved, load, tmp_path) -> None:
    """Provenance survives a load: a saved copy still says where the scales are from."""
    _, file = saved
    policy = load(num_steps=1)
    again = policy.save_calibration(tmp_path / "again.safetensors")
    one, two = (dataclasses.asdict(artifact.read(each)) for each in (file, again))
    assert np.array_equal(one.pop("maxima"), two.pop("maxima"))
    assert one == two


def test_options_of_load_model(saved, load, tmp_path) -> None:
    policy, file = saved
    elsewhere = tmp_path / "elsewhere.safetensors"
    file.rename(elsewhere)
    assert not load(num_steps=1).calibrated
    assert load(num_steps=1, calibration=str(elsewhere)).calibrated
    with pytest.raises(CalibrationMismatchError, match="num_steps"):
        load(num_steps=2, calibration=elsewhere)
    with pytest.raises(CalibrationNotFoundError, match=r"nowhere.*flashrt calibrate"):
        load(num_steps=1, calibration=tmp_path / "nowhere")
    with pytest.raises(OptionError, match="recalibrate"):
        load(num_steps=1, calibration=elsewhere, recalibrate=True)
    with pytest.raises(OptionError, match="is for fp8"):
        load(num_steps=1, calibration=elsewhere, precision="bf16")
    elsewhere.rename(file)
    assert load(num_steps=1, calibration="auto").calibrated
    assert not load(num_steps=1, calibration="none").calibrated
    assert not load(num_steps=1, recalibrate=True).calibrated
    assert load(num_steps=1, precision="fp32").calibrated, "fp32 lacks no scales"
    policy.recalibrate()
    assert not policy.calibrated
    with pytest.raises(CalibrationError, match="none to save"):
        policy.save_calibration()
    policy.load_calibration()
    assert policy.calibrated


def test_nothing_but_a_calibration_is_replaced(saved, copy, tmp_path) -> None:
    """`save_calibration(checkpoint / "model.safetensors")` once made 3 kB of scales of the weights."""
    policy, _ = saved
    file = tmp_path / "scales"
    file.touch()
    policy.save_calibration(file)
    policy.save_calibration(file)
    whole = file.read_bytes()
    (tmp_path / "notes").write_text("about the scales")
    (tmp_path / "cut").write_bytes(whole[:100])
    for other in (copy / "model.safetensors", tmp_path / "notes", tmp_path / "cut"):
        before = other.read_bytes()
        with pytest.raises(CalibrationError, match=f"{other.name}: holds something else .* delete this one"):
            policy.save_calibration(other)
        assert other.read_bytes() == before
    with pytest.raises(CalibrationError, match="expected the name of a file"):
        policy.save_calibration(tmp_path)
    with pytest.raises(CalibrationError, match="notes is no directory"):
        policy.save_calibration(tmp_path / "notes" / "a" / "b")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    policy.save_calibration(file)
    assert load_file(file).keys() == load_file(policy.save_calibration(tmp_path / "new" / "file")).keys()


def test_not_found(load) -> None:
    policy = load(num_steps=1)
    with pytest.raises(CalibrationNotFoundError, match=policy.calibration_key):
        policy.load_calibration()
    plain = load(precision="fp32")
    for refused in (lambda: plain.calibration_key, plain.load_calibration, plain.save_calibration):
        with pytest.raises(OptionError, match="fp32"):
            refused()


def test_a_weight_flipped_in_the_middle_is_another_checkpoint(copy, load, observations, tmp_path) -> None:
    weights = copy / "model.safetensors"
    before = identity(copy)
    policy = load(copy, num_steps=1)
    policy.calibrate(observations(1))
    file = policy.save_calibration(tmp_path / "file")
    policy.close()
    stat = weights.stat()
    with weights.open("r+b") as stream:
        stream.seek(stat.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    after = identity(copy)
    assert after.checkpoint != before.checkpoint
    assert after.key != before.key
    other = load(copy, num_steps=1)
    assert not other.calibrated
    with pytest.raises(CalibrationMismatchError) as caught:
        other.load_calibration(file)
    assert before.checkpoint in str(caught.value)
    assert after.checkpoint in str(caught.value)
    assert "flashrt calibrate" in str(caught.value)
    assert not other.calibrated


def test_everything_else_that_gives_another_key(tiny: Path, copy: Path) -> None:
    base = identity(tiny)
    assert identity(tiny).key == base.key
    assert identity(copy).key == base.key, "the same bytes elsewhere are the same checkpoint"
    keys = {
        "precision": identity(tiny, precision="nvfp4").key,
        "fewer views": identity(tiny, VIEWS[:1]).key,
        "other views": identity(tiny, VIEWS[::-1]).key,
        "rules": identity(tiny, rules={"resize": "bilinear_float"}).key,
        "delta actions": identity(tiny, delta_actions=[True] * 6 + [False]).key,
        "version": dataclasses.replace(base, version="9.9").key,
        "format": dataclasses.replace(base, format=2).key,
        "steps": dataclasses.replace(base, model={**base.model, "num_steps": 3}).key,
    }
    (stats,) = copy.rglob("norm_stats.json")
    content = json.loads(stats.read_text())
    content["norm_stats"]["state"]["q99"][0] += 1e-6
    stats.write_text(json.dumps(content))
    keys["normalisation"] = identity(copy).key
    assert base.key not in keys.values()
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize(
    ("field", "value"), [("version", "0.0.9"), ("precision", "nvfp4"), ("views", ("a",))]
)
def test_another_identity_is_refused(saved, field: str, value: object) -> None:
    policy, file = saved
    mine = policy._calibration.identity
    content = artifact.read(file, mine)
    artifact.write(file, content, dataclasses.replace(mine, **{field: value}))
    with pytest.raises(CalibrationMismatchError, match=f"{field} of the file is .*calibrate again"):
        policy.load_calibration()
    assert policy.calibrated


def test_a_later_format_is_refused(saved) -> None:
    policy, file = saved
    save_file(load_file(file), file, {artifact.MARK: "3"})
    with pytest.raises(CalibrationMismatchError, match=r"format 3, .* reads 1 and 2: calibrate again"):
        policy.load_calibration()


def test_any_damage_is_found(saved, load, observations) -> None:
    """Cut at any length or with any bit flipped, a file is refused and the scales in force stay."""
    policy, file = saved
    good, before = file.read_bytes(), policy._calibration.calibrator.scales()
    rng = np.random.default_rng(0)
    damaged = [good[:length] for length in (0, 7, 8, 100, len(good) // 2, len(good) - 1)] + [good + b"x"]
    damaged.append(good.replace(b'"flashrt_calibration":"1"', b'"flashrt_calibration":"2"'))
    assert damaged[-1] != good
    for position in (*rng.integers(0, len(good), 300), 0, 8, len(good) - 1):
        flipped = bytearray(good)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CalibrationError, match=r"calibrate"):
            policy.load_calibration()
    assert policy._calibration.calibrator.scales() == before
    with pytest.raises(CalibrationCorruptError, match="delete the file and calibrate again"):
        load(num_steps=1)
    assert load(num_steps=1, recalibrate=True).calibrated is False
    save_file({"x": np.zeros(3)}, file)
    with pytest.raises(CalibrationCorruptError, match="no calibration"):
        policy.load_calibration()
    os.truncate(file, 1 << 40)  # a checkpoint's weights in place of a calibration are not read
    with pytest.raises(CalibrationCorruptError, match="no calibration"):
        policy.load_calibration()
    file.write_bytes(good)
    policy.load_calibration()


def test_loading_takes_milliseconds(saved, tiny: Path) -> None:
    """A full-size pi0.5 has 216 such projections (27 x 4 + 18 x 4 + 18 x 2); the budget is 50 ms."""
    policy, file = saved
    mine = policy._calibration.identity
    content = artifact.read(file, mine)
    wide = dataclasses.replace(
        content,
        scales={f"layer{index}": 0.1 for index in range(216)},
        maxima=np.ones((256, 216), np.float32),
    )
    artifact.write(file.with_name("wide"), wide, mine)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        artifact.read(file.with_name("wide"), mine)
        policy._calibration.put(content)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_nothing_that_failed_is_left(saved, monkeypatch) -> None:
    policy, file = saved
    before = file.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        policy.save_calibration()
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


# the children write files and nothing else: they take no lock that a thread of pytest's process may hold
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def forked(work) -> int:
    """Process id of a child that does `work` and nothing of pytest's."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def writes(file: Path, name: str, times: int) -> int:
    """A process that writes the file over and over, each time with another source."""
    mine = CalibrationIdentity(**artifact.stored_identity(file))
    content = artifact.read(file)

    def work() -> None:
        for index in range(times):
            artifact.write(file, dataclasses.replace(content, source=f"{name} {index}"), mine)

    return forked(work)


@FORKS
def test_two_processes_at_once_end_with_one_valid_file(saved) -> None:
    policy, file = saved
    mine = policy._calibration.identity
    writers = [writes(file, name, 100) for name in ("one", "two")]
    sources = set()
    while writers:
        sources.add(artifact.read(file, mine).source)
        for writer in writers.copy():
            done, status = os.waitpid(writer, os.WNOHANG)
            if done:
                assert status == 0
                writers.remove(writer)
    assert artifact.read(file, mine).source.split()[-1] == "99"
    assert len(sources) > 2, "the file was never read while it was written"
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


@FORKS
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_while_it_writes(saved, kills: int) -> None:
    policy, file = saved
    mine = policy._calibration.identity
    rng = np.random.default_rng(kills)
    left = 0
    for round_ in range(kills):
        writer = writes(file, f"round {round_}", 10**6)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert len(artifact.read(file, mine).scales) == len(policy._calibration.calibrator.linears)
        left = len(list(file.parent.glob(".*.part")))
    assert left > 0, "no kill fell into a write"
    for entry in file.parent.glob(".*.part"):
        os.utime(entry, (0, 0))
    policy.save_calibration()
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


ZYGOTE = """
import os, sys
import numpy as np, torch
torch.set_num_threads(1)
import flashrt_runtime
from flashrt_runtime.checkpoints.presets import LIBERO
policy = flashrt_runtime.load_model(sys.argv[1], hardware="cpu", precision="fp8", num_steps=1)
state = np.array(LIBERO.state_stats["mean"], np.float32)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        rng = np.random.default_rng(int(line))
        images = [rng.integers(0, 256, (60, 80, 3), dtype=np.uint8) for _ in range(2)]
        observation = {"images": images, "prompt": "p", "state": state, "seed": 0}
        policy.calibrate([observation] * 3, source=line.strip())
        policy.save_calibration()
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_of_a_calibration(saved, tiny: Path) -> None:
    """Fifty calibrations, each killed at a random moment: the file is the old one or the new one, whole."""
    policy, file = saved
    mine = policy._calibration.identity
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", ZYGOTE, str(tiny)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, env=environment, **pipes) as zygote:

        def calibrate(number: int, kill_after: float | None) -> tuple[int, float]:
            """Exit status of one calibration, and how long it ran."""
            started = time.monotonic()
            zygote.stdin.write(f"{number}\n")
            zygote.stdin.flush()
            child = int(zygote.stdout.readline())
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            return int(zygote.stdout.readline()), time.monotonic() - started

        try:
            assert zygote.stdout.readline() == "ready\n"
            status, whole = calibrate(0, None)
            assert status == 0
            rng = np.random.default_rng(1)
            killed, source = 0, "0"
            for number in range(1, 51):
                status, _ = calibrate(number, rng.uniform(0, 1.1 * whole))
                killed += status == signal.SIGKILL
                content = artifact.read(file, mine)
                assert content.source in (source, str(number))
                assert status != 0 or content.source == str(number)
                source = content.source
            assert killed > 10
        finally:
            zygote.kill()
