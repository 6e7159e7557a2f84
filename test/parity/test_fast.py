"""pi0-FAST against LeRobot's stored tokens and logits, case by case, and its decoding's own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fast_cases import FAST_CASES, FastCase
from parity_support import GOLDENS, TorchWeights

from flashrt_runtime import models
from flashrt_runtime.config import DecodeConfig, GemmaConfig, PolicyConfig, SiglipConfig
from flashrt_runtime.models.pi0_fast import Pi0Fast
from flashrt_runtime.models.weights import load_weights

LOGITS = 1e-4
BOS = 2
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "lerobot_pi0fast.npz") as found:
        return dict(found)


def fast_config(case: FastCase) -> PolicyConfig:
    """The case's dimensions as our configuration."""
    prefix = GemmaConfig(**case.dims["prefix"])
    return PolicyConfig(
        policy="pi0fast",
        vision=SiglipConfig(**case.dims["vision"]),
        prefix=prefix,
        expert=prefix,
        vocab_size=case.dims["vocab_size"],
        horizon=case.horizon,
        prompt_capacity=250,
        action_dim=7,
        decode=DecodeConfig(tied_head=case.tied),
    )


def built(case: FastCase, *, skip_position: bool = False, max_tokens: int = 80) -> Pi0Fast:
    """Our model with the case's weights."""
    model = models.build(fast_config(case), case.views, torch.float32)
    assert isinstance(model, Pi0Fast)
    model.decode_as(max_tokens, skip_position)
    load_weights(model, model.config, TorchWeights(case.weights()), torch.device("cpu"))
    model.eval()
    model.prepare(torch.device("cpu"))
    return model


def prompt(case: FastCase) -> list[torch.Tensor]:
    """The case's prompt with LeRobot's BOS behind it."""
    images, present, tokens, valid = (torch.from_numpy(array.copy()) for array in case.prompt().values())
    text = torch.cat((tokens, torch.tensor([BOS])))
    return [images, present, text, torch.cat((valid, torch.tensor([True])))]


def generate(model: Pi0Fast, case: FastCase, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the scores of every step."""
    scores: list[torch.Tensor] = []
    hidden = model.hidden

    def recorded(gap: int) -> torch.Tensor:
        found = hidden(gap)
        scores.append((found.float() @ model.head_rows.float().T)[0])
        return found

    object.__setattr__(model, "hidden", recorded)
    try:
        tokens = model.sample_tokens(*prompt(case), case.max_tokens, **settings)
    finally:
        object.__delattr__(model, "hidden")
    return tokens.numpy(), torch.stack(scores).numpy()


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.name)
def test_tokens_and_logits_equal_lerobots(case, stored):
    tokens, scores = generate(built(case), case)
    np.testing.assert_array_equal(tokens, stored[f"{case.name}/tokens"])
    assert np.abs(scores[[0, 1, -1]] - stored[f"{case.name}/logits"]).max() <= LOGITS


@pytest.mark.parametrize("case", FAST_CASES[1::4], ids=lambda case: case.name)
def test_what_a_graph_captures_equals_lerobot(case, stored):
    """Padded prompt, lengths known to the device alone, one step after another: as the engine runs it."""
    model = built(case, max_tokens=case.max_tokens)
    images, present, tokens, valid = prompt(case)
    text = tokens[valid]
    padded = torch.cat((text, torch.full((250 - len(text),), 7)))
    out = model.new_output(images.device)
    with torch.inference_mode():
        model.prefix_length.fill_(int(present.sum()) * model.config.vision.tokens + len(text))
        model.prefill_padded(images[present], padded)
        model.generate(None, torch.zeros(0, 0), out)
        for _ in range(model.repeats(out)):
            model.repeat(torch.zeros(0, 0), out)
    np.testing.assert_array_equal(out.numpy(), stored[f"{case.name}/tokens"])


def test_the_cases_cover_what_is_promised(stored):
    assert len(FAST_CASES) == 20
    assert {name.split("/")[0] for name in stored} == {case.name for case in FAST_CASES}
    assert {case.views for case in FAST_CASES} == {1, 2, 3}
    assert {case.tied for case in FAST_CASES} == {True, False}
    assert sum(bool(case.masked) for case in FAST_CASES) >= 5
    assert sum(len(set(stored[f"{case.name}/tokens"].tolist())) > 4 for case in FAST_CASES) >= 15
