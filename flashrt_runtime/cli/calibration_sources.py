"""Where `flashrt calibrate` takes its observations from: one door for bags, datasets and images."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any

from ..checkpoints.base import Checkpoint
from ..datasets import load_calibration_obs, load_folder_obs
from ..datasets.lerobot import LeRobotDataset
from ..datasets.sampling import Counted
from ..datasets.views import match_views, parse_views
from ..errors import DatasetError, FlashRTError, OptionError
from ..spec import DEFAULT_VIEWS

Observations = Iterator[dict[str, Any]]


class BagSourceError(FlashRTError, ValueError):
    """A bag that cannot be read as the robot's contract says (the message is flashrt_ros's)."""


@dataclass
class Source:
    """A source: read may be called again and then gives the same observations.

    views: how many the policy is to have. warnings: complete once the observations were read.
    """

    name: str
    views: int
    read: Callable[[], Observations]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SourceOptions:
    """Of the command line; `samples` includes those that are held out."""

    samples: int
    bag: Path | None = None
    dataset: Path | None = None
    images: Path | None = None
    robot: str | None = None
    prompt: str | None = None
    namespace: str = ""
    task: str | None = None
    exclude: Sequence[int] = ()
    view: Sequence[str] = ()
    state_key: str | None = None


def open_source(options: SourceOptions, checkpoint: Checkpoint) -> Source:
    """The source that was named. Raises OptionError, DatasetError or BagSourceError."""
    given = {"--bag": options.bag, "--dataset": options.dataset, "--images": options.images}
    named = [name for name, path in given.items() if path is not None]
    if len(named) != 1:
        raise OptionError(f"one of {', '.join(given)} is needed, got {' and '.join(named) or 'none'}")
    if options.bag is not None:
        return _bag(options, options.bag)
    if (options.task or options.exclude or options.state_key) and options.dataset is None:
        raise OptionError("--task, --exclude-episode and --state-key are for --dataset")
    views = checkpoint.views or DEFAULT_VIEWS
    if options.robot is not None:
        views = views[: len(_contract(options.robot).views)]
    if options.dataset is not None:
        return _dataset(options, options.dataset, views)
    assert options.images is not None
    return _folder(options, options.images, views)


def bag_observations(
    path: Path, robot: str, samples: int, prompt: str, namespace: str = "", warnings: list[str] | None = None
) -> Observations:
    """Observations of a rosbag2 bag, spread over its time, by the contract, synchroniser and ingest that
    serve the live topics.

    robot: a contract's name or file. Raises OptionError where flashrt_ros is not installed, BagSourceError
    for a bag or contract that does not do; what does not stop its use is added to `warnings`.
    """
    module = _ros("flashrt_ros.core.bag_source")
    contract = _contract(robot)
    ros_error: type[Exception] = _ros("flashrt_ros.core.errors").CoreError
    try:
        with module.BagSource(path, contract, samples=samples, namespace=namespace) as source:
            try:
                for seed, observation in enumerate(source.mappings(prompt)):
                    yield {**observation, "seed": seed}
            finally:
                if warnings is not None:
                    warnings[:] = [str(warning) for warning in source.warnings]
    except ros_error as error:
        raise BagSourceError(str(error)) from error


def _bag(options: SourceOptions, path: Path) -> Source:
    if options.robot is None:
        raise OptionError("--bag needs --robot: its contract says which topic is which view and joint")
    if not options.prompt:
        raise OptionError("--bag needs --prompt: a bag does not hold what the robot was told")
    robot, prompt = options.robot, options.prompt
    source = Source(f"bag:{path}", len(_contract(robot).views), lambda: iter(()))
    source.read = lambda: bag_observations(
        path, robot, options.samples, prompt, options.namespace, source.warnings
    )
    return source


def _dataset(options: SourceOptions, root: Path, views: Sequence[str]) -> Source:
    dataset = LeRobotDataset.open(root.expanduser(), options.state_key)
    cameras = _cameras(options, list(dataset.cameras), views)

    def read() -> Observations:
        found = load_calibration_obs(
            root, options.samples, options.task, options.exclude, views=cameras, state_key=options.state_key
        )
        return _told(found, options.prompt)

    return Source(f"dataset:{root}", len(cameras), read)


def _folder(options: SourceOptions, folder: Path, views: Sequence[str]) -> Source:
    first = next(islice(load_folder_obs(folder, 1), 1))["images"]
    named = isinstance(first, Mapping)
    cameras = _cameras(options, list(first), views) if named else None
    if cameras is None and (options.view or len(first) > len(views)):
        raise DatasetError(f"{folder}: images without names, {len(first)} of them: name them by view")
    count = len(first) if cameras is None else len(cameras)

    def read() -> Observations:
        return _told(load_folder_obs(folder, options.samples, views=cameras), options.prompt)

    return Source(f"images:{folder}", count, read)


def _told(observations: Observations, prompt: str | None) -> Observations:
    """With the prompt of the command line where an observation has none."""
    if not prompt:
        return observations
    told = ({"prompt": prompt, **observation} for observation in observations)
    return Counted(told, length_hint(observations, -1))


def _cameras(options: SourceOptions, cameras: list[str], views: Sequence[str]) -> dict[str, str]:
    """view -> camera: of the views that --view names, of all views of the robot, or of as many of the
    checkpoint's first views as have a camera.
    """
    named = parse_views(options.view)
    if named:
        return match_views(cameras, views[: max(len(named), 1)], named)
    if options.robot is not None:
        return match_views(cameras, views)
    for count in range(len(views), 1, -1):
        try:
            return match_views(cameras, views[:count])
        except DatasetError:
            continue
    return match_views(cameras, views[:1])


def _contract(robot: str) -> Any:
    errors = _ros("flashrt_ros.core.errors")
    try:
        return _ros("flashrt_ros.core.contract").load_contract(robot)
    except errors.ContractError as error:
        raise OptionError(f"--robot: {error}") from error


def _ros(module: str) -> Any:
    """A module of flashrt_ros: the runtime knows it by name only."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OptionError(
            f"--bag and --robot are read by the ROS package flashrt_ros, and {error.name or module} cannot "
            "be imported: build the workspace and source its setup script, or use --dataset or --images"
        ) from error
