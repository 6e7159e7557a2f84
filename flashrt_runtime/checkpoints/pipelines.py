"""LeRobot's processor pipelines on disk: a JSON list of steps, and a safetensors file per step that has
state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from .base import FeatureStats
from .json_fields import JsonObject
from .safetensors_store import read_header
from .stats import STATISTICS, feature_stats


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's steps by registered name: their configurations and their state files."""

    file: Path
    steps: dict[str, JsonObject]
    state_files: dict[str, Path]

    def step(self, name: str) -> JsonObject | None:
        """The configuration of a step, or None when the pipeline has no such step."""
        return self.steps.get(name)

    def stats(self, name: str, feature: str) -> FeatureStats:
        """A normaliser step's statistics of one feature; without a state file there are none.

        Raises CheckpointError for a damaged file or statistics that cannot be.
        """
        file = self.state_files.get(name)
        if file is None:
            return FeatureStats()
        read_header(file)
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged safetensors file: {error}") from error
        values = {
            statistic: tensors[f"{feature}.{statistic}"].double().numpy()
            for statistic in STATISTICS
            if f"{feature}.{statistic}" in tensors
        }
        return feature_stats(values, f"{file}: {feature}")


def read_pipeline(file: Path, known: Collection[str]) -> Pipeline | None:
    """The pipeline a file describes, None when there is no file.

    Raises CheckpointError for a step that is not in `known`, or whose state file is missing.
    """
    if not file.is_file():
        return None
    content = JsonObject.read(file)
    entries = content.values.get("steps")
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: steps is {type(entries).__name__}, expected a list")
    steps: dict[str, JsonObject] = {}
    state_files: dict[str, Path] = {}
    for index, entry in enumerate(entries):
        step = JsonObject(file, entry if isinstance(entry, dict) else {}, f"steps[{index}].")
        name = step.text("registry_name") or step.text("class") or "unnamed"
        if name not in known:
            raise CheckpointError(
                f"{file}: steps[{index}] is {name!r}, whose effect is unknown here; expected {sorted(known)}"
            )
        if name in steps and name != "device_processor":
            raise CheckpointError(f"{file}: two steps {name!r}")
        steps[name] = JsonObject(file, step.section("config"), f"steps[{index}].config.")
        state_file = step.text("state_file")
        if state_file is not None:
            state_files[name] = file.parent / state_file
            if not state_files[name].is_file():
                raise CheckpointError(
                    f"{file}: steps[{index}] {name!r} needs {state_file}, which is not there"
                )
    return Pipeline(file, steps, state_files)
