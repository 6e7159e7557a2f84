"""`flashrt parity`: table, JSON, exit codes and errors."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from parity_cases import Case
from parity_support import write_checkpoint
from typer.testing import CliRunner

from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.cli.main import app
from flashrt_runtime.errors import ObservationError, OptionError, ParityError
from flashrt_runtime.parity import report

CASES = [Case("pi05", steps=4), Case("pi0", steps=4)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.policy)
def checkpoint(request, tmp_path_factory):
    """A reduced checkpoint directory."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(request.param, folder)
    return folder


def parity(checkpoint, *options):
    """Run the command; an error of ours is raised, as the entry point sees it."""
    result = CliRunner().invoke(app, ["parity", "--checkpoint", str(checkpoint), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_holds_against_the_reference(checkpoint):
    result = parity(checkpoint, "--against", "reference", "--views", "3", "--num-steps", "4")
    assert result.exit_code == 0, result.output
    for text in ("vision", "K, layer 3", "v at t = 0.25", "actions", "every bound holds"):
        assert text in result.output


def test_json_has_every_stage_and_number(checkpoint):
    result = parity(checkpoint, "--against", "reference", "--num-steps", "2", "--json")
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["failures"] == []
    assert [drift["stage"] for drift in report["drifts"]][-2:] == ["v at t = 0.5", "actions"]
    for drift in report["drifts"]:
        assert 0 < drift["max_abs"] < 1e-3
        assert 0 < drift["relative_l2"] < 1e-5
        assert drift["sign_flips"] == 0
        assert drift["cosine"] == pytest.approx(1)


def test_an_exceeded_bound_is_exit_code_1(checkpoint):
    result = parity(checkpoint, "--against", "reference", "--num-steps", "2", "--max-abs", "1e-12")
    assert result.exit_code == 1
    assert "exceeded: actions: max-abs" in result.output
    result = parity(checkpoint, "--against", "reference", "--num-steps", "2", "--relative-l2", "1e-12")
    assert result.exit_code == 1
    assert "exceeded: vision: relative L2" in result.output


def test_bf16_is_measured_as_bf16(checkpoint):
    options = ("--against", "reference", "--num-steps", "2", "--precision", "bf16", "--json")
    report = json.loads(parity(checkpoint, *options).stdout)
    assert report["precision"] == "bf16"
    assert 1e-4 < report["drifts"][-1]["relative_l2"] < 0.3


def test_inputs_from_a_file(checkpoint, tmp_path):
    inputs = CASES[0].inputs()
    np.savez(tmp_path / "inputs.npz", **inputs)
    common = ("--against", "reference", "--num-steps", "2", "--inputs")
    assert parity(checkpoint, *common, str(tmp_path / "inputs.npz")).exit_code == 0
    inputs.pop("noise")
    np.savez(tmp_path / "short.npz", **inputs)
    with pytest.raises(ObservationError, match=r"missing \['noise'\]"):
        parity(checkpoint, *common, str(tmp_path / "short.npz"))
    np.savez(tmp_path / "typed.npz", **inputs, noise=np.zeros((10, 32)))
    with pytest.raises(ObservationError, match="noise: expected float32, got float64"):
        parity(checkpoint, *common, str(tmp_path / "typed.npz"))


def test_inputs_that_do_not_fit(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "our_stages", lambda *_: pytest.fail("the model was built"))
    monkeypatch.setattr(report, "reference_stages", lambda *_: pytest.fail("the reference was run"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "cut.npz", **CASES[0].inputs())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:5000])
    for name in ("one.npy", "x.png", "empty.npz", "cut.npz"):
        with pytest.raises(ObservationError, match=rf"{name}: expected an \.npz file"):
            parity(checkpoint, "--against", "reference", "--inputs", str(tmp_path / name))
    rows = CASES[0].inputs()
    for field in ("tokens", "token_mask"):
        rows[field] = rows[field][None]
    np.savez(tmp_path / "rows.npz", **rows)
    with pytest.raises(ObservationError, match=r"expected tokens of shape \(L,\)"):
        parity(checkpoint, "--against", "reference", "--inputs", str(tmp_path / "rows.npz"))
    with pytest.raises(ObservationError, match=r"has room for \d+, got 500: shorten"):
        parity(checkpoint, "--against", "reference", "--tokens", "500")
    for steps in ("0", "-1", "101"):
        with pytest.raises(OptionError, match=rf"num_steps must be a .* from 1 to 100, got {steps}"):
            parity(checkpoint, "--against", "reference", "--num-steps", steps)


def test_as_many_tokens_as_there_is_room_for(checkpoint):
    with open_checkpoint(checkpoint) as opened:
        capacity = opened.config.prompt_capacity
    common = ("--against", "reference", "--num-steps", "1", "--tokens")
    assert parity(checkpoint, *common, str(capacity)).exit_code == 0
    with pytest.raises(ObservationError, match=f"room for {capacity}, got {capacity + 1}"):
        parity(checkpoint, *common, str(capacity + 1))


def test_unknown_yardstick(checkpoint):
    with pytest.raises(OptionError, match="expected lerobot or reference"):
        parity(checkpoint, "--against", "gr00t")


def test_missing_lerobot_names_the_command(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHRT_PARITY_PYTHON", str(tmp_path / "python"))
    with pytest.raises(ParityError, match="make parity-env"):
        parity(checkpoint, "--against", "lerobot")


def test_a_python_without_lerobot_says_so(checkpoint, monkeypatch):
    monkeypatch.setenv("FLASHRT_PARITY_PYTHON", sys.executable)
    with pytest.raises(ParityError, match="No module named 'lerobot'"):
        parity(checkpoint, "--against", "lerobot", "--num-steps", "1")
