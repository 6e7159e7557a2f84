"""Hub ids. The hub is a stand-in: tests have no network, and the library is optional."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from flashrt_runtime.checkpoints import hub, open_checkpoint
from flashrt_runtime.errors import CheckpointNotFoundError


@pytest.fixture
def stand_in(monkeypatch, tiny):
    """A hub that has one repository."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name != "lerobot/pi05_base":
            raise RuntimeError("404 Client Error\nmore lines")
        assert "*.safetensors" in allow_patterns
        return str(tiny)

    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_an_id_is_fetched(stand_in, tiny):
    with open_checkpoint("lerobot/pi05_base") as checkpoint:
        assert checkpoint.path == tiny
    assert stand_in == ["lerobot/pi05_base"]


def test_what_the_hub_does_not_have(stand_in):
    with pytest.raises(
        CheckpointNotFoundError, match=r"someone/else: no such directory, and the hub.*404"
    ) as caught:
        open_checkpoint("someone/else")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/dir", "../pi05", "a/b/c", "pi05"])
def test_paths_are_no_ids(stand_in, path):
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint directory"):
        open_checkpoint(path)
    assert stand_in == []


def test_a_directory_of_that_name_comes_first(stand_in, copy, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    with open_checkpoint(f"{copy.parent.name}/checkpoint"):
        assert stand_in == []


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint directory"):
        open_checkpoint("lerobot/pi05_base")
