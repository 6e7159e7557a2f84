"""Observations for `Policy.calibrate`: of a LeRobot dataset, or of whatever a path holds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DatasetError, OptionError
from ..processing.images import resize_with_pad
from .folder import load_folder_obs
from .lerobot import LeRobotDataset
from .sampling import Counted, pick_frames
from .views import match_views


def load_calibration_obs(
    root: str | Path,
    n: int = 8,
    task_filter: str | None = None,
    exclude: Collection[int] = (),
    image_size: int | None = None,
    *,
    views: Mapping[str, str] | None = None,
    state_key: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Observations of a LeRobot dataset (v2, v3; LIBERO's too), spread over tasks, episodes and time.

    They are read one at a time, as they are asked for, and are the same ones every time. task_filter: only
    tasks that hold this text. exclude: episode indices to leave out, those of an evaluation for instance.
    image_size: images scaled to fit a square of so many pixels, padded with black; None: as recorded, which
    the policy resizes by its own rule. views: view -> camera (the feature's key without
    "observation.images."); None: every camera by its own name. state_key: the feature that is the state;
    None: observation.state or state.

    Each is a mapping of predict's arguments: images (H, W, 3) uint8 RGB by view, prompt, state (n,) float32
    where there is one, and a seed. Raises DatasetError (files that are not what `meta/` says, nothing left),
    at once for what can be told without reading frames.
    """
    dataset = LeRobotDataset.open(Path(root).expanduser(), state_key)
    cameras = {name: name for name in dataset.cameras} if views is None else dict(views)
    picks = pick_frames(dataset.episodes, n, task_filter, exclude)

    def observations() -> Iterator[dict[str, Any]]:
        for seed, pick in enumerate(picks):
            observation = dataset.observation(pick.episode, pick.frame, cameras)
            if image_size is not None:
                observation["images"] = {
                    view: _fitted(pixels, image_size) for view, pixels in observation["images"].items()
                }
            yield observation | {"seed": seed}

    return Counted(observations(), len(picks))


def _fitted(pixels: Any, size: int) -> Any:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    return resize_with_pad(planes, size, "antialias_uint8").permute(1, 2, 0).contiguous().numpy()


def dataset_observations(
    root: str | Path,
    n: int,
    views: Sequence[str],
    task_filter: str | None = None,
    exclude: Collection[int] = (),
) -> Iterator[dict[str, Any]]:
    """Observations for a policy of these views, of whatever there is: a LeRobot dataset, or a directory of
    images (`load_folder_obs`).

    Cameras are matched to views by name (`views.match_views`). Raises DatasetError, and OptionError for a
    task_filter or exclude where there are no tasks and episodes.
    """
    folder = Path(root).expanduser()
    if (folder / "meta").is_dir():  # LeRobot's, also without the file that must be in it
        cameras = match_views(LeRobotDataset.open(folder).cameras, views)
        return load_calibration_obs(folder, n, task_filter, exclude, views=cameras)
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise DatasetError(
            f"{folder}: no dataset: expected meta/info.json (LeRobot), or images with an observations.json"
        )
    if task_filter or exclude:
        raise OptionError(f"{folder}: a directory of images has no tasks or episodes to choose from")
    first = next(load_folder_obs(folder, 1))["images"]
    names = match_views(first, views) if isinstance(first, Mapping) else None
    return load_folder_obs(folder, n, views=names)
