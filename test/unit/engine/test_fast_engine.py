"""pi0-FAST's graphs on a GPU: one a step or one for all, the same tokens, and no host between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import flashrt_runtime
from flashrt_runtime import ops
from flashrt_runtime.config import PATCH_SIZE
from flashrt_runtime.errors import NoStopError
from flashrt_runtime.models.pi0_fast import NOTHING, Pi0Fast
from flashrt_runtime.policy import Policy
from flashrt_runtime.untrained.random import make_checkpoint

pytestmark = pytest.mark.gpu

PROMPT = "pick up the red block"
STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)
STEPS = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fast") / "small", size="small", policy="pi0fast")


def images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(2)]


def load(path: Path, precision: str, whole: bool) -> Policy:
    return flashrt_runtime.load_model(
        path, config="pi0_fast", hardware="any", precision=precision, weight_cache=False, autotune=1,
        decode_cuda_graph=whole, decode_graph_steps=STEPS,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp8", "fp8 wide"])
def pair(
    request: pytest.FixtureRequest,
    path: Path,
    make_wide: Callable[[Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[bool, Policy]]:
    """wide: at the widths that the skinny kernels serve."""
    precision, _, wide = request.param.partition(" ")
    if wide:
        path = make_wide(tmp_path_factory.mktemp("fast") / "wide", "pi0fast")
    loaded = {whole: load(path, precision, whole) for whole in (False, True)}
    assert all((model_of(policy).fused is not None) == bool(wide) for policy in loaded.values())
    for policy in loaded.values():
        policy.predict(images(0), PROMPT, STATE)  # fp8 takes its scales from it
    yield loaded
    for policy in loaded.values():
        policy.close()


def model_of(policy: Policy) -> Pi0Fast:
    model = policy._model
    assert isinstance(model, Pi0Fast)
    return model


def tokens_of(policy: Policy, seed: int) -> np.ndarray:
    """What the engine generates, `NOTHING` behind the stop included."""
    engine = policy._engine
    assert engine is not None
    inputs = policy._encode(images(seed), PROMPT, STATE)
    return engine.run(inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy())


@contextlib.contextmanager
def pixels_as_captured(model: Pi0Fast) -> Iterator[None]:
    """Within, the definition takes whole pixels as they are where the graphs do: a product summed otherwise
    differs in the last places of float32, and in 16 bits a close call follows it.
    """
    tower = model.paligemma.vision
    weights = tower.levels

    def embed(images: torch.Tensor) -> torch.Tensor:
        assert weights is not None
        patches = ops.patchify(images, PATCH_SIZE)
        levels = patches.new_zeros(*patches.shape[:2], weights.split.shape[1], dtype=torch.float16)
        levels[..., : patches.shape[2]] = ((patches + 1) * 127.5).round() - 128
        return ops.embed_levels(levels, weights)

    if weights is not None:
        tower.embed = embed
    try:
        yield
    finally:
        tower.__dict__.pop("embed", None)


def test_both_modes_give_the_definitions_tokens(pair: dict[bool, Policy]) -> None:
    for seed in range(6):
        stepwise, whole = (tokens_of(pair[mode], seed) for mode in (False, True))
        np.testing.assert_array_equal(stepwise, whole)
        policy = pair[True]
        if policy.precision != "fp8":  # whose roundings follow the prefix's padding, and decide a close call
            inputs = policy._encode(images(seed), PROMPT, STATE)
            with pixels_as_captured(model_of(policy)):
                want = policy._eager(model_of(policy), inputs).cpu().numpy()
            np.testing.assert_array_equal(whole, want)
        assert (whole == NOTHING).any(), "never stopped: nothing tested"
        chunks = [pair[mode].predict(images(seed), PROMPT, STATE) for mode in (False, True)]
        np.testing.assert_array_equal(*chunks)
        assert chunks[0].shape == (10, 7)


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_a_stop_at_any_position_ends_the_chunk(pair: dict[bool, Policy], whole: bool, at: int) -> None:
    """The stop ids are read on the device: no graph is captured again."""
    policy = pair[whole]
    stops = model_of(policy).scoring().stops
    before, tokens = stops.clone(), tokens_of(policy, 1)
    stops.fill_(int(tokens[at]))
    try:
        cut = tokens_of(policy, 1)
    finally:
        stops.copy_(before)
    np.testing.assert_array_equal(cut[: at + 1], tokens[: at + 1])
    assert (cut[at + 1 :] == NOTHING).all()
    np.testing.assert_array_equal(tokens_of(policy, 1), tokens)


@pytest.mark.parametrize("whole", [False, True])
def test_no_stop_within_the_limit_is_an_error(pair: dict[bool, Policy], whole: bool) -> None:
    policy = pair[whole]
    stops = model_of(policy).scoring().stops
    before = stops.clone()
    stops.fill_(NOTHING)
    try:
        # the tokens still hold the bar, so the error is the limit's only where no bar comes
        generated = tokens_of(policy, 2)
        assert (generated != NOTHING).all()
        assert len(generated) == STEPS
    finally:
        stops.copy_(before)
    tokens = policy._action_tokens
    assert tokens is not None
    with pytest.raises(NoStopError, match=f"{STEPS} tokens"):
        tokens.decode(np.where(np.isin(generated, tokens.stops), tokens.first, generated))


def runtime_calls(policy: Policy) -> list[str]:
    """CUDA runtime calls of one inference."""
    engine = policy._engine
    assert engine is not None
    inputs = policy._encode(images(3), PROMPT, STATE)
    arguments = inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy()
    engine.run(*arguments)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        engine.run(*arguments)
    return [event.name for event in recorded.events() if event.name.startswith(("cuda", "cu"))]


def test_the_whole_decode_is_one_launch_and_one_wait(pair: dict[bool, Policy]) -> None:
    calls = runtime_calls(pair[True])
    assert calls.count("cudaGraphLaunch") == 3  # images; prefill with the first token; all the others
    assert calls.count("cudaEventSynchronize") == 1
    assert "cudaStreamSynchronize" not in calls


def test_the_stepwise_decode_launches_up_to_the_stop(pair: dict[bool, Policy]) -> None:
    generated = int((tokens_of(pair[False], 3) != NOTHING).sum())
    launches = runtime_calls(pair[False]).count("cudaGraphLaunch")
    # images, prefill with the first token, one a token, and at most one begun before the stop was seen
    assert generated + 1 <= launches <= generated + 2


def test_temperature_is_the_seeds(path: Path, tmp_path: Path) -> None:
    policy = load(path, "fp32", whole=True)
    try:
        size = model_of(policy).config.vision.image_size
        rng = np.random.default_rng(0)
        pixels = rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32)
        tokens = rng.integers(4, 500, 20)
        prefix = (pixels, np.ones(2, bool), tokens, np.ones(20, bool))
        drawn = [policy.sample_tokens(*prefix, 12, temperature=5.0, seed=seed) for seed in (1, 1, 2)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])
    finally:
        policy.close()
