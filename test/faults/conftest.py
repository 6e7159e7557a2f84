"""One robot and one node for most rows of the fault matrix; see fault_bench.

`make faults` runs them all and rewrites the table of docs/faults.md.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "ros")]

from fault_table import ROWS, Outcome, write  # noqa: E402

_outcomes = pytest.StashKey[dict[int, Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_outcomes] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker("ros")
            if item.path.name.endswith("_faults.py"):
                item.add_marker("slow")
                item.add_marker("faults")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if HERE not in collection_path.parents or not collection_path.name.startswith("test_"):
        return None
    try:
        there = all(importlib.util.find_spec(name) for name in ("rclpy", "flashrt_ros.msg"))
    except ModuleNotFoundError:
        there = False
    return None if there else True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The table, where it is asked for and every row has passed."""
    target, outcomes = os.environ.get("FLASHRT_FAULT_TABLE"), session.config.stash[_outcomes]
    if target and len(outcomes) == ROWS:
        write(Path(target), outcomes)
        print(f"\n{target}: table of {ROWS} rows written")


@pytest.fixture
def passed(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """passed(Outcome(…)) is the last line of a row's test."""
    return lambda outcome: request.config.stash[_outcomes].update({outcome.number: outcome})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Pi0.5 checkpoint for the demo arm."""
    import subprocess

    path = tmp_path_factory.mktemp("checkpoint") / "pi05"
    command = ["flashrt", "make-checkpoint", "--size", "tiny", "--preset", "demo_arm", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def contract_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo arm, whose base camera may be older: else a late camera is stale before it is skewed."""
    data = yaml.safe_load((ROOT / "config/robots/demo_arm.yaml").read_text())
    data["streams"]["base_camera"]["max_age"] = 1.0
    path = tmp_path_factory.mktemp("robot") / "demo_arm.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="session")
def running_bench(
    contract_path: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    from fault_bench import FaultBench
    from ros_rig import Rig

    rig = Rig()
    try:
        yield FaultBench(rig, contract_path, checkpoint, tmp_path_factory.mktemp("faults"))
    finally:
        rig.close()


@pytest.fixture
def bench(running_bench: Any) -> Iterator[Any]:
    """The bench with the arm moving; whatever a failed row left behind is cleared away."""
    running_bench.ready()
    yield running_bench
    running_bench.heal()
