"""LeRobot datasets on disk, layouts v2 and v3: metadata in `meta/`, frames in parquet files, images in them
or in videos.

v2 has a parquet file and a video per episode; v3 joins episodes into larger files and says in
`meta/episodes/` where each one lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .sampling import Episode
from .video import read_frame

IMAGE_PREFIX = "observation.images."
STATE_KEYS = ("observation.state", "state")
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclass(frozen=True)
class _Place:
    """Where an episode lies: its parquet file, and per video key the file and the second it begins at.

    first: value of column `index` of its first row; None where the file holds this episode alone.
    """

    data: Path
    videos: Mapping[str, tuple[Path, float]]
    first: int | None = None


@dataclass
class LeRobotDataset:
    """An opened dataset. cameras: name -> feature key, names without "observation.images."."""

    root: Path
    version: int
    fps: float
    cameras: Mapping[str, str]
    state_key: str | None
    info: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, root: Path, state_key: str | None = None) -> LeRobotDataset:
        """Read `meta/info.json`; raises DatasetError, which names file and field."""
        path = root / "meta" / "info.json"
        if not path.is_file():
            raise DatasetError(f"{root}: not a LeRobot dataset: expected {path}")
        info = _json(path)
        try:
            version = int(str(info["codebase_version"]).lstrip("v").split(".")[0])
            features: Mapping[str, Any] = info["features"]
            fps = float(info["fps"])
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{path}: no usable codebase_version, features and fps ({error!r})") from error
        if version not in (2, 3):
            raise DatasetError(f"{path}: layout {info['codebase_version']}: versions 2 and 3 are read")
        cameras = {_camera(key): key for key, each in features.items() if _is_image(each)}
        return cls(root, version, fps, cameras, _state_key(path, features, state_key), info)

    @cached_property
    def episodes(self) -> list[Episode]:
        """Every episode, in order."""
        found = self._episodes_v2() if self.version == 2 else self._episodes_v3()
        return sorted(found, key=lambda episode: episode.index)

    def observation(self, episode: int, frame: int, cameras: Mapping[str, str]) -> dict[str, Any]:
        """One frame as `Policy.predict` takes it: images by view, prompt, and the state if there is one.

        cameras: view -> name in `self.cameras`.
        """
        place = self._place(episode)
        keys = {view: self.cameras[name] for view, name in cameras.items()}
        stored = [key for key in keys.values() if key not in place.videos]
        wanted = ["timestamp", "task_index", *([self.state_key] if self.state_key else []), *stored]
        row = self._row(place, episode, frame, wanted)
        images = {
            view: self._decode(place.data, key, row[key])
            if key in stored
            else self._video_frame(place.videos[key], row, frame)
            for view, key in keys.items()
        }
        result: dict[str, Any] = {"images": images, "prompt": self._task(row.get("task_index"), episode)}
        if self.state_key:
            result["state"] = np.asarray(row[self.state_key], np.float32).reshape(-1)
        return result

    def _video_frame(
        self, place: tuple[Path, float], row: Mapping[str, Any], frame: int
    ) -> NDArray[np.uint8]:
        path, begins = place
        stamp = row.get("timestamp")
        seconds = frame / self.fps if stamp is None else float(np.ravel(stamp)[0])
        return read_frame(path, begins + seconds, tolerance=0.5 / self.fps)

    def _decode(self, file: Path, key: str, value: object) -> NDArray[np.uint8]:
        """An image stored in a row: its encoded bytes, or a struct of them and a path."""
        raw, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if raw is None and path:
            found = self.root / str(path)
            if not found.is_file():
                raise DatasetError(f"{file}: {key} lies in {found}, which is not there")
            raw = found.read_bytes()
        if not isinstance(raw, bytes):
            raise DatasetError(f"{file}: {key}: expected an encoded image, got {type(raw).__name__}")
        pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise DatasetError(f"{file}: {key}: {len(raw)} bytes that are no image")
        return np.ascontiguousarray(pixels[..., ::-1], dtype=np.uint8)

    def _row(self, place: _Place, episode: int, frame: int, columns: list[str]) -> dict[str, Any]:
        file = self._parquet(place.data)
        names = set(file.schema_arrow.names)
        missing = [name for name in columns if name not in names and name not in ("timestamp", "task_index")]
        if missing:
            raise DatasetError(f"{place.data}: no column {', '.join(missing)}")
        row = frame if place.first is None else self._offset(place) + frame
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                table = file.read_row_group(group, columns=[name for name in columns if name in names])
                found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
                return found
            row -= rows
        raise DatasetError(f"{place.data}: ends before frame {frame} of episode {episode}")

    def _offset(self, place: _Place) -> int:
        """Row at which an episode begins in a file of several."""
        index = self._parquet(place.data).read(columns=["index"]).column("index").to_numpy()
        rows = np.flatnonzero(index == place.first)
        if len(rows) != 1:
            raise DatasetError(f"{place.data}: {len(rows)} rows of index {place.first}, expected one")
        return int(rows[0])

    def _parquet(self, path: Path) -> Any:
        parquet = _pyarrow_parquet(path)
        if not path.is_file():
            raise DatasetError(f"{path}: no such file, which `meta/` speaks of")
        try:
            return parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise DatasetError(f"{path}: not a parquet file: {error}") from error

    def _task(self, index: object, episode: int) -> str:
        number = None if index is None else int(np.ravel(np.asarray(index))[0])
        if number in self._tasks:
            return self._tasks[number]
        return next(each.task for each in self.episodes if each.index == episode)

    @cached_property
    def _tasks(self) -> dict[int | None, str]:
        if self.version == 2:
            path = self.root / "meta" / "tasks.jsonl"
            return {int(entry["task_index"]): str(entry["task"]) for entry in _json_lines(path)}
        table = self._parquet(self.root / "meta" / "tasks.parquet").read()
        texts = [name for name in table.column_names if name != "task_index"]  # pandas' unnamed index
        rows = table.to_pylist()
        return {int(row["task_index"]): str(row[texts[0]]) for row in rows} if texts else {}

    def _episodes_v2(self) -> Iterator[Episode]:
        path = self.root / "meta" / "episodes.jsonl"
        if path.is_file():
            for entry in _json_lines(path):
                try:
                    texts = entry.get("tasks") or [""]
                    yield Episode(int(entry["episode_index"]), int(entry["length"]), str(texts[0]))
                except (KeyError, TypeError, ValueError) as error:
                    raise DatasetError(f"{path}: no episode: {entry!r}") from error
            return
        for file in sorted((self.root / "data").glob("chunk-*/episode_*.parquet")):  # nothing but the frames
            opened = self._parquet(file)
            number = None
            if "task_index" in opened.schema_arrow.names and opened.metadata.num_rows:
                number = int(opened.read_row_group(0, columns=["task_index"]).column(0)[0].as_py())
            yield Episode(
                int(file.stem.split("_")[-1]), opened.metadata.num_rows, self._tasks.get(number, "")
            )

    @cached_property
    def _rows_v3(self) -> dict[int, dict[str, Any]]:
        folder = self.root / "meta" / "episodes"
        rows: dict[int, dict[str, Any]] = {}
        for file in sorted(folder.glob("chunk-*/file-*.parquet")):
            opened = self._parquet(file)
            columns = [name for name in opened.schema_arrow.names if not name.startswith("stats/")]
            rows |= {int(row["episode_index"]): row for row in opened.read(columns=columns).to_pylist()}
        if not rows:
            raise DatasetError(f"{folder}: no episodes in chunk-*/file-*.parquet")
        return rows

    def _episodes_v3(self) -> Iterator[Episode]:
        for index, row in self._rows_v3.items():
            texts = row.get("tasks") or [""]
            yield Episode(index, int(row["length"]), str(texts[0]))

    def _place(self, episode: int) -> _Place:
        videos = [key for key in self.cameras.values() if self.info["features"][key]["dtype"] == "video"]
        data = self.info.get("data_path") or (V2_DATA if self.version == 2 else V3_DATA)
        video = self.info.get("video_path") or (V2_VIDEO if self.version == 2 else V3_VIDEO)
        try:
            if self.version == 2:
                chunk = episode // int(self.info.get("chunks_size", 1000))
                names = {"episode_chunk": chunk, "episode_index": episode}
                return _Place(
                    self.root / data.format(**names),
                    {key: (self.root / video.format(**names, video_key=key), 0.0) for key in videos},
                )
            row = self._rows_v3[episode]

            def names_of(prefix: str) -> dict[str, int]:
                return {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}

            return _Place(
                self.root / data.format(**names_of("data")),
                {
                    key: (
                        self.root / video.format(**names_of(f"videos/{key}"), video_key=key),
                        float(row[f"videos/{key}/from_timestamp"]),
                    )
                    for key in videos
                },
                int(row["dataset_from_index"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DatasetError(f"{self.root}: where episode {episode} lies is not told: {error!r}") from error


def _camera(key: str) -> str:
    """A camera's name from its feature key."""
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")


def _is_image(feature: Mapping[str, Any]) -> bool:
    depth = (feature.get("info") or {}).get("video.is_depth_map", False)
    return feature.get("dtype") in ("image", "video") and not depth


def _state_key(path: Path, features: Mapping[str, Any], wanted: str | None) -> str | None:
    if wanted is not None and wanted not in features:
        raise DatasetError(f"{path}: no feature {wanted!r}; there are {', '.join(features)}")
    return wanted or next((key for key in STATE_KEYS if key in features), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise DatasetError(f"{path}:{number}: not JSON: {error}") from error
    return entries


def _pyarrow_parquet(path: Path) -> ModuleType:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DatasetError(
            f"{path}: reading parquet files needs pyarrow: pip install 'flashrt-runtime[datasets]'"
        ) from error
    module: ModuleType = parquet
    return module
