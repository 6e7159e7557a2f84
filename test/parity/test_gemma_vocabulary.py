"""Prompts in Gemma's real vocabulary: our SentencePiece path against LeRobot's whole pipeline, id by id."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gemma_vocabulary import VocabularyUnavailable, tokenizer_json, write_sentencepiece
from parity_support import ROOT

from flashrt_runtime.checkpoints.rules import lerobot_rules, openpi_rules
from flashrt_runtime.config import DecodeConfig
from flashrt_runtime.processing.fast_tokens import ActionTokens, FastProcessor
from flashrt_runtime.processing.prompt import PromptEncoder

PYTHON = ROOT / ".venv-parity" / "bin" / "python"
SCRIPT = Path(__file__).resolve().parent / "oracles" / "lerobot_prompts.py"
CASES = 240

pytestmark = pytest.mark.parity

VERBS = ["pick up", "put", "open", "close", "push", "stack", "turn on", "fold", "wipe", "insert"]
THINGS = ["the red block", "a moka pot", "black bowl", "top_drawer", "frying pan", "towel", "wine bottle"]
PLACES = ["on the plate", "in the basket", "next to the mug", "into the cabinet", "at 3 o'clock", "(left)"]
OTHER = [
    "机器人把红色方块放到盘子上",
    "Heb het blok op — voorzichtig!",
    "подними красный куб",
    "ضع الوعاء على الطاولة",
    "naïve café ☕ 🤖👍🏽",
    "赤いブロックを拾って",
    "a\tb  c   d",
    "UPPER lower MiXeD",
    "x=3.14159, y=-2e10; z=[1, 2]",
    "don't  stop",
    "e\u0301 versus é",
    "<loc0012> is a place",
    "1234567890",
    "tokens_with_many_underscores_in_them",
    "  leading and trailing  ",
    "two\nlines",
    "zero\u200bwidth and no\u00a0break",
    "𝒻𝒶𝓃𝒸𝓎",
]


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """Gemma's tokenizer.json."""
    try:
        return tokenizer_json()
    except VocabularyUnavailable as reason:
        pytest.skip(f"Gemma's vocabulary cannot be fetched: {reason}")


@pytest.fixture(scope="module")
def model(vocabulary, tmp_path_factory) -> Path:
    """The SentencePiece model made from it."""
    file = tmp_path_factory.mktemp("gemma") / "paligemma_tokenizer.model"
    write_sentencepiece(vocabulary, file)
    return file


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    """Tasks with states; some values lie beyond [-1, 1] and some on the edges of bins."""
    generator = random.Random(0)
    found = []
    for index in range(CASES):
        task = (
            OTHER[index] if index < len(OTHER) else " ".join(map(generator.choice, (VERBS, THINGS, PLACES)))
        )
        state = [generator.uniform(-1.2, 1.2) for _ in range(generator.choice((6, 7, 8, 14)))]
        state[0] = generator.choice((-1.0, 0.0, 1.0, 63 / 128, -1.5))
        found.append({"task": task, "state": np.float32(state).tolist()})
    return found


@pytest.fixture(scope="module")
def lerobots(vocabulary, cases, tmp_path_factory) -> dict[str, list[list[int]]]:
    """What LeRobot makes of them."""
    if not PYTHON.is_file():
        pytest.skip("no .venv-parity: run `make parity-env`")
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [PYTHON, SCRIPT, vocabulary, folder / "cases.json", folder / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("policy", ["pi05", "pi0", "pi0fast"])
def test_every_prompt_has_lerobots_ids(policy, model, cases, lerobots):
    encoder = PromptEncoder(model, policy, lerobot_rules(policy), 1000, 257152)
    wrong = []
    for case, expected in zip(cases, lerobots[policy], strict=True):
        found = encoder.encode(case["task"], np.float32(case["state"])).tolist()
        if policy == "pi0fast":
            assert found.pop() == 2  # the BOS that LeRobot's model appends, not its preprocessor
        if found != expected:
            wrong.append((case["task"], found, expected))
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong[:2]}"


def test_an_action_chunk_has_lerobots_ids(model, lerobots):
    config = SimpleNamespace(vocab_size=257152, horizon=10, action_dim=7, decode=DecodeConfig())
    tokens = ActionTokens.of(FastProcessor(ROOT / "test" / "data" / "fast"), model, config)
    assert list(tokens.lead) == lerobots["lead"]
    assert tokens.bar == lerobots["bar"]
    assert (tokens.eos, tokens.first) == (1, 257152 - 1 - 128)


def test_it_is_paligemmas(model):
    encoder = PromptEncoder(model, "pi0", openpi_rules("pi0"), 48, 257152)
    processor = encoder.processor
    assert processor.vocab_size() == 257152
    assert processor.piece_to_id("<loc0000>") == 256000
    assert processor.piece_to_id("<seg127>") == 257151
    assert encoder.encode("pick up")[-1] == 108  # openpi's newline token


@pytest.mark.parametrize(("width", "length"), [(6, 50), (8, 58), (14, 79)])
def test_real_prompts_fit_the_capacity(model, width, length):
    """Their usual lengths by width of the state."""
    encoder = PromptEncoder(model, "pi05", openpi_rules("pi05"), 200, 257152)
    prompt = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    tokens = encoder.encode(prompt, np.linspace(-0.9, 0.9, width, dtype=np.float32))
    assert abs(len(tokens) - length) <= 10
