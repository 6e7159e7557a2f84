"""`flashrt calibrate` from every source, its report, and `flashrt info --calibration`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.synthetic_bag import write_bag
from flashrt_ros.core.contract import load_contract
from flashrt_runtime.cli import calibrate, calibration_sources
from flashrt_runtime.loading import load_model
from flashrt_runtime.quantization import artifact
from flashrt_runtime.untrained import make_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "datasets"))  # the helpers beside its tests

from lerobot_files import WRITERS

HOME = [0, -1.57, 1.57, -1.57, -1.57, 0, 0.02]
FAST = ("--num-steps", "1", "--hardware", "cpu")
JSON = (*FAST, "--json")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("arm") / "pi05", preset="demo_arm")


@pytest.fixture(scope="module")
def libero(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("libero") / "pi05", preset="libero")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve observations of the demo arm."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    entries = []
    for number in range(12):
        images = {"base_0_rgb": f"base{number}.png", "left_wrist_0_rgb": f"wrist{number}.png"}
        for file in images.values():
            cv2.imwrite(str(folder / file), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        entries.append({"images": images, "prompt": "wave", "state": HOME})
    (folder / "observations.json").write_text(json.dumps(entries))
    return folder


def test_images_with_report(flashrt, arm, pictures, tmp_path) -> None:
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "9", "--held-out", "3", *FAST)
    out, report = tmp_path / "scales.safetensors", tmp_path / "report"
    code, printed, err = flashrt("calibrate", *arguments, "--out", out, "--report", report, "--against-bf16")
    assert code == 0, err
    words = " ".join(printed.split())
    assert out.name in "".join(printed.split())  # long paths are folded
    for text in ("9, by mse, 33 projections", "worst of 3", "bf16 policy", "18 samples"):
        assert text in words
    text = (report / "report.md").read_text()
    for expected in ("9 observations calibrated on, 3 held out", "bf16 policy | 2 |", out.name):
        assert expected in text
    sizes = {file.name: cv2.imread(str(file)).shape for file in report.glob("*.png")}
    assert set(sizes) == {"scales.png", "errors.png", "contact_sheet.png"}
    assert sizes["contact_sheet.png"] == (2 * 114, 8 * 196, 3), "12 pairs of views in rows of 8"
    policy = load_model(arm, hardware="cpu", precision="fp8", num_steps=1, calibration=out)
    assert policy.calibrated
    policy.close()


def test_fewer_images_than_asked_for(flashrt, arm, pictures) -> None:
    """Of twelve observations one in nine, as for the default 64 + 8, would be one."""
    for prompt in ((), ("--prompt", "wave")):
        code, printed, err = flashrt("calibrate", "--checkpoint", arm, "--images", pictures, *prompt, *JSON)
        assert code == 0, err
        result = json.loads(printed)
        assert result["error_against_bf16_activations"]["samples"] == 2
        assert result["warnings"] == [
            "12 observations of the 64 + 8 that were asked for: 10 calibrated on, 2 held out"
        ]


def test_json_and_the_cache(flashrt, arm, pictures) -> None:
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "5", "--held-out", "2", *FAST)
    code, printed, err = flashrt("calibrate", *arguments, "--percentile", "99.9", "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert (result["samples"], result["estimator"], result["percentile"]) == (5, "percentile", 99.9)
    assert result["key"] in result["calibration"]
    error = result["error_against_bf16_activations"]
    assert error["samples"] == len(error["per_sample"]) == 2
    assert error["max_abs"] == max(row["max_abs"] for row in error["per_sample"]) > 0
    assert result["error_against_bf16_policy"] is None
    policy = load_model(arm, hardware="cpu", precision="fp8", num_steps=1)
    assert policy.calibrated, "load_model finds what was calibrated"
    policy.close()


def test_compensated_weights(flashrt, arm, pictures, tmp_path) -> None:
    """In force after a load with the calibration; `info` says when their file was left behind."""
    out = tmp_path / "scales.safetensors"
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "5", "--held-out", "1", *FAST)
    code, printed, err = flashrt("calibrate", *arguments, "--weights", "compensated", "--out", out, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert result["weights"] == "compensated"
    (weights,) = tmp_path.glob("scales.*.weights.safetensors")
    policy = load_model(arm, hardware="cpu", precision="fp8", num_steps=1, calibration=out)
    assert policy.rounding == "compensated"
    policy.close()
    told = ("info", "--checkpoint", arm, "--calibration", out, "--json")
    assert json.loads(flashrt(*told)[1])["calibration"]["weights"] == f"compensated, {weights.name}"
    gain = result["rounding"]
    assert gain["error_compensated"] < gain["error_nearest"]
    assert 0 <= gain["left_nearest"] < gain["projections"]
    code, _, err = flashrt("calibrate", *arguments, "--out", out)
    assert code == 2, "which weights, where the file has compensated ones, is not guessed"
    for text in ("has compensated weights", weights.name, "--weights compensated", "--weights nearest"):
        assert text in " ".join(err.split())
    assert flashrt(*told)[0] == 0
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    code, printed, err = flashrt(*told)
    assert code == 1
    assert "damaged" in " ".join(err.split())
    assert "NOT USABLE" in json.loads(printed)["calibration"]["weights"]
    weights.unlink()
    code, printed, err = flashrt(*told)
    assert code == 1
    assert "not there: put" in " ".join(err.split())
    assert "MISSING" in json.loads(printed)["calibration"]["weights"]
    code, printed, err = flashrt("calibrate", *arguments, "--out", out, "--weights", "nearest")
    assert code == 0, err
    assert "rounded to nearest" in printed
    report = ("--weights", "compensated", "--report", tmp_path / "report")
    code, printed, err = flashrt("calibrate", *arguments, *report)
    assert code == 0, err
    for text in (" ".join(printed.split()), (tmp_path / "report" / "report.md").read_text()):
        assert "compensated: error behind a projection" in text
        assert "projections left to nearest" in text
    code, _, err = flashrt("calibrate", *arguments)
    assert code == 2, "the cache's too"
    assert "--weights nearest" in " ".join(err.split())
    code, _, err = flashrt("calibrate", *arguments, "--weights", "best")
    assert code == 2
    assert "unknown rounding of weights 'best': expected nearest or compensated" in " ".join(err.split())


def test_an_earlier_calibration_is_no_part_of_a_new_one(flashrt, arm, pictures) -> None:
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "4", "--held-out", "0", *JSON)
    file = Path(json.loads(flashrt("calibrate", *arguments)[1])["calibration"])
    first = artifact.read(file).scales
    file.write_bytes(b"damaged")
    assert flashrt("calibrate", *arguments)[0] == 0
    assert artifact.read(file).scales == first


@pytest.mark.parametrize("layout", list(WRITERS))
def test_datasets(flashrt, libero, tmp_path, layout) -> None:
    root = WRITERS[layout](tmp_path / "dataset")
    arguments = ("--checkpoint", libero, "--dataset", root, "--samples", "3", "--held-out", "1", *JSON)
    views = () if layout == "v2 images" else ("--view", "base_0_rgb=top", "--view", "left_wrist_0_rgb=wrist")
    chosen = (*views, "--task", "drawer", "--exclude-episode", "1")
    code, printed, err = flashrt("calibrate", *arguments, *chosen)
    assert code == 0, err
    result = json.loads(printed)
    assert (result["samples"], result["source"]) == (3, f"dataset:{root}")
    if views:
        code, _, err = flashrt("calibrate", *arguments)
        assert code == 2
        assert "no camera for the views base_0_rgb among top, wrist" in err


def test_a_bag(flashrt, arm, tmp_path) -> None:
    bag = write_bag(tmp_path / "bag", load_contract("demo_arm"), 2.0)
    of_robot = ("--checkpoint", arm, "--bag", bag, "--robot", "demo_arm")
    arguments = (*of_robot, "--samples", "4", "--held-out", "1")
    code, printed, err = flashrt("calibrate", *arguments, "--prompt", "wave", *JSON, "--against-bf16")
    assert code == 0, err
    result = json.loads(printed)
    assert (result["samples"], result["source"]) == (4, f"bag:{bag}")
    assert result["error_against_bf16_policy"]["samples"] == 1
    code, _, err = flashrt("calibrate", *arguments, *FAST)
    assert code == 2
    assert "--bag needs --prompt" in err
    code, _, err = flashrt("calibrate", "--checkpoint", arm, "--bag", bag, *FAST)
    assert code == 2
    assert "--bag needs --robot" in err
    with pytest.raises(calibration_sources.BagSourceError, match="no such bag"):
        list(calibration_sources.bag_observations(tmp_path / "absent", "demo_arm", 4, "wave"))


def test_bags_without_flashrt_ros(flashrt, arm, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "flashrt_ros.core.errors", None)
    arguments = ("--checkpoint", arm, "--bag", tmp_path, "--robot", "demo_arm", "--prompt", "x")
    code, _, err = flashrt("calibrate", *arguments)
    assert code == 2
    assert "are read by the ROS package flashrt_ros" in err
    assert "use --dataset or --images" in err


def test_the_views_are_the_robots(flashrt, arm, pictures) -> None:
    """The key depends on the views: --robot makes them those that the node loads."""
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "2", "--held-out", "0", *JSON)
    with_robot = json.loads(flashrt("calibrate", *arguments, "--robot", "demo_arm")[1])["key"]
    assert json.loads(flashrt("calibrate", *arguments)[1])["key"] == with_robot
    one = json.loads(flashrt("calibrate", *arguments, "--view", "base_0_rgb=base_0_rgb")[1])["key"]
    assert one != with_robot


MISTAKES = {
    "no source": ((), "one of --bag, --dataset, --images is needed, got none"),
    "two": (("--images", "a", "--dataset", "b"), "got --dataset and --images"),
    "filter": (("--images", "a", "--task", "x"), "are for --dataset"),
    "no folder": (("--images", "/nowhere"), "no such directory"),
    "no dataset": (("--dataset", "/nowhere"), "not a LeRobot dataset"),
    "robot": (("--images", "a", "--robot", "robby"), "no robot contract of this name"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_line(flashrt, arm, name) -> None:
    arguments, message = MISTAKES[name]
    code, out, err = flashrt("calibrate", "--checkpoint", arm, *arguments, *FAST)
    assert code == 2
    assert message in err
    assert out == ""


def test_a_failure_leaves_the_earlier_file(flashrt, arm, pictures, tmp_path) -> None:
    out = tmp_path / "scales.safetensors"
    arguments = ("--checkpoint", arm, "--samples", "4", "--held-out", "0", *FAST, "--out", out)
    assert flashrt("calibrate", *arguments, "--images", pictures)[0] == 0
    before = out.read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    entries = json.loads((pictures / "observations.json").read_text())
    for file in pictures.glob("*.png"):
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / entries[9]["images"]["base_0_rgb"]).write_bytes(b"no image")
    (broken / "observations.json").write_text(json.dumps(entries[8:]))
    code, _, err = flashrt("calibrate", *arguments, "--images", broken)
    assert code == 2
    assert "base9.png is not an image" in err
    assert out.read_bytes() == before


def test_a_bad_place_is_told_before_anything_is_loaded(flashrt, arm, pictures, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed" and access(path, mode))
    monkeypatch.setattr(calibrate, "open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    weights = (arm / "model.safetensors").read_bytes()
    arguments = ("--checkpoint", arm, "--images", pictures, "--samples", "2")
    for options, message in (
        (("--out", arm / "model.safetensors"), "holds something else than a whole calibration"),
        (("--out", tmp_path), "expected the name of a file to write"),
        (("--out", tmp_path / "closed" / "new" / "file"), "closed is not writable; name another file"),
        (("--report", tmp_path / "file"), "no report can be written there"),
    ):
        code, out, err = flashrt("calibrate", *arguments, *options, *FAST)
        assert (code, out) == (2, "")
        assert message in err
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "closed"))
    assert "closed is not writable" in flashrt("calibrate", *arguments, *FAST)[2]
    assert (arm / "model.safetensors").read_bytes() == weights


def test_info_says_whether_a_calibration_belongs(flashrt, arm, libero, pictures, tmp_path) -> None:
    out = tmp_path / "scales.safetensors"
    arguments = ("--samples", "3", "--held-out", "1", *FAST, "--out", out)
    assert flashrt("calibrate", "--checkpoint", arm, "--images", pictures, *arguments)[0] == 0
    code, printed, err = flashrt("info", "--checkpoint", arm, "--calibration", out)
    assert code == 0, err
    assert f"images:{pictures.name}"[:7] in printed
    code, printed, err = flashrt("info", "--checkpoint", arm, "--calibration", out, "--json")
    told = json.loads(printed)["calibration"]
    assert (code, told["belongs"], told["samples"], told["differences"]) == (0, True, 3, [])
    code, printed, err = flashrt("info", "--checkpoint", libero, "--calibration", out)
    assert code == 1
    mine, theirs = told["checkpoint digest"], told["file's checkpoint digest"]
    assert mine == theirs
    assert f"checkpoint of the file is {theirs}, of this policy" in err
    assert "normalization of the file is" in err
    for content, message in ((b"", "damaged"), (out.read_bytes()[:-9], "damaged")):
        out.write_bytes(content)
        code, _, err = flashrt("info", "--checkpoint", arm, "--calibration", out)
        assert code == 2
        assert message in err
    code, _, err = flashrt("info", "--checkpoint", arm, "--calibration", tmp_path / "nowhere")
    assert code == 2
    assert "no calibration there" in err
