"""Checkpoints and servers; without the extra [server] there is nothing to test here."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrt_runtime.loading import load_model
from flashrt_runtime.untrained import make_checkpoint

sys.path.append(str(Path(__file__).parent))  # the helpers beside the tests

if importlib.util.find_spec("fastapi") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from serving_support import Served, Shared, served_by_command, serving


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHRT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("served"), preset="demo_arm")


@pytest.fixture(scope="session")
def libero_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("libero"), preset="libero")


@pytest.fixture(scope="session")
def policy(checkpoint: Path) -> Iterator[Any]:
    """The same policy in this process: what every answer is compared with."""
    loaded = load_model(checkpoint, hardware="cpu")
    yield loaded
    loaded.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Starts servers in this process: serve(policy, **settings)."""
    with contextlib.ExitStack() as stack:
        yield lambda policy, **settings: stack.enter_context(serving(policy, **settings))


@pytest.fixture(scope="module")
def served(policy: Any) -> Iterator[Served]:
    """A server in this process with default limits."""
    with serving(Shared(policy)) as server:
        yield server


@pytest.fixture(scope="session")
def command_server(checkpoint: Path) -> Iterator[Served]:
    with served_by_command(checkpoint) as server:
        yield server
