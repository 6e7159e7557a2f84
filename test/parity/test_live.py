"""LeRobot and openpi, run now: the goldens still come out, and the published widths agree."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from parity_cases import CASES, SAVED_CASES, WIDE_CASES, Case
from parity_support import (
    MAX_ABS,
    ROOT,
    TorchWeights,
    check_actions,
    config_of,
    golden_of,
    goldens,
    relative_l2,
    run_ours,
    write_checkpoint,
)

import flashrt_runtime
from flashrt_runtime import models
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.options import resolve_target
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.drift import Gates, compare
from flashrt_runtime.parity.reference import ReferencePolicy
from flashrt_runtime.parity.report import drift_report
from flashrt_runtime.parity.stages import Inputs, Stages

PYTHON = ROOT / ".venv-parity" / "bin" / "python"
OPENPI = ROOT / ".venv-parity" / "openpi"
ORACLES = Path(__file__).resolve().parent / "oracles"

pytestmark = [
    pytest.mark.parity,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-parity: run `make parity-env`"),
]

OPENPI_CASES = CASES[3::5]


def oracle(script: str, out: Path, names: list[str], *options: str) -> None:
    """Run an oracle in its environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if script == "openpi_oracle.py":
        environment["PYTHONPATH"] = str(OPENPI)
    command = [str(PYTHON), str(ORACLES / script), "--out", str(out), *options, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def stages_in(folder: Path, case: Case) -> Stages:
    """What an oracle wrote for a case."""
    with np.load(folder / f"{case.name}.npz") as arrays:
        return Stages.from_arrays(dict(arrays))


def gates(case: Case) -> Gates:
    """The bounds of a live comparison in fp32."""
    return Gates(MAX_ABS[case.policy], None, 0, 1e-5)


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory) -> Path:
    """Whole stages of LeRobot on the wide cases."""
    out = tmp_path_factory.mktemp("lerobot")
    oracle("lerobot_oracle.py", out, [case.name for case in WIDE_CASES], "--full")
    return out


@pytest.fixture(scope="module")
def openpi(tmp_path_factory) -> Path:
    """Whole stages of openpi on some tiny cases and on the wide ones."""
    out = tmp_path_factory.mktemp("openpi")
    oracle("openpi_oracle.py", out, [case.name for case in (*OPENPI_CASES, *WIDE_CASES)])
    return out


@pytest.fixture(scope="module")
def wide() -> dict[str, Stages]:
    """Our stages on the wide cases, by name."""
    return {case.name: our_stages(case) for case in WIDE_CASES}


def our_stages(case: Case) -> Stages:
    """Our model filled straight from the formula."""
    target = resolve_target("cpu", "fp32")
    model = models.build(config_of(case), case.views, target.dtype)
    load_weights(model, config_of(case), TorchWeights(case.weights()), target.device)
    model.prepare(target.device)
    return capture(model, Inputs(**case.inputs()))


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_the_goldens_still_come_out(policy, tmp_path):
    mine = [case for case in CASES if case.policy == policy]
    oracle("lerobot_oracle.py", tmp_path, [case.name for case in mine])
    with np.load(tmp_path / f"lerobot_{policy}.npz") as made:
        assert set(made.files) == set(goldens(policy))
        for case in mine:
            for name, stored in golden_of(case).items():
                distance = relative_l2(made[f"{case.name}/{name}"], stored)
                assert distance <= 5e-6, f"{case.name}/{name}: relative L2 {distance:.2e}"


@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_published_widths_equal_lerobot(case, lerobot, wide):
    theirs = stages_in(lerobot, case)
    assert gates(case).failures(compare(wide[case.name], theirs)) == []
    check_actions(case, wide[case.name].actions, theirs.actions)


@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_published_widths_equal_openpi(case, openpi, wide):
    assert gates(case).failures(compare(wide[case.name], stages_in(openpi, case))) == []


@pytest.mark.parametrize("case", WIDE_CASES, ids=lambda case: case.name)
def test_published_widths_equal_the_reference(case, wide):
    reference = ReferencePolicy(config_of(case), case.weights()).run(Inputs(**case.inputs()))
    bounds = Gates(actions_relative_l2=2e-6, relative_l2=1e-5)
    assert bounds.failures(compare(wide[case.name], reference)) == []


@pytest.mark.parametrize("case", OPENPI_CASES, ids=lambda case: case.name)
def test_equals_openpi(case, openpi, tmp_path):
    """By the rules that openpi's layout has by itself, its way of counting the flow's time among them."""
    ours = run_ours(case, tmp_path, accumulate_time=True).stages
    theirs = stages_in(openpi, case)
    assert gates(case).failures(compare(ours, theirs)) == []
    assert relative_l2(ours.actions, theirs.actions) <= 3e-6


@pytest.mark.parametrize("case", OPENPI_CASES, ids=lambda case: case.name)
def test_the_reference_accumulates_time_as_openpi_does(case, openpi):
    settings = {"accumulate_time": True}
    reference = ReferencePolicy(config_of(case), case.weights(), **settings).run(Inputs(**case.inputs()))
    assert relative_l2(stages_in(openpi, case).actions, reference.actions) <= 3e-6


@pytest.mark.parametrize("case", SAVED_CASES, ids=lambda case: case.policy)
def test_opens_what_lerobot_saves(case, tmp_path):
    oracle("lerobot_oracle.py", tmp_path, [case.name], "--full", "--save")
    policy = flashrt_runtime.load_model(
        tmp_path / case.name, config="auto", hardware="cpu", precision="fp32", num_views=case.views
    )
    try:
        assert policy.spec.family == "lerobot"
        assert policy.spec.num_steps == case.steps
        check_actions(case, policy.sample_actions(**case.inputs()), stages_in(tmp_path, case).actions)
    finally:
        policy.close()


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_a_report_against_lerobot(policy, tmp_path):
    write_checkpoint(Case(policy), tmp_path)
    target = resolve_target("cpu", "fp32")
    report = drift_report(tmp_path, "lerobot", target, views=3, tokens=30, seed=4)
    assert report.passed, report.failures
    assert len(report.drifts) == 2 + 2 * 4 + 10 + 1
    json.dumps(report.as_json())
