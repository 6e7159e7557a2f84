"""Real LeRobot datasets in both layouts: parquet by pyarrow, videos by FFmpeg.

A frame tells what it is: its red value counts its episode, its green its frame, its blue its camera.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
from pyarrow import parquet

FPS = 10
LENGTHS = (7, 12, 5, 9)
TASKS = ("pick up the red block", "open the drawer")
TASK_OF = (0, 1, 0, 1)
SIZE = 64, 96
IMAGES = ("image", "wrist_image")
VIDEOS = ("observation.images.top", "observation.images.wrist")


def picture(episode: int, frame: int, camera: int) -> np.ndarray:
    return np.full((*SIZE, 3), (40 + 40 * episode, 20 + 15 * frame, 60 + 120 * camera), np.uint8)


def state(episode: int, frame: int) -> list[float]:
    """As wide as LIBERO's."""
    return [float(episode), float(frame), 0.5, *[0.0] * 5]


def rows(episode: int, index: int) -> list[dict[str, object]]:
    return [
        {
            "timestamp": frame / FPS,
            "frame_index": frame,
            "episode_index": episode,
            "index": index + frame,
            "task_index": TASK_OF[episode],
        }
        for frame in range(LENGTHS[episode])
    ]


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def write_video(path: Path, frames: list[np.ndarray], codec: str = "libx264") -> None:
    """On a thread of its own: SVT-AV1 gives the thread that encodes real-time priority where it may (root),
    which every process started from that thread inherits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as encoder:
        encoder.submit(encode_video, path, frames, codec).result()


def encode_video(path: Path, frames: list[np.ndarray], codec: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(FPS))
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "4", "crf": "5"}  # key frames are some frames apart, as in real ones
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_table(path: Path, entries: list[dict[str, object]], row_group_size: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(entries), path, row_group_size=row_group_size)


def info(
    version: str, images: tuple[str, ...], dtype: str, state_key: str, **more: object
) -> dict[str, object]:
    camera = {"dtype": dtype, "shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    features: dict[str, object] = dict.fromkeys(images, camera)
    features |= {state_key: {"dtype": "float32", "shape": [8]}, "action": {"dtype": "float32", "shape": [3]}}
    return {"codebase_version": version, "fps": FPS, "features": features, **more}


def write_v2_images(root: Path) -> Path:
    """As physical-intelligence/libero: images in the rows, keys image, wrist_image, state."""
    path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    more = {"chunks_size": 3, "data_path": path, "video_path": None}
    write_json(root / "meta/info.json", info("v2.0", IMAGES, "image", "state", **more))
    for episode in range(len(LENGTHS)):
        entries = rows(episode, sum(LENGTHS[:episode]))
        for frame, entry in enumerate(entries):
            entry["state"] = state(episode, frame)
            for camera, key in enumerate(IMAGES):
                entry[key] = {"bytes": png(picture(episode, frame, camera)), "path": f"frame_{frame}.png"}
        file = root / path.format(episode_chunk=episode // 3, episode_index=episode)
        write_table(file, entries, row_group_size=4)
    _jsonl(root / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(TASKS)])
    _jsonl(
        root / "meta/episodes.jsonl",
        [
            {"episode_index": i, "tasks": [TASKS[TASK_OF[i]]], "length": length}
            for i, length in enumerate(LENGTHS)
        ],
    )
    return root


def write_v2_videos(root: Path) -> Path:
    write_v2_images(root)
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    more = {"chunks_size": 3, "data_path": data, "video_path": video}
    write_json(root / "meta/info.json", info("v2.1", VIDEOS, "video", "observation.state", **more))
    for episode, length in enumerate(LENGTHS):
        chunk = episode // 3
        entries = rows(episode, sum(LENGTHS[:episode]))
        for frame, entry in enumerate(entries):
            entry["observation.state"] = state(episode, frame)
        write_table(root / data.format(episode_chunk=chunk, episode_index=episode), entries)
        for camera, key in enumerate(VIDEOS):
            frames = [picture(episode, frame, camera) for frame in range(length)]
            names = {"episode_chunk": chunk, "video_key": key, "episode_index": episode}
            write_video(root / video.format(**names), frames)
    return root


def write_v3(root: Path) -> Path:
    """Episodes 0 and 1 in one file, 2 and 3 in the next; videos split elsewhere: 0 | 1, 2, 3."""
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    more = {"chunks_size": 1000, "data_path": data, "video_path": video}
    write_json(root / "meta/info.json", info("v3.0", VIDEOS, "video", "observation.state", **more))
    starts = [sum(LENGTHS[:episode]) for episode in range(len(LENGTHS))]
    for file, members in enumerate(((0, 1), (2, 3))):
        entries = []
        for episode in members:
            for frame, entry in enumerate(rows(episode, starts[episode])):
                entries.append(entry | {"observation.state": state(episode, frame)})
        write_table(root / data.format(chunk_index=0, file_index=file), entries, row_group_size=6)
    places: dict[int, dict[str, object]] = {episode: {} for episode in range(len(LENGTHS))}
    for file, members in enumerate(((0,), (1, 2, 3))):
        for camera, key in enumerate(VIDEOS):
            frames: list[np.ndarray] = []
            for episode in members:
                begins = len(frames) / FPS
                frames += [picture(episode, frame, camera) for frame in range(LENGTHS[episode])]
                places[episode] |= {
                    f"videos/{key}/chunk_index": 1,
                    f"videos/{key}/file_index": file,
                    f"videos/{key}/from_timestamp": begins,
                    f"videos/{key}/to_timestamp": len(frames) / FPS,
                }
            codec = "libsvtav1" if "libsvtav1" in av.codecs_available and file == 0 else "libx264"
            write_video(root / video.format(chunk_index=1, file_index=file, video_key=key), frames, codec)
    for file, members in enumerate(((0, 1, 2), (3,))):
        entries = [
            {
                "episode_index": episode,
                "tasks": [TASKS[TASK_OF[episode]]],
                "length": LENGTHS[episode],
                "data/chunk_index": 0,
                "data/file_index": episode // 2,
                "dataset_from_index": starts[episode],
                "dataset_to_index": starts[episode] + LENGTHS[episode],
                **places[episode],
                "stats/action/mean": [0.0, 0.0, 0.0],
            }
            for episode in members
        ]
        write_table(root / f"meta/episodes/chunk-000/file-{file:03d}.parquet", entries)
    # as pandas writes a frame whose index is the task
    tasks = [{"task_index": i, "__index_level_0__": task} for i, task in enumerate(TASKS)]
    write_table(root / "meta/tasks.parquet", tasks)
    return root


def _jsonl(path: Path, entries: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


WRITERS = {"v2 images": write_v2_images, "v2 videos": write_v2_videos, "v3": write_v3}
