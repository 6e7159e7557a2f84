"""LeRobot datasets v2 and v3: every frame is the one that was asked for, and damage is named."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lerobot_files import LENGTHS, SIZE, TASK_OF, TASKS, picture, png, rows, state, write_table, write_video

from flashrt_runtime.datasets import load_calibration_obs
from flashrt_runtime.datasets.lerobot import LeRobotDataset
from flashrt_runtime.errors import DatasetError, OptionError

LAYOUTS = ("v2 images", "v2 videos", "v3")


def same_picture(got: np.ndarray, want: np.ndarray, exact: bool) -> bool:
    """Videos are lossy: within some levels, less than what tells two frames apart."""
    assert got.dtype == np.uint8
    assert got.shape == want.shape
    return int(np.abs(got.astype(int) - want.astype(int)).max()) <= (0 if exact else 6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_frame(datasets: dict[str, Path], layout: str) -> None:
    dataset = LeRobotDataset.open(datasets[layout])
    assert [(each.index, each.length, each.task) for each in dataset.episodes] == [
        (index, length, TASKS[TASK_OF[index]]) for index, length in enumerate(LENGTHS)
    ]
    names = {"top": 0, "wrist": 1} if layout != "v2 images" else {"image": 0, "wrist_image": 1}
    assert set(dataset.cameras) == set(names)
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            found = dataset.observation(episode, frame, {f"view {name}": name for name in names})
            assert found["prompt"] == TASKS[TASK_OF[episode]]
            assert found["state"].dtype == np.float32
            assert found["state"].tolist() == state(episode, frame)
            for name, camera in names.items():
                want = picture(episode, frame, camera)
                assert same_picture(found["images"][f"view {name}"], want, layout == "v2 images")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_observations_for_calibration(datasets: dict[str, Path], layout: str) -> None:
    first, again = (list(load_calibration_obs(datasets[layout], n=6)) for _ in range(2))
    assert len(first) == 6
    for one, two in zip(first, again, strict=True):
        assert one["prompt"] == two["prompt"]
        assert one["seed"] == two["seed"]
        assert all(np.array_equal(one["images"][key], two["images"][key]) for key in one["images"])
    assert [each["seed"] for each in first] == list(range(6))
    assert {each["prompt"] for each in first} == set(TASKS)
    assert len({tuple(each["state"]) for each in first}) == 6
    assert {int(each["state"][0]) for each in first} == {0, 1, 2, 3}
    only = list(load_calibration_obs(datasets[layout], n=4, task_filter="RED block", exclude=[0]))
    assert {each["prompt"] for each in only} == {TASKS[0]}
    assert {int(each["state"][0]) for each in only} == {2}


def test_they_are_read_when_asked_for(written) -> None:
    root = written("v2 images")
    observations = load_calibration_obs(root, n=3)
    next(observations)
    shutil.rmtree(root / "data")
    with pytest.raises(DatasetError, match="no such file"):
        next(observations)


def test_image_size_and_views(datasets: dict[str, Path]) -> None:
    views = {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"}
    (found,) = load_calibration_obs(datasets["v2 images"], n=1, image_size=48, views=views)
    assert list(found["images"]) == list(views)
    for pixels in found["images"].values():
        assert pixels.shape == (48, 48, 3)
        assert pixels.dtype == np.uint8
        assert (pixels[:8] == 0).all(), "64 x 96 fits as 32 x 48, centred on black"
        assert (pixels[8:40] > 0).all()
    assert SIZE == (64, 96)


def test_without_episode_list(written) -> None:
    """meta/info.json, tasks and frames are enough: LIBERO conversions differ in what else they have."""
    root = written("v2 images")
    (root / "meta/episodes.jsonl").unlink()
    found = LeRobotDataset.open(root).episodes
    assert [(each.index, each.length, each.task) for each in found] == [
        (index, length, TASKS[TASK_OF[index]]) for index, length in enumerate(LENGTHS)
    ]


def test_images_beside_the_rows(written) -> None:
    """A row may name a file in place of holding the bytes."""
    root = written("v2 images")
    entries = rows(0, 0)
    for frame, entry in enumerate(entries):
        entry["state"] = state(0, frame)
        for camera, key in enumerate(("image", "wrist_image")):
            file = f"images/{key}/{frame}.png"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(png(picture(0, frame, camera)))
            entry[key] = {"bytes": None, "path": file}
    write_table(root / "data/chunk-000/episode_000000.parquet", entries)
    dataset = LeRobotDataset.open(root)
    found = dataset.observation(0, 3, {"a": "wrist_image"})
    assert np.array_equal(found["images"]["a"], picture(0, 3, 1))
    (root / "images/image/2.png").unlink()
    with pytest.raises(DatasetError, match=r"2\.png, which is not there"):
        dataset.observation(0, 2, {"a": "image"})


def edit_info(root: Path, **fields: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "no dataset": (lambda root: shutil.rmtree(root / "meta"), "not a LeRobot dataset"),
    "info is no JSON": (lambda root: (root / "meta/info.json").write_text("{"), "not readable as JSON"),
    "info is a list": (lambda root: (root / "meta/info.json").write_text("[]"), "expected a JSON object"),
    "version": (lambda root: edit_info(root, codebase_version="v1.6"), "versions 2 and 3"),
    "no version": (lambda root: edit_info(root, codebase_version=None), "codebase_version"),
    "no fps": (lambda root: edit_info(root, fps=None), "no usable"),
    "data truncated": (
        lambda root: [file.write_bytes(file.read_bytes()[:99]) for file in root.glob("data/*/*")],
        "not a parquet file",
    ),
    "data gone": (lambda root: shutil.rmtree(root / "data"), "no such file"),
}
V2_DAMAGE = {
    "episode list": (lambda root: (root / "meta/episodes.jsonl").write_text('{"a": 1}\n'), "no episode"),
    "tasks": (lambda root: (root / "meta/tasks.jsonl").write_text("x\n"), r"tasks\.jsonl:1: not JSON"),
    "path template": (lambda root: edit_info(root, data_path="data/{nothing}"), "where episode"),
}
VIDEO_DAMAGE = {
    "no video": (lambda root: shutil.rmtree(root / "videos"), "no such video"),
    "video truncated": (
        lambda root: [file.write_bytes(file.read_bytes()[:200]) for file in root.rglob("*.mp4")],
        "cannot be decoded",
    ),
}
V3_DAMAGE = {
    "no episodes": (lambda root: shutil.rmtree(root / "meta/episodes"), "no episodes"),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in ("v2 images", "v3") for name in DAMAGE]
    + [("v2 images", name) for name in V2_DAMAGE]
    + [("v3", name) for name in (*VIDEO_DAMAGE, *V3_DAMAGE)],
)
def test_damage_is_named(written, layout: str, name: str) -> None:
    root = written(layout)
    harm, message = (DAMAGE | V2_DAMAGE | VIDEO_DAMAGE | V3_DAMAGE)[name]
    harm(root)
    with pytest.raises(DatasetError, match=message) as caught:
        list(load_calibration_obs(root, n=8))
    assert str(root) in str(caught.value)


def test_a_video_that_ends_early(written) -> None:
    """A frame is never replaced by the last one there is."""
    root = written("v2 videos")
    for file in root.rglob("observation.images.top/*.mp4"):
        write_video(file, [picture(0, 0, 0)] * 2)
    with pytest.raises(DatasetError, match=r"no frame at 0\.500 s: the nearest is 0\.4"):
        LeRobotDataset.open(root).observation(0, 5, {"a": "top"})


def test_what_there_is_not(datasets: dict[str, Path]) -> None:
    root = datasets["v2 images"]
    with pytest.raises(DatasetError, match="'pour' in its task; the tasks are 'open the drawer'; 'pick up"):
        load_calibration_obs(root, task_filter="pour")
    with pytest.raises(DatasetError, match="all 4 episodes are excluded"):
        load_calibration_obs(root, exclude=range(4))
    with pytest.raises(DatasetError, match="no feature 'joints'; there are image"):
        load_calibration_obs(root, state_key="joints")
    with pytest.raises(OptionError, match="n=0"):
        load_calibration_obs(root, n=0)
    with pytest.raises(DatasetError, match=r"frame 9 of episode 2"):
        LeRobotDataset.open(root).observation(2, 9, {"a": "image"})


@pytest.mark.parametrize(("package", "layout"), [("pyarrow", "v2 images"), ("av", "v3")])
def test_missing_packages_are_named(datasets, monkeypatch, package: str, layout: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatasetError, match=r"pip install 'flashrt-runtime\[datasets\]'"):
        list(load_calibration_obs(datasets[layout], n=1))
