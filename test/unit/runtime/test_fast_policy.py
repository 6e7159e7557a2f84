"""pi0-FAST as a policy: the contract of predict and sample_tokens, on a small checkpoint from disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.config import DecodeConfig
from flashrt_runtime.errors import (
    ActionError,
    NoStopError,
    NotSupportedYetError,
    ObservationError,
    OptionError,
    TokenizerNotFoundError,
)
from flashrt_runtime.models.pi0_fast import Pi0Fast, score
from flashrt_runtime.options import resolve_target
from flashrt_runtime.parity.report import drift_report
from flashrt_runtime.untrained.random import make_checkpoint

LEROBOT_PI05 = Path(__file__).resolve().parents[2] / "data" / "lerobot" / "pi05"
PROMPT = "pick up the red block"
STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fast") / "tiny", policy="pi0fast", preset="libero")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> Iterator[Policy]:
    loaded = flashrt_runtime.load_model(checkpoint, config="pi0_fast", hardware="cpu")
    yield loaded
    loaded.close()


def images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(2)]


def model_of(policy: Policy) -> Pi0Fast:
    model = policy._model
    assert isinstance(model, Pi0Fast)
    return model


def prefix(tokens: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "images": rng.uniform(-1, 1, (2, 3, 224, 224)).astype(np.float32),
        "image_mask": np.ones(2, bool),
        "tokens": rng.integers(4, 500, tokens),
        "token_mask": np.ones(tokens, bool),
    }


def test_chunks_in_the_robots_units(policy: Policy) -> None:
    chunks = [policy.predict(images(seed), PROMPT, STATE) for seed in range(12)]
    assert {chunk.shape for chunk in chunks} == {(10, 7)}
    assert chunks[0].dtype == np.float32
    assert len({chunk.tobytes() for chunk in chunks}) >= 2, "the observation does not matter"
    np.testing.assert_array_equal(policy.predict(images(0), PROMPT, STATE, seed=9), chunks[0])
    assert policy.spec.config == "pi0fast"
    assert (policy.spec.state_dim, policy.spec.action_dim, policy.spec.model_action_dim) == (8, 7, 7)


def test_actions_are_what_the_tokens_say(policy: Policy) -> None:
    """Decoded, then un-normalised by the checkpoint's quantiles."""
    inputs = policy._encode(images(1), PROMPT, STATE)
    tokens = policy._eager(model_of(policy), inputs).numpy()
    codec, stats = policy._action_tokens, policy._checkpoint.norm_stats.actions
    actions = codec.decode(tokens[tokens >= 0])
    want = (actions + 1) / 2 * (stats.q99 - stats.q01 + 1e-6) + stats.q01
    np.testing.assert_allclose(policy.predict(images(1), PROMPT, STATE), want, atol=1e-5)


def test_the_other_spelling(checkpoint: Path) -> None:
    for name in ("pi0fast", "auto"):
        loaded = flashrt_runtime.load_model(checkpoint, config=name, hardware="cpu")
        assert loaded.spec.config == "pi0fast"
        loaded.close()


def test_an_absent_view_is_a_black_one(policy: Policy, checkpoint: Path) -> None:
    """As in openpi's training of this policy; masked, it would be another prefix."""
    first, second = policy.spec.views
    black = np.zeros((224, 224, 3), np.uint8)
    shown, absent = ({first: images(0)[0], second: image} for image in (black, None))
    assert len(policy._encode(absent, PROMPT, STATE).views) == 2
    np.testing.assert_array_equal(policy.predict(absent, PROMPT, STATE), policy.predict(shown, PROMPT, STATE))
    rules = {"show_absent_views": False}
    masking = flashrt_runtime.load_model(checkpoint, config="pi0fast", hardware="cpu", rules=rules)
    assert len(masking._encode(absent, PROMPT, STATE).views) == 1
    masking.close()


def test_greedy_starts_from_no_noise(policy: Policy) -> None:
    with pytest.raises(ObservationError, match=r"noise: expected shape \(0, 0\)"):
        policy.predict(images(0), PROMPT, STATE, noise=np.zeros((10, 7), np.float32))


def test_a_chunk_without_a_stop_is_an_error_with_its_tokens(checkpoint: Path) -> None:
    short = flashrt_runtime.load_model(checkpoint, config="pi0fast", hardware="cpu", decode_graph_steps=5)
    with pytest.raises(NoStopError, match="no stop among the 5 tokens") as caught:
        short.predict(images(0), PROMPT, STATE)
    assert len(caught.value.tokens) == 5
    assert caught.value.tokens[: len(short._action_tokens.lead)] == short._action_tokens.lead
    short.close()


def test_scores_that_are_not_finite_are_an_error(checkpoint: Path) -> None:
    broken = flashrt_runtime.load_model(checkpoint, config="pi0fast", hardware="cpu")
    model = model_of(broken)
    with torch.inference_mode():
        model.restricted.rows.fill_(float("nan"))
    with pytest.raises(ActionError, match="not finite"):
        broken.predict(images(0), PROMPT, STATE)
    model.head.weight.data[7] = float("inf")
    with pytest.raises(ActionError, match="not finite"):
        broken.sample_tokens(**prefix(), max_tokens=3)
    broken.close()


def test_without_its_processor_it_has_model_space_only(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("flashrt_runtime.processing.fast_tokens.find_spec", lambda name: None)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shutil.rmtree(copy / "fast")
    loaded = flashrt_runtime.load_model(copy, config="auto", hardware="cpu")
    assert len(loaded.sample_tokens(**prefix(), max_tokens=4)) == 4
    with pytest.raises(TokenizerNotFoundError, match="action tokens were not found"):
        loaded.predict(images(0), PROMPT, STATE)
    with pytest.raises(OptionError, match="none is loaded"):
        loaded.sample_tokens(**prefix(), max_tokens=4, pruned=True)
    loaded.close()


def test_pruned_scores_are_the_whole_vocabularys(policy: Policy) -> None:
    """Every score of a token that can occur, at every step, and so every choice among them."""
    model = model_of(policy)
    states: list[torch.Tensor] = []
    hook = model.paligemma.stack.norm.register_forward_hook(lambda _, __, out: states.append(out[0]))
    tokens = policy._eager(model, policy._encode(images(2), PROMPT, STATE))
    hook.remove()
    scoring = model.scoring()
    assert scoring.ids is not None
    assert len(scoring.ids) < model.config.vocab_size / 2
    for state, token in zip(states, tokens, strict=False):
        whole = score(state, model.head_rows)
        torch.testing.assert_close(score(state, scoring.rows), whole[:, scoring.ids], rtol=0, atol=1e-5)
        assert int(whole.argmax()) == int(token)  # a policy that writes chunks needs no other token


def test_pruned_and_full_generate_the_same_chunk(policy: Policy) -> None:
    inputs = policy._encode(images(3), PROMPT, STATE)
    rng = np.random.default_rng(0)
    arguments = prefix() | {
        "tokens": inputs.tokens,
        "token_mask": np.ones(len(inputs.tokens), bool),
        "images": rng.uniform(-1, 1, (2, 3, 224, 224)).astype(np.float32),
    }
    bar = policy._action_tokens.bar
    arguments |= {"max_tokens": 80, "stop": bar}
    both = [policy.sample_tokens(**arguments, pruned=pruned) for pruned in (True, False)]
    np.testing.assert_array_equal(*both)
    assert both[0][-1] == bar
    assert policy._action_tokens.decode(both[0]).shape == (10, 7)


def test_a_stop_ends_the_text_wherever_it_comes(policy: Policy) -> None:
    free = policy.sample_tokens(**prefix(), max_tokens=12)
    assert free.dtype == np.int64
    assert len(free) == 12
    for token in set(free.tolist()):
        first = free.tolist().index(token)
        cut = policy.sample_tokens(**prefix(), max_tokens=12, stop=token)
        np.testing.assert_array_equal(cut, free[: first + 1])
    np.testing.assert_array_equal(policy.sample_tokens(**prefix(), max_tokens=5), free[:5])


def test_masked_views_and_padding_change_nothing(policy: Policy) -> None:
    given = prefix()
    given["image_mask"] = np.array([True, False])
    want = policy.sample_tokens(**given, max_tokens=6)
    given["images"] = given["images"].copy()
    given["images"][1] = 0.3
    given["tokens"] = np.append(given["tokens"], [9, 9])
    given["token_mask"] = np.append(given["token_mask"], [False, False])
    np.testing.assert_array_equal(policy.sample_tokens(**given, max_tokens=6), want)


def test_a_checkpoints_temperature_is_used(checkpoint: Path, tmp_path: Path) -> None:
    """Noise on the scores, drawn by predict's seed; so hot that the tokens are no chunk, it says so."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "hot"))
    config = json.loads((folder / "config.json").read_text())
    for temperature, error in ((0.02, None), (100.0, ActionError)):
        config["flashrt"]["temperature"] = temperature
        (folder / "config.json").write_text(json.dumps(config))
        loaded = flashrt_runtime.load_model(folder, config="pi0fast", hardware="cpu")
        inputs = [loaded._encode(images(0), PROMPT, STATE, seed=seed) for seed in (1, 1, 2)]
        assert inputs[0].noise.shape == (80, len(loaded._action_tokens.ids))
        assert torch.equal(inputs[0].noise, inputs[1].noise)
        assert not torch.equal(inputs[0].noise, inputs[2].noise)
        if error is None:
            chunk = loaded.predict(images(0), PROMPT, STATE, seed=1)
            given = loaded.predict(images(0), PROMPT, STATE, noise=inputs[0].noise.numpy())
            np.testing.assert_array_equal(given, chunk)
        else:
            with pytest.raises(error, match="tokens"):
                loaded.predict(images(0), PROMPT, STATE, seed=1)
        loaded.close()


def test_temperature_draws_by_its_seed(policy: Policy) -> None:
    hot = {"max_tokens": 10, "temperature": 50.0}
    first, again, other = (policy.sample_tokens(**prefix(), **hot, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    cold = policy.sample_tokens(**prefix(), max_tokens=10, temperature=1e-4, seed=1)
    np.testing.assert_array_equal(cold, policy.sample_tokens(**prefix(), max_tokens=10))


def test_temperature_draws_as_softmax_says(policy: Policy) -> None:
    model, temperature = model_of(policy), 8.0
    states: list[torch.Tensor] = []
    hook = model.paligemma.stack.norm.register_forward_hook(lambda _, __, out: states.append(out[0]))
    arguments = [torch.from_numpy(value) for value in prefix().values()]
    model.sample_tokens(*arguments, 1)
    hook.remove()
    likely = torch.softmax(score(states[0], model.head_rows)[0] / temperature, dim=0)
    generator = torch.Generator().manual_seed(0)
    noise = -temperature * torch.empty(20000, len(likely)).exponential_(generator=generator).log()
    drawn = (score(states[0], model.head_rows) + noise).argmax(dim=-1)
    counts = torch.bincount(drawn, minlength=len(likely)) / len(drawn)
    assert (counts - likely).abs().sum() < 0.3
    best = likely.topk(5).indices
    np.testing.assert_allclose(counts[best], likely[best], atol=0.01)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": 0}, OptionError, "from 1 to 512"),
        ({"max_tokens": 513}, OptionError, "from 1 to 512"),
        ({"temperature": -1.0}, OptionError, "0 or more"),
        ({"temperature": float("nan")}, OptionError, "0 or more"),
        ({"token_mask": np.zeros(20, bool)}, ObservationError, "needs a prompt"),
        ({"tokens": np.full(20, 10**6)}, ObservationError, "ids from 0"),
        ({"images": np.zeros((1, 3, 224, 224), np.float32)}, ObservationError, "images"),
    ],
)
def test_what_sample_tokens_refuses(
    policy: Policy, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        policy.sample_tokens(**(prefix() | {"max_tokens": 3} | changes))


def test_the_entries_of_the_other_family(policy: Policy, tmp_path: Path) -> None:
    arguments = prefix() | {"state": None, "noise": np.zeros((10, 7), np.float32)}
    with pytest.raises(OptionError, match="use sample_tokens"):
        policy.sample_actions(**arguments)
    flow = flashrt_runtime.load_model(make_checkpoint(tmp_path), hardware="cpu", num_steps=1)
    with pytest.raises(OptionError, match="use sample_actions"):
        flow.sample_tokens(**prefix(), max_tokens=3)
    flow.close()


def test_steps_beyond_what_a_chunk_may_have(checkpoint: Path) -> None:
    for steps in (0, 513):
        with pytest.raises(OptionError, match="decode_graph_steps must be a whole number from 1 to 512"):
            flashrt_runtime.load_model(checkpoint, config="pi0fast", hardware="cpu", decode_graph_steps=steps)


def lerobot_copy(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint's weights in a policy directory as LeRobot saves pi0_fast."""
    shutil.copytree(LEROBOT_PI05, folder)
    tensors = {f"model.{key}": value for key, value in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(checkpoint / "tokenizer.model", folder)
    ours = json.loads((checkpoint / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    fast = {"type": "pi0_fast", "temperature": 0.5, "fast_skip_tokens": 100, "max_action_dim": 32}
    (folder / "config.json").write_text(json.dumps(config | fast | {"flashrt_dims": ours["flashrt_dims"]}))
    file = folder / "policy_preprocessor.json"
    pipeline = json.loads(file.read_text())
    names = [step["registry_name"] for step in pipeline["steps"]]
    at = names.index("pi05_prepare_state_tokenizer_processor_step")
    pipeline["steps"][at]["registry_name"] = "pi0_fast_prepare_state_tokenizer_processor_step"
    step = {"registry_name": "action_tokenizer_processor", "config": {"max_action_tokens": 256}}
    pipeline["steps"].insert(at + 2, step)
    file.write_text(json.dumps(pipeline))
    return folder


def test_lerobots_layout(checkpoint: Path, tmp_path: Path) -> None:
    folder = lerobot_copy(checkpoint, tmp_path / "lerobot")
    with open_checkpoint(folder, config="pi0_fast") as opened:
        assert (opened.config.policy, opened.layout) == ("pi0fast", "lerobot")
        assert opened.config.prompt_capacity == 201  # LeRobot's 200, and its BOS
        assert (opened.config.horizon, opened.config.action_dim) == (50, 7)
        assert opened.config.decode == DecodeConfig(skip_ids=100, temperature=0.5, tied_head=False)
        assert (opened.rules.end_with_bos, opened.rules.skip_position) == (True, False)
        assert opened.rules.action_mode == "quantile"  # as the pipeline says, not LeRobot's default
    loaded = flashrt_runtime.load_model(folder, config="auto", hardware="cpu")
    appended = loaded.sample_tokens(**prefix(), max_tokens=5)
    loaded.close()
    openpi = {"end_with_bos": False}
    loaded = flashrt_runtime.load_model(folder, config="auto", hardware="cpu", rules=openpi)
    given = prefix()
    given["tokens"] = np.append(given["tokens"], 2)
    given["token_mask"] = np.append(given["token_mask"], True)
    np.testing.assert_array_equal(loaded.sample_tokens(**given, max_tokens=5), appended)
    loaded.close()


def test_no_drift_report_without_a_flow(checkpoint: Path) -> None:
    with pytest.raises(NotSupportedYetError, match="pi0fast has none"):
        drift_report(checkpoint, "reference", resolve_target("cpu", "fp32"))


def test_fp8_is_calibrated_like_any_policy(checkpoint: Path) -> None:
    policy = flashrt_runtime.load_model(
        checkpoint, config="pi0fast", hardware="cpu", precision="fp8", weight_cache=False
    )
    observations = [{"images": images(i), "prompt": PROMPT, "state": STATE} for i in range(6)]
    report = policy.calibrate(observations, held_out=1)
    assert report.samples == 5
    assert report.held_out_error is not None
    assert any("stack.layers.3.down" in name for name in report.scales), "the last layer is decoded with, too"
    assert policy.predict(images(0), PROMPT, STATE).shape == (10, 7)
    policy.close()
