"""The e4m3 weights in force in a policy: exchanged in place, kept in a file beside the calibration's."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..cache import cache_directory, content_digest, remove_abandoned
from ..errors import OptionError
from ..models import PrefixPolicy
from ..ops import E4M3
from .fp8 import Fp8Linear, fp8_linears
from .rounding import nearest

logger = logging.getLogger(__name__)

Rounding = Literal["nearest", "compensated"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
Originals = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
SUFFIX = ".weights.safetensors"
MARK = {"flashrt_weights": "1"}


def resolve_rounding(weights: str | None) -> Rounding | None:
    """Raises OptionError for another name; None is the weights in force."""
    for known in ROUNDINGS:
        if weights == known:
            return known
    if weights is not None:
        raise OptionError(f"unknown rounding of weights {weights!r}: expected {' or '.join(ROUNDINGS)}")
    return None


@dataclass(frozen=True)
class WeightsFile:
    """Weights that belong to a calibration: a file in the calibration's directory, and its content digest."""

    name: str
    digest: str

    def beside(self, calibration: Path) -> Path:
        """Where it is to be."""
        return calibration.with_name(self.name)


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
            self._put(before, *was)
            raise

    def _put(self, weights: Mapping[str, Tensor], rounding: Rounding, digest: str | None) -> None:
        for name, linear in self.linears.items():
            linear.overwrite(weights[name])
        self._model.weights_changed()
        self.rounding, self._digest = rounding, digest

    def write(self, calibration: Path) -> WeightsFile:
        """Keep the weights in force beside a calibration's file; named by their content, so that a file that
        is there is never changed, and not written again. Raises OSError.
        """
        if self._digest is not None and (there := _kept(calibration, self._digest)) is not None:
            return there
        folder = calibration.parent
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder, f".{calibration.stem}.*.part")
        temporary = folder / f".{calibration.stem}.{os.getpid()}.{secrets.token_hex(4)}.part"
        try:
            tensors = {name: linear.weight.detach().cpu() for name, linear in self.linears.items()}
            save_file({name: each.contiguous() for name, each in tensors.items()}, temporary, MARK)
            digest = content_digest([temporary])
            found = WeightsFile(_name(calibration, digest), digest)
            temporary.replace(found.beside(calibration))
            self._digest = digest
        except SafetensorError as error:
            raise OSError(f"{calibration}: its weights could not be written: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return found

    def read(self, file: WeightsFile, calibration: Path) -> dict[str, Tensor] | None:
        """What `write` kept, on the host; None, with a warning, where it is not there or not the same."""
        try:
            path = file.beside(calibration)
            digest = _digest_of(path)
            if digest != file.digest:
                raise ValueError(f"its digest is {digest}, expected {file.digest}")
            with safe_open(path, framework="pt", device="cpu") as stored:
                found = {name: stored.get_tensor(name) for name in self.linears}
            for name, linear in self.linears.items():
                if found[name].dtype != E4M3 or found[name].shape != linear.weight.shape:
                    raise ValueError(f"{name} is {tuple(found[name].shape)} {found[name].dtype}")
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning(
                "%s: its compensated weights are not usable, so weights rounded to nearest take their place, "
                "which follow the checkpoint less closely: %s. Put %s back beside it, or calibrate again "
                "with `flashrt calibrate --weights compensated`",
                calibration,
                error,
                file.name,
            )
            return None
        return found


def remove_replaced(calibration: Path, old: WeightsFile | None, new: WeightsFile | None) -> None:
    """Delete the weights of a calibration that another has replaced: gigabytes that nothing names now."""
    if old is None or old == new or Path(old.name).name != old.name:
        return
    if old.name == _name(calibration, old.digest):
        with contextlib.suppress(OSError):
            old.beside(calibration).unlink(missing_ok=True)


def _name(calibration: Path, digest: str) -> str:
    return f"{calibration.stem}.{digest[:16]}{SUFFIX}"


def _kept(calibration: Path, digest: str) -> WeightsFile | None:
    """The weights of this digest, where they lie beside a calibration already."""
    found = WeightsFile(_name(calibration, digest), digest)
    try:
        return found if _digest_of(found.beside(calibration)) == digest else None
    except OSError:
        return None


def _digest_of(path: Path) -> str:
    return content_digest([path], cache_directory() / "digests.json")
