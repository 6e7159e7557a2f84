"""Weights rounded for what a robot's observations show: the part of a calibration that is about weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import device_loss
from ..errors import CalibrationError, DeviceLostError
from ..inputs import ModelInputs
from ..progress import report
from .calibration import RoundingGain
from .fp8 import Fp8Linear
from .projection_weights import ProjectionWeights
from .rounding import (
    Rounder,
    SecondMoments,
    moments_memory,
    nearest,
    output_error,
    rounding_memory,
    within_memory,
)
from .runner import Runner
from .statistics import observing

logger = logging.getLogger(__name__)

MOST_KEPT = 64
FEWEST_RUNS = 32  # of the expert, whose few rows a sample would not show what noise makes of them
MOST_MOMENTS = 24 << 30
MOMENTS_SHARE = 0.4  # of the memory that is free


@dataclass
class KeptSamples:
    """Observations to round by, at most 64 and spread evenly over the stream, however long it is."""

    inputs: dict[int, ModelInputs] = field(default_factory=dict)
    every: int = 1

    def add(self, sample: int, inputs: ModelInputs) -> None:
        """sample: its number among those calibrated on. The images are copied."""
        if sample % self.every:
            return
        self.inputs[sample] = replace(inputs, views=[view.copy() for view in inputs.views])
        if len(self.inputs) > MOST_KEPT:
            self.every *= 2
            self.inputs = {each: kept for each, kept in self.inputs.items() if each % self.every == 0}


@dataclass(frozen=True)
class Compensation:
    """Rounded weights of every projection, (out, in) e4m3 on the host, and what the rounding is worth: the
    error behind each projection relative to its output, rms over the observations, (nearest, compensated).
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_nearest: list[str] = field(default_factory=list)

    def gain(self) -> RoundingGain:
        """For the report."""
        before, after = (median(error[i] for error in self.errors.values()) for i in (0, 1))
        return RoundingGain(before, after, len(self.weights), len(self.left_nearest))


def check_memory(weights: ProjectionWeights) -> None:
    """Raises CalibrationError where the GPU has too little memory left for the largest weight."""
    needed = max(_rounding(each) + moments_memory(each) for each in weights.linears.values())
    free = _free(weights)
    if free is not None and needed > free:
        raise CalibrationError(
            f"compensated weights need {needed / 1e9:.1f} GB of free GPU memory, and {free / 1e9:.1f} GB are "
            "free: stop what else uses the GPU, or calibrate with weights rounded to nearest"
        )


def compensate(
    runner: Runner,
    weights: ProjectionWeights,
    samples: KeptSamples,
    outliers: Mapping[str, NDArray[np.bool_]],
    check: Callable[[], None],
) -> Compensation:
    """Round all weights for the inputs that the projections have in these samples.

    The model is held for one sample at a time and stays as it is: a robot goes on meanwhile. outliers: by
    projection, (samples,), which samples not to count. check: called in between, raises to stop. Raises
    CalibrationError (inputs that are not finite) and what the model raises.
    """
    found, rounder = Compensation(), Rounder()
    total = len(weights.linears)
    logger.info("rounding %d weights by %d samples", total, len(samples.inputs))
    for group in within_memory(weights.linears, _moments_limit(weights)):
        with _given_back(rounder, moments := SecondMoments(group)):
            for sample, inputs in samples.inputs.items():
                seen = {name for name in group if not (name in outliers and outliers[name][sample])}
                for each in _with_noises(runner, sample, inputs, len(samples.inputs)):
                    check()
                    shown = partial(_shown, weights, moments, seen)
                    with runner.exclusive(), observing(weights.linears, shown):
                        runner.eager(each)
            for name, weight in _originals(runner, weights, group):
                check()
                report(len(found.weights), total)
                _round(found, rounder, name, weight, group[name], moments.take(name))
    report(total, total)
    logger.info("weights rounded: %s", found.gain())
    return found


@contextmanager
def _given_back(rounder: Rounder, moments: SecondMoments) -> Iterator[None]:
    """Their memory, whatever ends the block: a process that goes on to serve has no use for it. That of a
    lost GPU is left alone.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, DeviceLostError) or device_loss.loss_of(error) is not None:
            device_loss.leave(rounder, moments)
        else:
            _give_back(rounder, moments)
        raise
    _give_back(rounder, moments)


def _originals(
    runner: Runner, weights: ProjectionWeights, names: Mapping[str, Fp8Linear]
) -> Iterator[tuple[str, Tensor]]:
    """Read while the policy is held, so that nobody closes its checkpoint meanwhile."""
    each = iter(weights.originals(names))
    while True:
        with runner.exclusive():
            found = next(each, None)
        if found is None:
            return
        yield found


@torch.inference_mode()
def _round(
    found: Compensation, rounder: Rounder, name: str, weight: Tensor, linear: Fp8Linear, moments: Tensor
) -> None:
    scale = linear.weight_scale
    rounded, plain = rounder(weight, scale, moments, name), nearest(weight, scale)
    if bool(moments.any()):
        errors = (output_error(weight, each, scale, moments) for each in (plain, rounded))
        found.errors[name] = next(errors), next(errors)
    if torch.equal(rounded.view(torch.uint8), plain.view(torch.uint8)):
        found.left_nearest.append(name)
    found.weights[name] = rounded.cpu()


def _shown(
    weights: ProjectionWeights, moments: SecondMoments, seen: set[str], index: int
) -> Callable[[Tensor], None] | None:
    name = list(weights.linears)[index]
    return partial(moments.add, name) if name in seen else None


def _with_noises(runner: Runner, sample: int, inputs: ModelInputs, samples: int) -> list[ModelInputs]:
    """A sample with its own noise, and where there are few samples with others: the same ones every time."""
    if runner.draw_noise is None:
        return [inputs]
    generator = torch.Generator().manual_seed(sample)
    more = -(-FEWEST_RUNS // samples) - 1
    return [inputs, *(replace(inputs, noise=runner.draw_noise(generator)) for _ in range(more))]


def _rounding(linear: Fp8Linear) -> int:
    return rounding_memory(linear.out_features, linear.in_features)


def _moments_limit(weights: ProjectionWeights) -> int:
    """Bytes of moments to hold at once, beside what rounding takes; see `check_memory`."""
    free = _free(weights)
    if free is None:
        return MOST_MOMENTS // 4
    scratch = max(map(_rounding, weights.linears.values()))
    return max(0, min(MOST_MOMENTS, int(free * MOMENTS_SHARE), free - scratch))


def _free(weights: ProjectionWeights) -> int | None:
    """Bytes of GPU memory that are free, or held by torch and unused; None on the host."""
    device = next(iter(weights.linears.values())).weight.device
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _give_back(rounder: Rounder, moments: SecondMoments) -> None:
    rounder.clear()
    moments.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
