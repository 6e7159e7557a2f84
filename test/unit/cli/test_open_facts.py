"""What a checkpoint's files leave open can be given to every command that opens one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.synthetic_bag import write_bag
from flashrt_ros.core.contract import load_contract
from flashrt_runtime import loading
from flashrt_runtime.checkpoints.open_facts import parse_delta_actions
from flashrt_runtime.cli import calibrate, info
from flashrt_runtime.errors import OptionError
from flashrt_runtime.parity import report
from flashrt_runtime.untrained import make_checkpoint

HOME = "0,-1.57,1.57,-1.57,-1.57,0,0.02"
ROBOT = ("--asset-id", "lab")
HORIZON = ("--action-horizon", "20")
DELTA = ("--delta-actions", "true,true,true,true,true,true,false")
RULES = ("--rule", "resize=bilinear_float", "--rule", "std_eps=0.5")


@pytest.fixture(scope="module")
def vague(tmp_path_factory) -> Path:
    """As openpi's own training leaves a fine-tune: no horizon, and here the statistics of two robots."""
    path = make_checkpoint(tmp_path_factory.mktemp("vague") / "pi05", preset="demo_arm")
    config = json.loads((path / "config.json").read_text())
    del config["action_horizon"]
    (path / "config.json").write_text(json.dumps(config))
    (own,) = (path / "assets").iterdir()
    shutil.copytree(own, path / "assets" / "lab")
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "view.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return file


def test_the_error_names_the_option(flashrt, vague, picture) -> None:
    images = ("--image", picture, "--image", picture)
    arguments = ("predict", "--checkpoint", vague, *images, "--prompt", "wave", "--state", HOME, "--json")
    steps = ("--num-steps", "1", "--seed", "3")
    code, _, err = flashrt(*arguments)
    assert code == 2
    assert "choose one by asset_id= in Python, --asset-id on the command line, parameter asset_id of" in err
    code, _, err = flashrt(*arguments, *ROBOT)
    assert code == 2
    assert "Pass action_horizon= in Python, --action-horizon on the command line, parameter action_" in err
    absolute, offsets = (
        np.array(json.loads(flashrt(*arguments, *steps, *ROBOT, *HORIZON, *more)[1])["actions"])
        for more in ((), DELTA)
    )
    assert absolute.shape == (20, 7)
    state = [float(value) for value in HOME.split(",")]
    np.testing.assert_allclose(offsets - absolute, np.tile([*state[:6], 0], (20, 1)), atol=1e-5)


@pytest.mark.parametrize("command", ["predict", "calibrate", "bench", "serve", "replay", "parity", "info"])
def test_every_command_takes_them(flashrt, command, vague, picture, tmp_path, monkeypatch) -> None:
    """With arguments that lead it to the checkpoint, where what it hands on is looked at."""
    seen = []

    def opened(*_: object, **options: object) -> None:
        seen.append(options)
        raise OptionError("opened")

    monkeypatch.setattr(loading, "load_model", opened)
    for module in (calibrate, info, report):
        monkeypatch.setattr(module, "open_checkpoint", opened)
    arguments = {
        "predict": ("--image", picture, "--prompt", "wave"),
        "calibrate": ("--images", picture.parent),
        "serve": ("--port", "0"),
        "parity": ("--against", "reference"),
    }
    if command == "replay":
        bag = write_bag(tmp_path / "bag", load_contract("demo_arm"), 1.0)
        arguments["replay"] = (bag, "--robot", "demo_arm", "--prompt", "wave", "--out", tmp_path)
    facts = (*ROBOT, *HORIZON, *DELTA, *RULES)
    code, _, err = flashrt(command, "--checkpoint", vague, *arguments.get(command, ()), *facts)
    assert (code, err) == (2, "flashrt: opened\n")
    assert seen[0]["asset_id"] == "lab"
    assert seen[0]["action_horizon"] == 20
    assert seen[0]["delta_actions"] == (True,) * 6 + (False,)
    assert seen[0]["rules"] == {"resize": "bilinear_float", "std_eps": 0.5}


@pytest.mark.parametrize("text", ["", "1,0", "true,,false", "true false"])
def test_flags_are_words(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected true .* or false for each action, such as"):
        parse_delta_actions(text)
