"""The flashrt command: results on stdout, errors as one line on stderr with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from flashrt_runtime import options
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.cli import info
from flashrt_runtime.cli.predict import BARS, sparkline
from flashrt_runtime.config import GEMMA_300M
from flashrt_runtime.engine.gpu import Gpu
from flashrt_runtime.loading import load_model
from flashrt_runtime.untrained import make_checkpoint

HOME = "0,-1.57,1.57,-1.57,-1.57,0,0.02"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli"), preset="demo_arm")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Two PNG files and their RGB pixels' seed."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / "base.png", folder / "wrist.png"]
    for index, file in enumerate(files):
        cv2.imwrite(str(file), picture(index)[..., ::-1])
    return files


def picture(index):
    return np.random.default_rng(index).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "flashrt_runtime.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("info", "predict", "make-checkpoint", "convert", "download-tokenizer", "parity"):
        assert command in done.stdout


def test_a_fault_of_the_program_is_no_exceeded_bound(flashrt, checkpoint, monkeypatch):
    monkeypatch.setattr(info, "describe", lambda _: 1 / 0)
    code, out, err = flashrt("info", "--checkpoint", checkpoint)
    assert (code, out) == (3, "")
    assert "ZeroDivisionError" in err
    assert "fault of flashrt" in err


def test_info(flashrt, checkpoint):
    code, out, err = flashrt("info", "--checkpoint", checkpoint)
    assert code == 0, err
    for text in (
        "openpi-pytorch",
        "pi05",
        "base_0_rgb",
        "antialias_uint8",
        "quantile_eps",
        "norm_stats.json",
    ):
        assert text in out


def test_info_as_json_is_only_json(flashrt, checkpoint):
    code, out, _ = flashrt("info", "--checkpoint", checkpoint, "--json", "--verify")
    content = json.loads(out)
    assert code == 0
    assert content["checkpoint"]["policy"] == "pi05"
    assert content["checkpoint"]["trained"] is False
    assert content["dimensions"]["prefix"]["num_heads"] == 8
    assert content["rules"]["state_in_prompt"] is True
    assert len(content["normalisation"]["state"]["q01"]) == 7
    assert content["interface"]["horizon"] == 50


def test_info_says_what_would_run_here(flashrt, checkpoint, monkeypatch):
    monkeypatch.setattr(Gpu, "of", lambda _: None)
    code, out, _ = flashrt("info", "--checkpoint", checkpoint, "--json")
    assert code == 0
    here = json.loads(out)["this machine"]
    assert (here["gpu"], here["action expert"]) == (None, "the model's own, slower loop (no GPU)")
    thor = Gpu("NVIDIA Thor", (11, 0), 20, 228 << 10)
    monkeypatch.setattr(Gpu, "of", lambda _: thor)
    monkeypatch.setattr(options, "default_precision", lambda _: "fp8")
    with open_checkpoint(checkpoint) as opened:
        here = info.this_machine(replace(opened.config, expert=GEMMA_300M))
    assert here["gpu"] == "NVIDIA Thor"
    assert here["action expert"] == (
        "a chain of kernels (not by one persistent kernel: it needs 128 multiprocessors, not 20)"
    )


@pytest.mark.slow
def test_pi0fast_from_making_to_actions(flashrt, pictures, tmp_path):
    made = str(tmp_path / "fast")
    code, _, err = flashrt("make-checkpoint", "--policy", "pi0fast", "--preset", "demo_arm", "--out", made)
    assert code == 0, err
    code, out, _ = flashrt("info", "--checkpoint", made, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["interface"]["denoise steps"] is None
    assert content["interface"]["action tokens"] == f"{made}/fast"
    assert content["dimensions"]["expert"] is None
    images = [argument for picture in pictures for argument in ("--image", str(picture))]
    state = ("--state", "0,-1.57,1.57,-1.57,-1.57,0,0.02")
    code, out, err = flashrt("predict", "--checkpoint", made, *images, "--prompt", "wave", *state, "--json")
    assert code == 0, err
    assert np.shape(json.loads(out)["actions"]) == (50, 7)


def test_info_with_rules(flashrt, checkpoint):
    arguments = ("info", "--checkpoint", checkpoint, "--json")
    overrides = (
        "--rule",
        "resize=bilinear_float",
        "--rule",
        "state_in_prompt=false",
        "--rule",
        "std_eps=0.5",
    )
    rules = json.loads(flashrt(*arguments, *overrides)[1])["rules"]
    assert (rules["resize"], rules["state_in_prompt"], rules["std_eps"]) == ("bilinear_float", False, 0.5)


def predict(checkpoint, pictures, *more):
    images = [part for file in pictures for part in ("--image", file)]
    return (
        "predict",
        "--checkpoint",
        checkpoint,
        *images,
        "--prompt",
        "pick up the block",
        "--seed",
        3,
        *more,
    )


def test_predict_gives_what_the_api_gives(flashrt, checkpoint, pictures, tmp_path):
    out_file = tmp_path / "actions.npy"
    code, out, err = flashrt(*predict(checkpoint, pictures, "--state", HOME, "--json", "--out", out_file))
    assert code == 0, err
    content = json.loads(out)
    policy = load_model(checkpoint, hardware="auto")
    state = np.array([float(value) for value in HOME.split(",")], np.float32)
    expected = policy.predict([picture(0), picture(1)], "pick up the block", state, seed=3)
    policy.close()
    np.testing.assert_array_equal(np.load(out_file), expected)
    np.testing.assert_allclose(content["actions"], expected, rtol=1e-6)
    assert content["names"][0] == "shoulder_pan"


def test_predict_by_view_name(flashrt, checkpoint, pictures):
    plain = json.loads(flashrt(*predict(checkpoint, pictures, "--state", HOME, "--json"))[1])
    named = [f"left_wrist_0_rgb={pictures[1]}", f"base_0_rgb={pictures[0]}"]
    swapped = json.loads(flashrt(*predict(checkpoint, named, "--state", HOME, "--json"))[1])
    assert swapped["actions"] == plain["actions"]


def test_predict_prints_a_table_and_draws_a_plot(flashrt, checkpoint, pictures, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "chunk.png"
    code, out, err = flashrt(*predict(checkpoint, pictures, "--state", HOME, "--plot", plot))
    assert code == 0, err
    assert "wrist_3" in out
    assert "50 actions at 50 Hz" in out
    assert cv2.imread(str(plot)).std() > 5


def test_sparkline_spans_its_own_range():
    assert sparkline(np.array([0.0, 0.5, 1.0], np.float32)) == BARS[0] + BARS[4] + BARS[-1]
    assert sparkline(np.full(3, 7.0, np.float32)) == BARS[0] * 3
    assert len(sparkline(np.arange(100, dtype=np.float32), 20)) == 20


def test_make_checkpoint(flashrt, tmp_path):
    code, out, _ = flashrt("make-checkpoint", "--out", tmp_path / "new", "--preset", "libero", "--json")
    assert code == 0
    assert set(json.loads(out)["files"]) == {
        "model.safetensors",
        "config.json",
        "tokenizer.model",
        "assets/libero/norm_stats.json",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "--checkpoint", "nowhere"), "nowhere: no such checkpoint directory"),
        (
            ("info", "--checkpoint", "{checkpoint}", "--rule", "eps=1"),
            "expected name=value with a name of family",
        ),
        (("info", "--checkpoint", "{checkpoint}", "--rule", "resize"), "expected name=value"),
        (("info", "--checkpoint", "{checkpoint}", "--rule", "std_eps=small"), "expected a float"),
        (("info", "--checkpoint", "{checkpoint}", "--framework", "jax"), 'use framework="torch"'),
        (("make-checkpoint", "--out", "x", "--size", "giant"), "unknown size 'giant'"),
        (("predict", "--image", "missing.png"), "missing.png: no such file"),
        (("predict", "--image", "{checkpoint}/config.json"), "config.json: not an image"),
        (("predict", "--image", "{picture}"), "this policy sees the robot's state"),
        (("predict", "--image", "{picture}", "--state", "1,two"), "could not convert string to float: 'two'"),
        (("predict", "--image", "{picture}", "--state", "1,2"), "expected shape (7,), got (2,)"),
        (
            ("predict", "--image", "{picture}", "--image", "base_0_rgb={picture}"),
            "name the view of every image",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flashrt, checkpoint, pictures, arguments, message):
    filled = [part.format(checkpoint=checkpoint, picture=pictures[0]) for part in arguments]
    if filled[0] == "predict":
        filled += ["--checkpoint", checkpoint, "--prompt", "pick"]
    code, out, err = flashrt(*filled)
    assert code == 2
    assert out == ""
    assert err.startswith("flashrt: ")
    assert message in err
    assert err.count("\n") == 1


def test_options_that_do_not_exist(flashrt):
    code, _, err = flashrt("info", "--chekpoint", "x")
    assert code == 2
    assert "--chekpoint" in err
