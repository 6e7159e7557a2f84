"""A directory of images, and JSON that says what belongs together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .sampling import Counted, Episode, pick_frames

LAYOUT = (
    'expected observations.json, a list of {"images": {"view": "file.png", ...}, "prompt": "...", '
    '"state": [...]}, or one such object per JSON file'
)
FIELDS = {"images", "prompt", "state", "seed"}


def load_folder_obs(
    root: str | Path, n: int | None = None, *, views: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Observations of a directory, read one at a time; n: at most so many, spread over all of them.

    observations.json (or the only JSON file) holds a list of objects, or every JSON file holds one: images
    (by view, or a list in the policy's order; files relative to the directory), prompt, state (numbers in
    the robot's units) and seed as `Policy.predict` takes them. views: view -> name in the JSON. Raises
    DatasetError, at once but for what is wrong with an image.
    """
    folder = Path(root).expanduser()
    entries = _entries(folder)
    for where, entry in entries:
        _check(where, entry)
    if n is not None and n < len(entries):
        picks = pick_frames([Episode(0, len(entries), "")], n)
        entries = [entries[index] for index in sorted(pick.frame for pick in picks)]
    read = (_observation(folder, where, entry, seed, views) for seed, (where, entry) in enumerate(entries))
    return Counted(read, len(entries))


def _entries(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it is written, the object) of every observation."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such directory")
    whole = folder / "observations.json"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.json"))
    if not files:
        raise DatasetError(f"{folder}: no JSON file: {LAYOUT}")
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{file}: not readable as JSON: {error}") from error
        listed = isinstance(content, list)
        found += [
            (f"{file}[{index}]" if listed else str(file), entry)
            for index, entry in enumerate(content if listed else [content])
        ]
    if not found:
        raise DatasetError(f"{files[0]}: an empty list")
    return found


def _check(where: str, entry: object) -> None:
    if not isinstance(entry, dict) or "images" not in entry:
        raise DatasetError(f"{where}: no observation: {LAYOUT}")
    unknown = set(entry) - FIELDS
    if unknown:
        raise DatasetError(f"{where}: unknown fields {', '.join(sorted(unknown))}: {LAYOUT}")
    images = entry["images"]
    names = list(images.values()) if isinstance(images, dict) else images
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{where}: images: expected file names, got {images!r}")


def _observation(
    folder: Path, where: str, entry: Mapping[str, Any], seed: int, views: Mapping[str, str] | None
) -> dict[str, Any]:
    images = entry["images"]
    if views is not None:
        if not isinstance(images, dict) or not set(views.values()) <= set(images):
            raise DatasetError(f"{where}: expected images named {', '.join(views.values())}, got {images!r}")
        images = {view: images[name] for view, name in views.items()}
    result: dict[str, Any] = {"seed": seed} | {key: entry[key] for key in ("prompt", "seed") if key in entry}
    if entry.get("state") is not None:
        try:
            result["state"] = np.asarray(entry["state"], np.float32)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"{where}: state: expected numbers, got {entry['state']!r}") from error
    if isinstance(images, dict):
        result["images"] = {view: _image(folder / name, where) for view, name in images.items()}
    else:
        result["images"] = [_image(folder / name, where) for name in images]
    return result


def _image(file: Path, where: str) -> NDArray[np.uint8]:
    if not file.is_file():
        raise DatasetError(f"{where}: no image {file}")
    pixels = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DatasetError(f"{where}: {file} is not an image")
    return np.ascontiguousarray(pixels[..., ::-1], dtype=np.uint8)
