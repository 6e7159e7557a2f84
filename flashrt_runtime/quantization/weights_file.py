"""Weights that belong to a calibration, in a file beside the calibration's: named by their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..cache import content_digest
from ..errors import CalibrationCorruptError, CalibrationError, CalibrationNotFoundError
from ..ops import E4M3
from . import tensor_files

SUFFIX = ".weights.safetensors"
MARK = {"flashrt_weights": "1"}


@dataclass(frozen=True)
class WeightsFile:
    """A file in the calibration's directory, and its content digest."""

    name: str
    digest: str

    @classmethod
    def checked(cls, stored: object) -> WeightsFile | None:
        """Of a calibration's JSON; None for None. Raises ValueError for what names no file beside it."""
        if stored is None:
            return None
        match stored:
            case {"name": str(name), "digest": str(digest), **more} if not more:
                if digest and name.endswith(SUFFIX) and Path(name).name == name and "\0" not in name:
                    return cls(name, digest)
        raise ValueError(f"names no file of weights: {stored!r}")

    @classmethod
    def of(cls, calibration: Path, digest: str) -> WeightsFile:
        """What `write` calls the weights of this digest."""
        return cls(tensor_files.named(calibration.stem, digest, SUFFIX), digest)

    def beside(self, calibration: Path) -> Path:
        """Where it is to be."""
        return calibration.with_name(self.name)

    def check(self, calibration: Path) -> Path:
        """Where it is, every byte read: no digest is remembered, for the bytes may change where the time of
        modification does not. Raises CalibrationNotFoundError, CalibrationError (not readable) or
        CalibrationCorruptError.
        """
        path = self.beside(calibration)
        try:
            digest = content_digest([path])
        except FileNotFoundError as error:
            raise CalibrationNotFoundError(
                f"{calibration}: its compensated weights are not there: put {path} back, or {_again()}"
            ) from error
        except OSError as error:
            raise CalibrationError(
                f"{calibration}: its compensated weights cannot be read: {error}: make {path} readable, or "
                f"{_again()}"
            ) from error
        if digest != self.digest:
            raise CalibrationCorruptError(
                f"{calibration}: its compensated weights are damaged: the digest of {path} is {digest}, "
                f"expected {self.digest}: put the right file there, or {_again()}"
            )
        return path

    def is_whole(self, calibration: Path) -> bool:
        """Whether it is there, readable and what its name says."""
        try:
            self.check(calibration)
        except CalibrationError:
            return False
        return True

    def read(self, calibration: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Its weights, e4m3 of these shapes, on the host. Raises as `check` does."""
        path = self.check(calibration)
        try:
            with safe_open(path, framework="pt", device="cpu") as stored:
                found = {name: stored.get_tensor(name) for name in shapes}
            for name, shape in shapes.items():
                if found[name].dtype != E4M3 or found[name].shape != shape:
                    raise ValueError(f"{name} is {tuple(found[name].shape)} {found[name].dtype}")
        except (OSError, ValueError, SafetensorError) as error:
            raise CalibrationCorruptError(
                f"{calibration}: its compensated weights do not fit this policy: {path}: {error}: {_again()}"
            ) from error
        return found


def write(calibration: Path, tensors: Mapping[str, Tensor]) -> tuple[WeightsFile, bool]:
    """Keep weights beside a calibration's file, see `tensor_files.write`; whether they were not there before.
    Raises OSError.
    """
    path, digest, new = tensor_files.write(calibration.parent, calibration.stem, SUFFIX, tensors, MARK)
    return WeightsFile(path.name, digest), new


def _again() -> str:
    return "calibrate again with `flashrt calibrate --weights compensated`"
