"""Hub ids. The hub is a stand-in: tests have no network, and the library is optional."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrt_runtime import load_model
from flashrt_runtime.checkpoints import hub, open_checkpoint
from flashrt_runtime.errors import CheckpointNotFoundError


@pytest.fixture
def stand_in(monkeypatch, tiny):
    """A hub that has one repository."""
    asked = []
    absent = RuntimeError("404 Client Error\nmore lines")
    absent.response = object()  # type: ignore[attr-defined]  # as that of the hub's own types of errors
    errors = {"someone/else": absent, "far/away": ConnectionError("no route")}

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name != "lerobot/pi05_base":
            raise errors.get(name, RuntimeError("odd\nmore lines"))
        assert "*.safetensors" in allow_patterns
        return str(tiny)

    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_an_id_is_fetched(stand_in, tiny):
    with open_checkpoint("lerobot/pi05_base") as checkpoint:
        assert checkpoint.path == tiny
    assert stand_in == ["lerobot/pi05_base"]


@pytest.mark.parametrize(("name", "said"), [
    ("someone/else", "the hub answered: 404 Client Error"),
    ("far/away", "the hub cannot be reached: no route"),
    ("something/odd", "it could not be fetched: odd"),
])
def test_both_readings_are_named(stand_in, name, said):
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(name)
    where = f"{name}: no such checkpoint directory (in {Path.cwd()})"
    assert str(caught.value) == f"{where}, and as the hub id {name}: {said}"
    assert stand_in == [name]


def test_the_library_s_own_errors(monkeypatch):
    """The real library, which may not go online, and does not try."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFoundError, match=r"hub id no-one/nothing: the hub cannot be reached"):
        open_checkpoint("no-one/nothing")


@pytest.mark.parametrize("open_it", [open_checkpoint, partial(load_model, hardware="cpu")])
@pytest.mark.parametrize(
    "path",
    [
        "/no/such/dir", "/dir", "../pi05", "./lerobot/pi05_base", "./pi05", "~/pi05_base", "a/b/c", "pi05",
        "a//b", "lerobot/pi05_base/", "pi05/", "lerobot/../pi05", "lerobot/.pi05", Path("lerobot/pi05_base"),
    ],
)
def test_paths_are_no_ids(stand_in, path, open_it):
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint directory"):
        open_it(path)
    assert stand_in == []


def test_the_home_directory(stand_in, copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    with open_checkpoint(f"~/{copy.name}") as checkpoint:
        assert checkpoint.path == copy


def test_a_directory_of_that_name_comes_first(stand_in, copy, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    with open_checkpoint(f"{copy.parent.name}/checkpoint"):
        assert stand_in == []


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFoundError, match=r"no such checkpoint dir.*install huggingface_hub"):
        open_checkpoint("lerobot/pi05_base")
