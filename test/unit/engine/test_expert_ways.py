"""The expert's ways in captured graphs: that which was asked for, near the loop, bit-identical to eager."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime.engine.expert_chain import ExpertChain
from flashrt_runtime.guidance import Guidance
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.policy import Policy

pytestmark = pytest.mark.gpu

STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)
PROMPT = "open the drawer"


@pytest.fixture(scope="module")
def wide_path(
    make_wide: Callable[[Path, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint of a policy, at the widths that the kernels serve."""
    root = tmp_path_factory.mktemp("wide")
    return functools.cache(lambda policy: make_wide(root / policy, policy))


def load(path: Path, precision: str, rtc: str, expert: str) -> Policy:
    return flashrt_runtime.load_model(
        path, config="auto", hardware="any", precision=precision, weight_cache=False, autotune=1, rtc=rtc,
        expert=expert,
    )  # fmt: skip


def images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((480, 640), (224, 224))]


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("name", ["pi05", "pi0"])
def test_a_chain_of_kernels(name: str, precision: str, wide_path: Callable[[str], Path]) -> None:
    """Guided or not; scales reach it."""
    inputs, results = images(3), {}
    for way, rtc in (("loop", "off"), ("chain", "off"), ("chain", "guided")):
        policy = load(wide_path(name), precision, rtc, way)
        engine, model = policy._engine, policy._model
        assert engine is not None
        assert isinstance(model, FlowPolicy)
        assert isinstance(model.fused_expert, ExpertChain) == (way == "chain")
        before = policy.predict(inputs, PROMPT, STATE, seed=1)
        if precision == "fp8":
            policy.calibrate([{"images": images(5), "prompt": "stop", "state": STATE, "seed": 9}])
            after = policy.predict(inputs, PROMPT, STATE, seed=1)
            assert not np.array_equal(before, after)
            before = after
        encoded = policy._encode(inputs, PROMPT, STATE, seed=1)
        got = policy._run(model, encoded)
        with torch.inference_mode(), torch.cuda.stream(engine.stream):
            engine.generate(engine.encode_images(), engine.bucket_of(len(encoded.tokens)))
        engine.stream.synchronize()
        assert np.array_equal(engine.actions.cpu().numpy(), got)
        results[way, rtc] = before
        policy.close()
    loop, chain = results["loop", "off"], results["chain", "off"]
    assert np.linalg.norm(chain - loop) / np.linalg.norm(loop) < 3e-2
    assert np.array_equal(chain, results["chain", "guided"])


@pytest.mark.parametrize("way", [pytest.param("fused", marks=pytest.mark.hopper), "chain"])
def test_a_captured_graph_follows_guidance(way: str, wide_path: Callable[[str], Path]) -> None:
    """Gains, weights and targets are read where they stand when it runs, not when it was captured."""
    policy = load(wide_path("pi05"), "bf16", "guided", way)
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert isinstance(model, FlowPolicy)
    assert isinstance(model.fused_expert, ExpertChain) == (way == "chain")
    inputs, captures, results = policy._encode(images(3), PROMPT, STATE, seed=1), engine.captures, set()
    plan = np.random.default_rng(4).uniform(-0.2, 0.2, (policy.spec.horizon, policy.spec.action_dim or 0))
    for delay, schedule in ((0, "linear"), (2, "exp"), (4, "ones")):
        guide = policy._encode_guidance(Guidance(plan, delay, schedule=schedule), STATE)
        got = policy._run(model, inputs, guide)
        want = policy._eager(model, inputs, guide).cpu().numpy()
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 3e-2  # bf16, as without guidance
        np.testing.assert_array_equal(got[:delay], guide.target[:delay])
        results.add(got.tobytes())
    assert len(results) == 3
    assert engine.captures == captures
    policy.close()
