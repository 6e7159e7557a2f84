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
        model.prefill_padded(model.paligemma.embed_images(images[present]), padded)
        model.generate(None, torch.zeros(0, 0), out)
        for _ in range(model.repeats(out)):
            model.repeat(torch.zeros(0, 0), out)
    np.testing.assert_array_equal(out.numpy(), stored[f"{case.name}/tokens"])


def _consecutive_but_skipped(model: Pi0Fast, case: FastCase) -> None:
    model.gap = 1


def _no_final_norm_weight(model: Pi0Fast, case: FastCase) -> None:
    model.paligemma.stack.norm.weight.zero_()


def _unscaled_text(model: Pi0Fast, case: FastCase) -> None:
    model.paligemma.embedding.weight.div_(model.paligemma.width**0.5)
    model.head = torch.nn.Embedding.from_pretrained(model.head_rows * model.paligemma.width**0.5)


def _scored_by_the_embedding(model: Pi0Fast, case: FastCase) -> None:
    model.head = None


def _forgets_its_own_tokens(model: Pi0Fast, case: FastCase) -> None:
    """K and V of a generated token overwrite those of the last: positions and history are lost."""
    repeat = model.repeat

    def stuck(noise: torch.Tensor, out: torch.Tensor) -> None:
        model.slot -= 1
        model.bound -= 1
        repeat(noise, out)

    object.__setattr__(model, "repeat", stuck)


FAULTS = [_consecutive_but_skipped, _no_final_norm_weight, _scored_by_the_embedding, _forgets_its_own_tokens]


@pytest.mark.parametrize("fault", [*FAULTS, _unscaled_text], ids=lambda fault: fault.__name__)
def test_a_fault_in_decoding_shows(fault, stored):
    """Far beyond the bound, in a case with a head of its own."""
    case = FAST_CASES[1]
    model = built(case)
    with torch.inference_mode():
        fault(model, case)
    tokens, scores = generate(model, case)
    kept = scores[[0, 1, -1]]
    assert np.abs(kept - stored[f"{case.name}/logits"]).max() > 100 * LOGITS
    assert not np.array_equal(tokens, stored[f"{case.name}/tokens"])


def test_a_prompt_without_its_bos_shows(stored):
    case = FAST_CASES[1]
    images, present, tokens, valid = prompt(case)
    found = built(case).sample_tokens(images, present, tokens[:-1], valid[:-1], case.max_tokens)
    assert not np.array_equal(found.numpy(), stored[f"{case.name}/tokens"])


def test_the_cases_cover_what_is_promised(stored):
    assert len(FAST_CASES) == 20
    assert {name.split("/")[0] for name in stored} == {case.name for case in FAST_CASES}
    assert {case.views for case in FAST_CASES} == {1, 2, 3}
    assert {case.tied for case in FAST_CASES} == {True, False}
    assert sum(bool(case.masked) for case in FAST_CASES) >= 5
    assert sum(len(set(stored[f"{case.name}/tokens"].tolist())) > 4 for case in FAST_CASES) >= 15
