"""A directory of images and JSON, and cameras matched to views."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from flashrt_runtime.datasets import dataset_observations, load_folder_obs
from flashrt_runtime.datasets.views import match_views, parse_views
from flashrt_runtime.errors import DatasetError, OptionError

VIEWS = ("base_0_rgb", "left_wrist_0_rgb")


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def entry(number: int) -> dict[str, object]:
    images = {view: f"{number}_{view}.png" for view in VIEWS}
    return {"images": images, "prompt": f"do {number}", "state": [number, 0.5]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        for index, view in enumerate(VIEWS):
            cv2.imwrite(str(tmp_path / f"{number}_{view}.png"), picture(2 * number + index)[..., ::-1])
    (tmp_path / "observations.json").write_text(json.dumps([entry(number) for number in range(10)]))
    return tmp_path


def test_one_list(folder: Path) -> None:
    found = list(load_folder_obs(folder))
    assert [each["prompt"] for each in found] == [f"do {number}" for number in range(10)]
    for number, each in enumerate(found):
        assert each["state"].dtype == np.float32
        assert each["state"].tolist() == [number, 0.5]
        for index, view in enumerate(VIEWS):
            assert np.array_equal(each["images"][view], picture(2 * number + index))
    assert [each["seed"] for each in found] == list(range(10))
    some = [each["state"][0] for each in load_folder_obs(folder, n=4)]
    assert some == sorted(set(some))
    assert len(some) == 4
    assert some[0] < 4
    assert some[-1] > 5


def test_a_file_for_each_and_images_in_order(folder: Path) -> None:
    (folder / "observations.json").unlink()
    for number in (3, 1):
        each = entry(number) | {"images": list(entry(number)["images"].values()), "seed": 40 + number}
        (folder / f"{number}.json").write_text(json.dumps(each))
    first, second = load_folder_obs(folder)
    assert (first["prompt"], second["prompt"]) == ("do 1", "do 3")
    assert (first["seed"], second["seed"]) == (41, 43)
    assert [image.shape for image in first["images"]] == [(20, 30, 3)] * 2


def test_views(folder: Path) -> None:
    (found, *_) = load_folder_obs(folder, views={"only": "left_wrist_0_rgb"})
    assert list(found["images"]) == ["only"]
    assert np.array_equal(found["images"]["only"], picture(1))
    with pytest.raises(DatasetError, match=r"observations\.json\[0\]: expected images named nothing"):
        list(load_folder_obs(folder, views={"only": "nothing"}))


BAD = {
    "no image": ([entry(77)], r"\[0\]: no image .*77_base_0_rgb\.png"),
    "not an image": ([entry(0) | {"images": ["observations.json"]}], "is not an image"),
    "no images": ([entry(0), {"prompt": "x"}], r"\[1\]: no observation: expected observations\.json"),
    "not names": ([entry(0) | {"images": [1, 2]}], "expected file names"),
    "a typing error": ([entry(0) | {"promt": "x"}], "unknown fields promt"),
    "state": ([entry(0) | {"state": ["a"]}], "state: expected numbers"),
    "empty": ([], "an empty list"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(folder: Path, name: str) -> None:
    content, message = BAD[name]
    (folder / "observations.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        list(load_folder_obs(folder))


def test_no_json(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no JSON file: expected"):
        load_folder_obs(tmp_path)
    with pytest.raises(DatasetError, match="no such directory"):
        load_folder_obs(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DatasetError, match="not readable"):
        load_folder_obs(tmp_path)


def test_whatever_a_path_holds(folder: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    """LeRobot or images, for the views of a policy."""
    of_images = list(dataset_observations(folder, 4, VIEWS))
    assert [list(each["images"]) for each in of_images] == [list(VIEWS)] * 4
    of_dataset = list(dataset_observations(datasets["v2 images"], 4, VIEWS, "drawer", exclude=[1]))
    assert [list(each["images"]) for each in of_dataset] == [list(VIEWS)] * 4
    assert {each["prompt"] for each in of_dataset} == {"open the drawer"}
    with pytest.raises(OptionError, match="no tasks or episodes"):
        dataset_observations(folder, 4, VIEWS, "drawer")
    with pytest.raises(DatasetError, match="no camera for the views"):
        dataset_observations(datasets["v3"], 4, VIEWS)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match=r"no dataset: expected meta/info\.json"):
            dataset_observations(path, 4, VIEWS)
    (folder / "meta").mkdir()  # a LeRobot dataset that lost its description, not images beside it
    with pytest.raises(DatasetError, match=r"meta/info\.json"):
        dataset_observations(folder, 4, VIEWS)


def test_match_views() -> None:
    views = ("base_0_rgb", "left_wrist_0_rgb")
    assert match_views(["image", "wrist_image", "depth"], views) == dict(
        zip(views, ["image", "wrist_image"], strict=True)
    )
    assert match_views(["left_wrist_0_rgb", "base_0_rgb"], views) == {view: view for view in views}
    named = {"left_wrist_0_rgb": "b", "base_0_rgb": "a"}
    assert list(match_views(["b", "a"], views, named).items()) == [
        ("base_0_rgb", "a"), ("left_wrist_0_rgb", "b"),
    ]  # fmt: skip
    with pytest.raises(DatasetError, match=r"left_wrist_0_rgb among image, top.*left_wrist_0_rgb=CAMERA"):
        match_views(["image", "top"], views)
    with pytest.raises(DatasetError, match="--view: nose: the views are"):
        match_views(["a", "b"], views, {"base_0_rgb": "nose"})
    with pytest.raises(DatasetError, match="no camera for the views base_0_rgb"):
        match_views([], views[:1])


def test_parse_views() -> None:
    assert parse_views(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for bad in (["a"], ["=b"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(OptionError):
            parse_views(bad)
