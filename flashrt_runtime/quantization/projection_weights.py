"""The e4m3 weights in force in a policy: exchanged in place, kept in a file beside the calibration's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from ..errors import CalibrationError, OptionError
from ..models import PrefixPolicy
from . import weights_file
from .fp8 import Fp8Linear, fp8_linears, settle
from .rounding import nearest
from .weights_file import WeightsFile

Rounding = Literal["nearest", "compensated"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
Originals = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]


def resolve_rounding(weights: str | None) -> Rounding | None:
    """Raises OptionError for another name; None is the weights in force."""
    for known in ROUNDINGS:
        if weights == known:
            return known
    if weights is not None:
        raise OptionError(f"unknown rounding of weights {weights!r}: expected {' or '.join(ROUNDINGS)}")
    return None


class ProjectionWeights:
    """All quantised projections of a model. Scales of weights are the same however they are rounded.

    originals: the checkpoint's own weights of the projections named, one after the other, (out, in) float32.
    """

    def __init__(self, model: PrefixPolicy, originals: Originals) -> None:
        self.linears: dict[str, Fp8Linear] = fp8_linears(model)
        self.originals = originals
        self.rounding: Rounding = "nearest"
        self._digest: str | None = None  # of the file that has the weights in force, where one is known
        self._model = model
        self._mixed = ""

    def nearest(self) -> dict[str, Tensor]:
        """Every weight rounded to nearest, read from the checkpoint again: (out, in) e4m3 on the host."""
        return {
            name: nearest(weight, self.linears[name].weight_scale).cpu()
            for name, weight in self.originals(self.linears)
        }

    @contextmanager
    def changed(
        self, rounding: Rounding, weights: Mapping[str, Tensor] | None, file: WeightsFile | None = None
    ) -> Iterator[None]:
        """Put weights in force, by name, where the old ones lie, so that captured graphs read them; an
        exception in the block brings the old ones back. None: those in force stay. file: where they are kept.
        """
        if weights is None:
            yield
            return
        before = {name: linear.weight.to("cpu", copy=True) for name, linear in self.linears.items()}
        was = self.rounding, self._digest
        try:
            self._put(weights, rounding, None if file is None else file.digest)
            yield
        except BaseException:
            self._restore(before, *was)
            raise

    def _restore(self, weights: Mapping[str, Tensor], rounding: Rounding, digest: str | None) -> None:
        try:
            self._put(weights, rounding, digest)
        except BaseException as error:
            self._mixed = str(error) or type(error).__name__
            raise

    def check(self) -> None:
        """Raises CalibrationError where weights old and new are mixed, which nothing may run on."""
        if self._mixed:
            raise CalibrationError(
                "the weights in force are some of the old and some of the new ones, since the old ones could "
                f"not be put back ({self._mixed}): close this policy and load it again"
            )

    def _put(self, weights: Mapping[str, Tensor], rounding: Rounding, digest: str | None) -> None:
        for name, linear in self.linears.items():
            linear.overwrite(weights[name])
        self._model.weights_changed()
        settle(self.linears.values())
        self.rounding, self._digest = rounding, digest

    def write(self, calibration: Path) -> tuple[WeightsFile, bool]:
        """Keep the weights in force beside a calibration's file; named by their content, so that a file that
        is there is never changed, and not written again. Whether it is new. Raises OSError.
        """
        if self._digest is not None:
            kept = WeightsFile.of(calibration, self._digest)
            if kept.is_whole(calibration):
                return kept, False
        tensors = {name: linear.weight.detach().cpu() for name, linear in self.linears.items()}
        found, new = weights_file.write(calibration, tensors)
        self._digest = found.digest
        return found, new

    def read(self, file: WeightsFile, calibration: Path) -> dict[str, Tensor]:
        """What `write` kept, on the host. Raises as `WeightsFile.read`."""
        return file.read(calibration, {name: linear.weight.shape for name, linear in self.linears.items()})
