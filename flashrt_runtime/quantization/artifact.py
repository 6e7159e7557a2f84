"""A calibration on disk: one safetensors file that belongs to one checkpoint and says so."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .. import __version__
from ..cache import cache_directory, content_digest, obstacle_to, write_atomically
from ..checkpoints.base import Checkpoint
from ..errors import (
    CalibrationCorruptError,
    CalibrationError,
    CalibrationMismatchError,
    CalibrationNotFoundError,
)
from .calibration import CalibrationReport, HeldOutError
from .projection_weights import ROUNDINGS, Rounding
from .weights_file import SUFFIX, WeightsFile

FORMAT = 1  # of the identity, and of files without weights of their own
FORMAT_WITH_WEIGHTS = 2  # which earlier versions would take for one of the nearest weights
MOST_HEADER = 64 << 20
MARK = "flashrt_calibration"
MAKE = "make one with `flashrt calibrate` or Policy.calibrate() and save_calibration()"
AGAIN = "calibrate again with `flashrt calibrate`"


def cache_folder() -> Path:
    """Where the cache keeps calibrations."""
    return cache_directory() / "calibration"


@dataclass(frozen=True)
class CalibrationIdentity:
    """All that activation scales depend on; the same identity, the same scales.

    checkpoint: digest of every byte of the weight files; normalization: digest of the statistics and of the
    checkpoint's rules; model: dimensions, horizon and denoise steps; views: camera views in order.
    """

    checkpoint: str
    normalization: str
    model: Mapping[str, Any]
    precision: str
    views: tuple[str, ...]
    version: str = __version__
    format: int = FORMAT

    @property
    def key(self) -> str:
        """32 hexadecimal digits that name this identity."""
        return _digest(asdict(self))[:32]

    @property
    def cached_file(self) -> Path:
        """Where the cache keeps the calibration of this identity."""
        return cache_folder() / f"{self.key}.safetensors"

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """One line for each field in which a file's identity differs: what this is, and what it is."""
        lines = []
        for name, mine in _plain(asdict(self)).items():
            theirs = other.get(name)
            if theirs == mine:
                continue
            if isinstance(mine, dict) and isinstance(theirs, dict):
                keys = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
                mine = {key: mine.get(key) for key in keys}
                theirs = {key: theirs.get(key) for key in keys}
            lines.append(f"{name} of the file is {theirs}, of this policy {mine}")
        return lines


def identity_of(checkpoint: Checkpoint, views: tuple[str, ...], precision: str) -> CalibrationIdentity:
    """The identity of a policy. Reads the weight files once: 7 GB in a few seconds, remembered after that.

    Raises CalibrationError for a checkpoint without files, which nothing could tell from another.
    """
    files = checkpoint.store.files
    if not files:
        raise CalibrationError(
            f"{checkpoint.path}: this checkpoint has no files, so no calibration can be bound to it"
        )
    return CalibrationIdentity(
        checkpoint=content_digest(files, cache_directory() / "digests.json"),
        normalization=normalization_digest(checkpoint),
        model=asdict(checkpoint.config),
        precision=precision,
        views=tuple(views),
    )


def normalization_digest(checkpoint: Checkpoint) -> str:
    """Digest of what lies between the robot's units and the model: statistics, rules, delta actions."""
    stats = checkpoint.norm_stats
    features = {"state": stats.state, "actions": stats.actions} if stats else {}
    return _digest(
        {
            "statistics": {
                name: {key: array.tolist() for key, array in feature.arrays().items()}
                for name, feature in features.items()
                if feature is not None
            },
            "rules": asdict(checkpoint.rules),
            "delta_actions": checkpoint.delta_actions,
        }
    )


@dataclass(frozen=True)
class Calibration:
    """Scales and where they come from: what a file holds, and what is in force in a policy.

    scales: by projection; maxima: (samples, projections) largest magnitudes; date: ISO 8601, UTC; rounding:
    of the weights that go with them; weights: the file that has them, where they are compensated and kept;
    weights_missing: why those in force are the nearest instead (not kept in the file).
    """

    scales: Mapping[str, float]
    maxima: NDArray[np.float32] = field(repr=False)
    samples: int
    estimator: str
    percentile: float | None = None
    source: str = ""
    warnings: tuple[str, ...] = ()
    held_out_error: HeldOutError | None = None
    date: str = ""
    rounding: Rounding = "nearest"
    weights: WeightsFile | None = None
    weights_missing: str = ""

    @classmethod
    def of(cls, report: CalibrationReport) -> Calibration:
        """What a calibration that was just made is kept as."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        names = ("scales", "maxima", "samples", "estimator", "percentile", "source", "warnings", "rounding")
        values = {name: getattr(report, name) for name in names}
        return cls(**values, held_out_error=report.held_out_error, date=now)


def check_target(path: Path) -> None:
    """Raise CalibrationError where no calibration can, or may, be written: only an empty file and another
    calibration are replaced, for a path mistyped may be that of the weights.
    """
    if path.exists():
        if not path.is_file():
            raise CalibrationError(f"{path}: expected the name of a file to write, and this is none")
        if path.stat().st_size and not _is_calibration(path):
            raise CalibrationError(
                f"{path}: holds something else than a whole calibration, and stays as it is: name another "
                "file, or delete this one"
            )
    if obstacle := obstacle_to(path):
        raise CalibrationError(f"{path}: no calibration can be written there: {obstacle}; name another file")


def write(path: Path, calibration: Calibration, identity: CalibrationIdentity) -> None:
    """Write a file, complete or not at all. Raises OSError where it cannot be written."""
    tensors = {
        "scales": np.array(list(calibration.scales.values()), np.float32),
        "maxima": np.ascontiguousarray(calibration.maxima, np.float32),
    }
    error = calibration.held_out_error
    content = {
        "identity": asdict(identity),
        "key": identity.key,
        "layers": list(calibration.scales),
        "samples": calibration.samples,
        "estimator": calibration.estimator,
        "percentile": calibration.percentile,
        "source": calibration.source,
        "warnings": list(calibration.warnings),
        "held_out_error": None if error is None else error.per_sample,
        "date": calibration.date,
        "rounding": calibration.rounding,
        "weights": None if calibration.weights is None else asdict(calibration.weights),
    }
    number = str(FORMAT if calibration.weights is None else FORMAT_WITH_WEIGHTS)
    metadata = _metadata(number, json.dumps(content, sort_keys=True), content, tensors)
    write_atomically(path, save(tensors, metadata))


def read(path: Path, identity: CalibrationIdentity | None = None) -> Calibration:
    """Read and check a file; identity: what it must belong to.

    Raises CalibrationNotFoundError, CalibrationCorruptError (damaged, or no calibration) or
    CalibrationMismatchError (made for something else; names both digests).
    """
    content, tensors = _contents(path)
    if identity is not None:
        _check_identity(path, content.get("identity"), identity)
    try:
        layers, scales = content["layers"], tensors["scales"]
        rows = content["held_out_error"]
        calibration = Calibration(
            scales=dict(zip(layers, map(float, scales), strict=True)),
            maxima=tensors["maxima"],
            samples=content["samples"],
            estimator=content["estimator"],
            percentile=content["percentile"],
            source=content["source"],
            warnings=tuple(content["warnings"]),
            held_out_error=None if rows is None else HeldOutError.of_rows(tuple(map(tuple, rows))),
            date=content["date"],
            rounding=ROUNDINGS[ROUNDINGS.index(content.get("rounding", "nearest"))],
            weights=WeightsFile.checked(content.get("weights")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationCorruptError(f"{path}: not a whole calibration ({error!r}): {_way_out()}") from error
    if not all(np.isfinite(scale) and scale > 0 for scale in calibration.scales.values()):
        raise CalibrationCorruptError(f"{path}: holds scales that are not positive: {_way_out()}")
    return calibration


def stored_identity(path: Path) -> dict[str, Any]:
    """The identity that a file says it was made for; raises as `read` does."""
    identity = _contents(path)[0].get("identity")
    return identity if isinstance(identity, dict) else {}


def _is_calibration(path: Path) -> bool:
    """By its first bytes: of any format, of any policy, damaged further on or not."""
    try:
        with path.open("rb") as file:
            return MARK in _start(file)[1]
    except (AttributeError, TypeError, ValueError):
        return False


def named_by_others(path: Path, weights: WeightsFile) -> bool:
    """Whether a calibration beside the one of this path, a copy of it say, names these weights too, as far
    as one can tell: what cannot be read may.
    """
    for other in path.parent.iterdir():
        if other == path or other.name.endswith(SUFFIX) or not other.is_file():
            continue
        try:
            with other.open("rb") as file:
                metadata = _start(file)[1]
            named = json.loads(metadata["content"])["weights"]["name"] if MARK in metadata else None
        except OSError:
            return True
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
        if named == weights.name:
            return True
    return False


def _start(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """A safetensors file's length and header as they stand there, and the metadata in it.

    Raises AttributeError, TypeError or ValueError for another kind of file.
    """
    size = file.read(8)
    if (header := file.read(1)) != b"{":
        raise ValueError("no safetensors file")
    header += file.read(max(min(int.from_bytes(size, "little"), MOST_HEADER) - 1, 0))
    return size + header, dict(json.loads(header).get("__metadata__") or {})


def _contents(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    try:
        with path.open("rb") as file:
            start, metadata = _start(file)
            if MARK not in metadata:  # a checkpoint's weights, say: not read any further
                raise CalibrationCorruptError(f"{path}: a safetensors file, but no calibration: {MAKE}")
            tensors = load(start + file.read())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CalibrationNotFoundError(f"{path}: no calibration there: {MAKE}") from error
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:
        raise CalibrationCorruptError(f"{path}: damaged ({error}): {_way_out()}") from error
    if metadata[MARK] not in (str(FORMAT), str(FORMAT_WITH_WEIGHTS)):
        raise CalibrationMismatchError(
            f"{path}: a calibration of format {metadata[MARK]}, this version ({__version__}) reads {FORMAT} "
            f"and {FORMAT_WITH_WEIGHTS}: {AGAIN}"
        )
    try:
        text = metadata["content"]
        content: dict[str, Any] = json.loads(text)
        whole = metadata == _metadata(metadata[MARK], text, content, tensors)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CalibrationCorruptError(f"{path}: damaged (its checksum is another): {_way_out()}")
    return content, tensors


def _metadata(
    number: str, text: str, content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> dict[str, str]:
    """Of the file: all as JSON, its checksum, and on their own the fields that one looks for first."""
    digest = hashlib.sha256(("" if number == str(FORMAT) else number).encode() + text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return {
        MARK: number,
        "content": text,
        "sha256": digest.hexdigest(),
        "checkpoint": content["identity"]["checkpoint"],
        "library_version": content["identity"]["version"],
        "date": content["date"],
    }


def _check_identity(path: Path, stored: object, identity: CalibrationIdentity) -> None:
    differences = identity.differences(stored if isinstance(stored, dict) else {})
    if differences:
        raise CalibrationMismatchError(
            f"{path}: a calibration of another policy: {'; '.join(differences)}. Use it with what it was "
            f"made for, or {AGAIN}"
        )


def _way_out() -> str:
    return f"delete the file and {AGAIN}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def _plain(content: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(content))
