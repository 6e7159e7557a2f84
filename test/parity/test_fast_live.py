"""LeRobot's and openpi's pi0-FAST and the published FAST processor, run now."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fast_cases import FAST_CASES, FAST_WIDE_CASES, FastCase
from parity_support import GOLDENS, ROOT
from test_fast import LOGITS, built, generate

import flashrt_runtime

PYTHON = ROOT / ".venv-parity" / "bin" / "python"
OPENPI = ROOT / ".venv-parity" / "openpi"
ORACLES = Path(__file__).resolve().parent / "oracles"
EOS = 1

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-parity: run `make parity-env`"),
]

# openpi never masks a view of this policy, and could not: its decode mask counts from the end of the prefix
OPENPI_CASES = [case for case in FAST_CASES if case.tied and not case.masked and not case.gap]
SAVED_CASES = FAST_CASES[4:8:3]


def oracle(script: str, out: Path, *arguments: str) -> Path:
    """Run an oracle in its environment; what it wrote lies in `out`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if script.startswith("openpi"):
        environment["PYTHONPATH"] = str(OPENPI)
    command = [str(PYTHON), str(ORACLES / script), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_goldens_still_come_out(tmp_path):
    made = np.load(oracle("lerobot_fast_oracle.py", tmp_path) / "lerobot_pi0fast.npz")
    stored = np.load(GOLDENS / "lerobot_pi0fast.npz")
    assert set(made.files) == set(stored.files)
    for name in made.files:
        np.testing.assert_allclose(made[name], stored[name], rtol=0, atol=LOGITS / 2)


@pytest.mark.parametrize("case", FAST_WIDE_CASES, ids=lambda case: case.name)
def test_published_widths_equal_lerobot(case, tmp_path):
    theirs = np.load(oracle("lerobot_fast_oracle.py", tmp_path, "--full", case.name) / f"{case.name}.npz")
    tokens, scores = generate(built(case), case)
    np.testing.assert_array_equal(tokens, theirs["tokens"])
    assert np.abs(scores - theirs["logits"]).max() <= LOGITS


@pytest.mark.parametrize("case", SAVED_CASES, ids=lambda case: case.name)
def test_opens_what_lerobot_saves(case, tmp_path):
    """Head and embedding are both in the file: where they differ, both are read."""
    oracle("lerobot_fast_oracle.py", tmp_path, "--full", "--save", case.name)
    policy = flashrt_runtime.load_model(
        tmp_path / case.name, config="pi0_fast", hardware="cpu", precision="fp32", num_views=case.views
    )
    try:
        assert policy.spec.family == "lerobot"
        assert policy._checkpoint.config.decode.tied_head is case.tied
        assert policy._checkpoint.rules.end_with_bos
        assert not policy._checkpoint.rules.lowercase
        tokens = policy.sample_tokens(**case.prompt(), max_tokens=case.max_tokens)
        np.testing.assert_array_equal(tokens, np.load(tmp_path / f"{case.name}.npz")["tokens"])
    finally:
        policy.close()


@pytest.fixture(scope="module")
def openpi(tmp_path_factory) -> Path:
    names = [case.name for case in OPENPI_CASES]
    return oracle("openpi_fast_oracle.py", tmp_path_factory.mktemp("openpi"), *names)


def our_tokens(case: FastCase, skip_position: bool) -> np.ndarray:
    """Ours from openpi's prompt, which no BOS follows, up to openpi's stop."""
    arrays = [torch.from_numpy(array.copy()) for array in case.prompt().values()]
    model = built(case, skip_position=skip_position)
    return model.sample_tokens(*arrays, case.max_tokens, stop=EOS).numpy()


@pytest.mark.parametrize("case", OPENPI_CASES, ids=lambda case: case.name)
def test_equals_openpi_with_its_skipped_position(case, openpi):
    theirs = np.load(openpi / f"{case.name}.npz")["tokens"]
    ours = our_tokens(case, skip_position=True)
    np.testing.assert_array_equal(ours, theirs[: len(ours)])


def test_without_the_skipped_position_it_would_not(openpi):
    """The setting matters: consecutive positions, LeRobot's way, give other tokens."""
    pairs = [
        (our_tokens(case, skip_position=False), np.load(openpi / f"{case.name}.npz")["tokens"])
        for case in OPENPI_CASES
    ]
    assert not all(np.array_equal(*pair) for pair in pairs)


def test_the_fast_processor_still_gives_what_is_stored(tmp_path):
    oracle("fast_processor_oracle.py", tmp_path)
    places = ROOT / "test" / "data" / "fast", tmp_path
    stored, made = (np.load(place / "expected.npz") for place in places)
    for name in stored.files:
        np.testing.assert_allclose(made[name], stored[name], rtol=0, atol=1e-9)
    configs = [json.loads((place / "processor_config.json").read_text()) for place in places]
    assert configs[0] == configs[1]
