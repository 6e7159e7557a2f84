"""Compensated weights in a policy: closer to the unquantised one, all or nothing, kept with a calibration."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.errors import (
    CalibrationCancelledError,
    CalibrationError,
    ClosedError,
    DeviceLostError,
    OptionError,
)
from flashrt_runtime.quantization import compensation, in_force
from flashrt_runtime.quantization.compensation import MOST_KEPT, KeptSamples
from flashrt_runtime.quantization.fp8 import fp8_linears
from flashrt_runtime.untrained.random import make_checkpoint


def weights_of(policy: Policy) -> dict[str, bytes]:
    linears = fp8_linears(policy._model)
    return {name: linear.weight.view(torch.uint8).numpy().tobytes() for name, linear in linears.items()}


def where(policy: Policy) -> dict[str, int]:
    return {name: linear.weight.data_ptr() for name, linear in fp8_linears(policy._model).items()}


def scales_of(policy: Policy) -> dict[str, float]:
    return policy._calibration.calibrator.scales()


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensation, "FEWEST_RUNS", 4)


def test_actions_come_closer_to_the_unquantised_policy(load, observations, monkeypatch) -> None:
    """On observations that were not calibrated on, with the weights alone: half the error and less."""
    monkeypatch.setattr(compensation, "FEWEST_RUNS", 32)
    exact, policy = load(precision="fp32"), load()
    unseen = list(observations(4, first_seed=100))
    want = [exact.predict(**each) for each in unseen]
    nearest, places = weights_of(policy), where(policy)

    def error() -> float:
        with policy._calibration.calibrator.unquantised():
            got = [policy._decoded(policy._eager(policy._model, policy._encode(**each))) for each in unseen]
        physical = [
            policy._actions.to_physical(one.numpy(), np.asarray(each["state"], np.float32))
            for one, each in zip(got, unseen, strict=True)
        ]
        return float(np.linalg.norm(np.subtract(physical, want)) / np.linalg.norm(want))

    report = policy.calibrate(observations(8))
    assert (report.rounding, policy.rounding) == ("nearest", "nearest")
    before, scales = error(), report.scales
    report = policy.calibrate(observations(8), weights="compensated")
    assert (report.rounding, policy.rounding) == ("compensated", "compensated")
    assert error() < before / 2
    assert report.scales == scales, "the scales are those of the same calibration without"
    assert weights_of(policy) != nearest
    assert where(policy) == places, "a captured graph would read the old weights"
    report = policy.calibrate(observations(8), weights="nearest")
    assert (report.rounding, weights_of(policy)) == ("nearest", nearest)


def test_the_same_twice(compensated) -> None:
    assert weights_of(compensated()) == weights_of(compensated())


def test_saved_and_loaded_they_are_the_same_bytes(compensated, load, observations, tmp_path, caplog) -> None:
    policy = compensated()
    file = policy.save_calibration()
    (kept,) = file.parent.glob("*.weights.safetensors")
    (observation,) = observations(1, 99)
    with caplog.at_level(logging.WARNING):
        found = load(num_steps=1)
    assert found.rounding == "compensated"
    assert weights_of(found) == weights_of(policy)
    assert scales_of(found) == scales_of(policy)
    assert not caplog.records
    assert np.isfinite(found.predict(**observation)).all()
    assert load(num_steps=1, calibration="none").rounding == "nearest"
    # the scales alone anew: the weights stay, and are saved with them
    again = found.calibrate(observations(4, 50))
    assert again.rounding == "compensated"
    assert weights_of(found) == weights_of(policy)
    copy = found.save_calibration(tmp_path / "copy.safetensors")
    (copied,) = copy.parent.glob("copy.*.weights.safetensors")
    assert copied.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("config", ["pi0", "pi0fast"])
def test_the_other_policies(load, observations, tmp_path, config: str) -> None:
    checkpoint = make_checkpoint(tmp_path / config, size="tiny", preset="libero", policy=config)
    policy = load(checkpoint, config=config, num_steps=1)
    nearest = weights_of(policy)
    policy.calibrate(observations(4), weights="compensated")
    changed = [name for name, content in weights_of(policy).items() if content != nearest[name]]
    assert len(changed) > len(nearest) * 0.8
    policy.save_calibration()
    assert weights_of(load(checkpoint, config=config, num_steps=1)) == weights_of(policy)


def test_closed_meanwhile(load, observations, monkeypatch) -> None:
    policy = load(num_steps=1)
    real = compensation._round

    def closes(*arguments: object) -> None:
        policy.close()
        real(*arguments)

    monkeypatch.setattr(compensation, "_round", closes)
    with pytest.raises(ClosedError):
        policy.calibrate(observations(4), weights="compensated")


def test_another_calibration_brings_its_own_weights(compensated, load, observations, tmp_path) -> None:
    policy = compensated()
    rounded, with_them = weights_of(policy), policy.save_calibration(tmp_path / "with.safetensors")
    plain = load(num_steps=1, calibration="none")
    nearest = weights_of(plain)
    plain.calibrate(observations(2))
    without = plain.save_calibration(tmp_path / "without.safetensors")
    for file, want in ((without, nearest), (with_them, rounded), (without, nearest)):
        policy.load_calibration(file)
        assert weights_of(policy) == want
    policy.load_calibration(with_them)
    policy.recalibrate()
    assert (policy.calibrated, policy.rounding, weights_of(policy)) == (False, "nearest", nearest)
    policy.predict(**next(observations(1)))
    assert weights_of(policy) == nearest


@pytest.fixture(scope="module")
def questions() -> dict[str, int]:
    return {}


@pytest.mark.parametrize(
    ("before", "stop_at"),
    [*(("nearest", at) for at in (0, 12, 30, -1)), *(("compensated", at) for at in (5, -3))],
)
def test_cancelled_leaves_what_was_in_force(
    compensated, load, observations, questions, before, stop_at
) -> None:
    """While observations come, moments are collected, weights are rounded (30, -3), the error is measured."""
    asked = 0

    def calibrate(policy: Policy, should_stop: Callable[[], bool]) -> None:
        policy.calibrate(observations(6, 20), weights="compensated", held_out=1, should_stop=should_stop)

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > stop_at >= 0

    policy = compensated() if before == "compensated" else load(num_steps=1)
    state = weights_of(policy), scales_of(policy), policy.calibrated, policy.rounding
    if stop_at < 0:  # counted from the end
        if not questions:
            calibrate(load(num_steps=1), stop)
            questions["all"] = asked
        stop_at, asked = questions["all"] + stop_at, 0
    with pytest.raises(CalibrationCancelledError):
        calibrate(policy, stop)
    assert asked == stop_at + 1
    assert (weights_of(policy), scales_of(policy), policy.calibrated, policy.rounding) == state
    assert policy.rounding == before


def test_a_failure_while_they_are_put_in_force(compensated, load, observations, monkeypatch) -> None:
    policy = load(num_steps=1)
    nearest = weights_of(policy)
    real, calls = type(policy._model).weights_changed, 0

    def fails_once(model) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("out of memory")
        real(model)

    monkeypatch.setattr(type(policy._model), "weights_changed", fails_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.calibrate(observations(4), weights="compensated")
    assert calls == 2, "what was packed from the new weights was not packed again"
    assert (weights_of(policy), policy.calibrated, policy.rounding) == (nearest, False, "nearest")


def test_weights_that_cannot_be_put_back_end_the_policy(compensated, observations, monkeypatch) -> None:
    """Mixed weights answer nothing, as after the loss of a GPU."""
    policy = compensated()

    def fails(_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(type(policy._model), "weights_changed", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            policy.calibrate(observations(4), weights="nearest")
    (observation,) = observations(1)
    for call in (
        lambda: policy.predict(**observation),
        lambda: policy.calibrate(observations(1)),
        policy.recalibrate,
        policy.save_calibration,
    ):
        with pytest.raises(CalibrationError, match=r"out of memory.*load it again"):
            call()
    policy.close()


def test_what_is_in_force_is_asked_for_while_the_policy_is_held(
    compensated, observations, monkeypatch
) -> None:
    """Another thread drops the calibration between the last observation and the new scales."""
    policy = compensated()
    real, entered = policy._exclusive, 0

    def others_first():
        nonlocal entered
        entered += 1
        if entered == 3:  # two observations were before
            with real():
                policy._calibration.drop()
        return real()

    monkeypatch.setattr(policy, "_exclusive", others_first)
    held = []
    of = in_force.Calibration.of
    monkeypatch.setattr(
        in_force.Calibration, "of", lambda report: held.append(policy._lock.locked()) or of(report)
    )
    report = policy.calibrate(observations(2))
    assert (report.rounding, policy.rounding, policy._calibration._current.rounding) == ("nearest",) * 3
    assert held == [True]


def test_too_little_memory_is_refused_before_anything_is_done(load, observations, monkeypatch) -> None:
    policy = load(num_steps=1)
    monkeypatch.setattr(compensation, "_free", lambda _: 100_000)
    stream = observations(4)
    with pytest.raises(CalibrationError, match=r"compensated weights need \d+\.\d GB .*, and 0\.0 GB are"):
        policy.calibrate(stream, weights="compensated")
    assert len(list(stream)) == 4
    policy.calibrate(observations(1))


def test_moments_leave_room_for_rounding(load, monkeypatch) -> None:
    """Of little memory: the largest matrix, and what rounding its weight takes, fit in what is free."""
    weights = load(num_steps=1)._calibration.weights
    scratch = max(compensation._rounding(each) for each in weights.linears.values())
    for free in (scratch, scratch * 1.2, scratch * 10):
        monkeypatch.setattr(compensation, "_free", lambda _, free=int(free): free)
        assert compensation._moments_limit(weights) + scratch <= max(free, scratch)


@pytest.mark.parametrize(
    ("error", "given_back"), [(RuntimeError("out of memory"), 1), (DeviceLostError("gone"), 0)]
)
def test_memory_is_given_back_whatever_happens(
    load, observations, monkeypatch, error: Exception, given_back: int
) -> None:
    """A mock in place of CUDA's allocator; that of a lost GPU is left alone."""
    calls, left = [], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    monkeypatch.setattr(compensation.device_loss, "leave", lambda *owners: left.extend(owners))

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(compensation, "_round", fails)
    with pytest.raises(type(error)):
        load(num_steps=1).calibrate(observations(2), weights="compensated")
    assert len(calls) == given_back
    assert bool(left) != bool(given_back)


def test_the_report_says_what_it_is_worth(compensated, load, observations) -> None:
    policy = compensated()
    gain = policy.calibrate(observations(4), weights="compensated").gain
    assert gain.error_compensated < gain.error_nearest / 2
    nearest = weights_of(load(num_steps=1, calibration="none"))
    same = [name for name, content in weights_of(policy).items() if content == nearest[name]]
    assert (gain.projections, gain.left_nearest) == (len(nearest), len(same))
    assert policy.calibrate(observations(4)).gain is None


def test_outliers_do_not_count(load, observations, monkeypatch) -> None:
    """The sample that the scales leave out is left out of the moments too, in that projection alone."""
    policy = load(num_steps=1)
    down = policy._model.get_submodule("expert.layers.1.down")
    seen: dict[str, list[int]] = {}
    real = compensation.SecondMoments.add

    def counted(self, name: str, x: torch.Tensor) -> None:
        seen.setdefault(name, []).append(x.shape[0])
        real(self, name, x)

    monkeypatch.setattr(compensation.SecondMoments, "add", counted)
    sample = 0

    def progress(done: int) -> None:
        nonlocal sample
        sample = done

    down.register_forward_pre_hook(lambda _, args: (args[0] * (50 if sample == 3 else 1),))
    policy.calibrate(observations(8), weights="compensated", progress=progress)
    runs = len(seen["expert.layers.1.out"])
    assert len(seen["expert.layers.1.down"]) == runs * 7 // 8


def test_kept_samples_are_spread_over_the_stream(observations) -> None:
    kept = KeptSamples()
    inputs = flashrt_runtime.inputs.ModelInputs([], np.zeros(1, np.int64), None, torch.zeros(1))
    for sample in range(1000):
        kept.add(sample, inputs)
        assert len(kept.inputs) <= MOST_KEPT
    gaps = np.diff(list(kept.inputs))
    assert len(kept.inputs) > MOST_KEPT // 2 - 1
    assert set(gaps) == {kept.every}
    assert next(iter(kept.inputs)) == 0


def test_unknown_rounding(load, observations) -> None:
    with pytest.raises(OptionError, match="expected nearest or compensated"):
        load(num_steps=1).calibrate(observations(1), weights="best")
    with pytest.raises(OptionError, match="no activation scales"):
        load(precision="bf16").calibrate(observations(1), weights="compensated")
