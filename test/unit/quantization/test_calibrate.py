"""`Policy.calibrate`: streamed, cancellable, all or nothing, and measured on held-out observations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch

from flashrt_runtime.engine.fused_expert import FusedExpert
from flashrt_runtime.errors import (
    ActionTokenError,
    CalibrationCancelledError,
    CalibrationError,
    ClosedError,
    ObservationError,
    OptionError,
)
from flashrt_runtime.quantization import calibration
from flashrt_runtime.quantization.calibration import action_error
from flashrt_runtime.quantization.fp8 import fp8_linears


def scales_of(policy):
    return policy._calibration.calibrator.scales()


def test_report(load, observations) -> None:
    policy = load()
    assert not policy.calibrated
    seen: list[int] = []
    report = policy.calibrate(observations(5), source="test", progress=seen.append)
    assert policy.calibrated
    assert seen == [1, 2, 3, 4, 5]
    assert (report.samples, report.estimator, report.percentile, report.source) == (5, "mse", None, "test")
    assert report.scales == scales_of(policy)
    assert report.maxima.shape == (5, len(report.scales))
    assert report.held_out_error is None
    largest = dict(zip(report.scales, report.maxima.max(0) / 448, strict=True))
    reached = [name for name, value in largest.items() if value]
    assert all(0 < report.scales[name] <= largest[name] * (1 + 1e-6) for name in reached)
    again = policy.calibrate(observations(5), percentile=100)
    assert again.scales == pytest.approx({name: value or 1.0 for name, value in largest.items()})


@pytest.mark.parametrize(("samples", "chosen"), [(3, ("max", 100.0)), (4, ("mse", None))])
def test_the_default_clips_nothing_of_a_few_samples(load, observations, samples: int, chosen: tuple) -> None:
    policy = load(num_steps=1)
    report = policy.calibrate(observations(samples))
    assert (report.estimator, report.percentile) == chosen
    named = policy.calibrate(observations(samples), estimator="mse")
    assert named.estimator == "mse"
    assert (named.scales == report.scales) == (chosen[0] == "mse")


def test_the_first_observation_gives_its_maxima(load, observations) -> None:
    """What is put in force unasked clips nothing that was seen."""
    policy, other = load(), load()
    (observation,) = observations(1)
    policy.predict(**observation)
    assert scales_of(policy) == other.calibrate([observation], percentile=100).scales


def test_an_interrupted_first_observation_leaves_no_scales(load, observations) -> None:
    """Not some of them, by which the next would run as if calibrated."""
    policy = load()
    (observation,) = observations(1)
    with (
        patch.object(calibration, "settle", side_effect=[KeyboardInterrupt, None]),
        pytest.raises(KeyboardInterrupt),
    ):
        policy.predict(**observation)
    assert not policy.calibrated
    policy.predict(**observation)
    assert policy.calibrated


def test_the_stream_is_taken_one_by_one(load, observations) -> None:
    """No more than asked for is taken, and the policy answers while the source thinks."""
    policy = load()
    alone = policy.calibrate(observations(3)).scales
    taken = 0
    first = next(observations(1, 77))

    def source() -> Iterator[dict[str, object]]:
        nonlocal taken
        for observation in observations(1000):
            taken += 1
            policy.predict(**first)
            yield observation

    assert policy.calibrate(source(), max_samples=3).scales == alone
    assert taken == 3


@pytest.mark.parametrize(
    ("max_samples", "given", "held_out", "samples", "measured"),
    [
        (None, 11, 2, 9, 2),
        (None, 11, 9, 9, 2),
        (None, 4, 2, 4, 0),
        (4, 20, 2, 4, 2),
        (8, 10, 2, 8, 2),
        (4, 3, 2, 2, 1),
    ],
)
def test_held_out(load, observations, max_samples, given, held_out, samples, measured) -> None:
    report = load(num_steps=1).calibrate(observations(given), max_samples=max_samples, held_out=held_out)
    assert report.samples == samples
    assert (0 if report.held_out_error is None else len(report.held_out_error.per_sample)) == measured


@pytest.mark.parametrize(
    ("max_samples", "given", "held_out", "samples", "positions"),
    [
        (64, 6, 8, 5, [4]),
        (64, 17, 8, 14, [4, 9, 14]),
        (16, 18, 4, 15, [4, 9, 14]),
        (2, 6, 8, 2, [2, 3, 4, 5]),
        (64, 4, 8, 4, []),
        (64, 6, 0, 6, []),
    ],
)
def test_a_list_that_is_shorter_than_asked_for(
    load, observations, max_samples, given, held_out, samples, positions
) -> None:
    every = list(observations(given))
    report = load(num_steps=1).calibrate(every, max_samples=max_samples, held_out=held_out)
    assert (report.samples, list(report.held_out)) == (samples, positions)
    assert (report.held_out_error is None) == (not positions)
    assert report.warnings[0] == (
        f"{given} observations of the {max_samples} + {held_out} that were asked for: {samples} calibrated "
        f"on, {len(positions)} held out"
    )


def test_held_out_error_is_that_of_fp8_actions(load, observations) -> None:
    policy = load()
    every = list(observations(5))
    report = policy.calibrate(iter(every), held_out=1)
    assert report.held_out == (4,)
    held_out = every[4]
    calibrated = policy.calibrate(iter(every[:4]))
    assert report.scales == calibrated.scales, "a held-out observation was calibrated on"
    inputs = policy._encode(**held_out)
    width = policy.spec.action_dim
    fp8 = policy._run(policy._model, inputs)[:, :width]
    with policy._calibration.calibrator.unquantised():
        reference = policy._eager(policy._model, inputs).float().numpy()[:, :width]
    want = action_error(fp8, reference)
    error = report.held_out_error
    assert (error.max_abs, error.relative_rms, error.cosine) == want
    assert 0 < error.max_abs < 0.5
    assert 0.9 < error.cosine < 1


def test_held_out_images_may_be_reused_by_the_source(load, observations) -> None:
    policy = load(num_steps=1)
    want = policy.calibrate(observations(10), held_out=2).held_out_error

    def one_buffer() -> Iterator[dict[str, object]]:
        buffers = [np.zeros((60, 80, 3), np.uint8) for _ in range(2)]
        for observation in observations(10):
            for buffer, image in zip(buffers, observation["images"], strict=True):
                buffer[:] = image
            yield observation | {"images": buffers}

    assert policy.calibrate(one_buffer(), held_out=2).held_out_error == want


@pytest.mark.parametrize(("stop_at", "before"), [(0, True), (3, False), (11, True), (12, True), (12, False)])
def test_cancelled_leaves_what_was_in_force(load, observations, stop_at: int, before: bool) -> None:
    """Before the first sample, between two, and while the error is measured."""
    policy = load(num_steps=1)
    if before:
        policy.calibrate(observations(1, 50))
    state = scales_of(policy), policy.calibrated
    calls = iter(range(100))
    # asked before the first of 10 observations, with each, after the last, before each of 2 held out
    with pytest.raises(CalibrationCancelledError, match="stay"):
        policy.calibrate(observations(10), held_out=2, should_stop=lambda: next(calls) == stop_at)
    assert (scales_of(policy), policy.calibrated) == state
    policy.calibrate(observations(10), held_out=2, should_stop=lambda: False)
    assert scales_of(policy) != state[0]


def test_a_failure_leaves_what_was_in_force(load, observations) -> None:
    policy = load(num_steps=1)
    policy.calibrate(observations(1, 50))
    state = scales_of(policy)

    def broken_source() -> Iterator[dict[str, object]]:
        yield from observations(2)
        raise RuntimeError("the bag is truncated")

    with pytest.raises(RuntimeError, match="truncated"):
        policy.calibrate(broken_source())
    with pytest.raises(ObservationError, match="expected 2 images"):
        policy.calibrate([next(observations(1)) | {"images": []}])
    with pytest.raises(ObservationError, match="expected images"):
        policy.calibrate([{"pixels": []}])
    with (
        patch.object(policy, "_run", return_value=np.full((50, 32), np.nan, np.float32)),
        pytest.raises(CalibrationError, match="non-finite"),
    ):
        policy.calibrate(observations(5), held_out=1)
    with pytest.raises(OptionError, match="no observations"):
        policy.calibrate([])
    assert scales_of(policy) == state
    assert policy.calibrated
    assert not any(linear.observing for linear in fp8_linears(policy._model).values())


def test_tokens_that_are_no_chunk_are_not_compared(load, observations) -> None:
    """pi0fast may give none, an untrained one mostly does; the error comes from the samples that do."""
    policy = load(num_steps=1)
    decoded, real = 0, policy._decoded

    def sometimes(output: np.ndarray) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        if decoded == 1:
            raise ActionTokenError("no chunk", [1, 2])
        return real(output)

    with patch.object(policy, "_decoded", sometimes):
        report = policy.calibrate(observations(10), held_out=2)
    assert len(report.held_out_error.per_sample) == 1
    (warning,) = (text for text in report.warnings if "held-out" in text)
    assert "held-out sample 0 was not compared: no chunk" in warning
    assert policy.calibrated


def test_non_finite_activations(load, observations) -> None:
    """A checkpoint with a broken weight: the calibration says in which projection it shows."""
    policy = load(num_steps=1)
    policy._model.get_submodule("expert.layers.0.out").weight_scale.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"sample 0 has non-finite activations in .* first expert"):
        policy.calibrate(observations(1))
    assert not policy.calibrated


def test_options_are_checked(load, observations) -> None:
    policy = load(num_steps=1)
    for options in (
        {"max_samples": 0},
        {"held_out": -1},
        {"estimator": "entropy"},
        {"estimator": "mse", "percentile": 99.0},
        {"percentile": 0},
    ):
        with pytest.raises(OptionError):
            policy.calibrate(observations(1), **options)
    policy.close()
    with pytest.raises(ClosedError):
        policy.calibrate(observations(1))


def test_buffers_of_a_captured_graph_stay(load, observations, tmp_path) -> None:
    """New scales are written where a graph reads them: by calibrate, load_calibration and a failed one."""
    policy = load(num_steps=1)
    linears = policy._calibration.calibrator.linears
    where = {name: linear.activation_scale.data_ptr() for name, linear in linears.items()}
    tensors = {name: linear.activation_scale for name, linear in linears.items()}
    policy.calibrate(observations(2))
    first = scales_of(policy)
    policy.save_calibration(tmp_path / "first.safetensors")
    policy.calibrate(observations(2, 10), percentile=99)
    assert scales_of(policy) != first
    policy.load_calibration(tmp_path / "first.safetensors")
    assert scales_of(policy) == first
    assert {name: linear.activation_scale.data_ptr() for name, linear in linears.items()} == where
    assert all(linear.activation_scale is tensors[name] for name, linear in linears.items())


def test_the_fused_expert_reads_the_same_scales(load, observations, tmp_path) -> None:
    """The kernel's table of input scales (its other parts need a GPU) is what a calibration writes."""
    policy = load(num_steps=1)
    layers = policy._model.expert.layers
    fused = FusedExpert.__new__(FusedExpert)
    fused.linears = {name: [getattr(layer, name) for layer in layers] for name in ("out", "down")}
    table = fused._share_input_scales(len(layers), torch.device("cpu"))
    for _ in range(2):
        scales = policy.calibrate(observations(2)).scales
        for index in range(len(layers)):
            got = table[index].tolist()
            assert got == [scales[f"expert.layers.{index}.{name}"] for name in ("out", "down")]
        policy.save_calibration(tmp_path / "file")
        policy.calibrate(observations(2, 9))
        policy.load_calibration(tmp_path / "file")
        assert table[0, 0] == np.float32(scales["expert.layers.0.out"])


def test_warnings_reach_the_log(load, observations, caplog) -> None:
    policy = load(num_steps=1)
    down = policy._model.get_submodule("expert.layers.1.down")
    sample = 0

    def progress(done: int) -> None:
        nonlocal sample
        sample = done

    # the norms in front of the projections keep strange images from making strange activations
    down.register_forward_pre_hook(lambda _, args: (args[0] * (50 if sample == 3 else 1),))
    with caplog.at_level(logging.INFO):
        report = policy.calibrate(observations(8), verbose=True, progress=progress)
    logged = [record.message for record in caplog.records]
    (warning,) = report.warnings
    assert "sample 3 is an outlier in 1 of" in warning
    assert "expert.layers.1.down" in warning
    assert f"calibration: {warning}" in logged
    name, scale = next(iter(report.scales.items()))
    assert f"{name}: activation scale {scale:.6g}" in logged
