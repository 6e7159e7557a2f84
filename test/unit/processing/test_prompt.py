"""Prompts: text as each family formats it, capacity, and what a tokenizer must be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from flashrt_runtime.checkpoints.rules import lerobot_rules, openpi_rules
from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.errors import CheckpointError, ObservationError, PromptError, PromptTooLongError
from flashrt_runtime.processing.prompt import PromptEncoder, clean_prompt

STATE = np.array([-1.5, -1.0, 0.0, 0.999, 3.0], np.float32)
RAW = "  Pick up_the red\nblock \n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train_tokenizer(512))
    return file


def encoder(tokenizer, policy, rules, capacity=200):
    return PromptEncoder(tokenizer, policy, rules, capacity, 512)


@pytest.mark.parametrize(
    ("policy", "rules", "expected"),
    [
        ("pi05", openpi_rules("pi05"), "Task: Pick up the red block, State: -1 0 128 255 255;\nAction: "),
        ("pi05", lerobot_rules("pi05"), "Task: Pick up the red block, State: -1 0 128 255 255;\nAction: "),
        ("pi05", openpi_rules("pi05", state_in_prompt=False), "Pick up the red block\n"),
        ("pi0", openpi_rules("pi0"), "Pick up the red block\n"),
        ("pi0", lerobot_rules("pi0"), RAW),
        ("pi0fast", openpi_rules("pi0fast"), "Task: pick up the red\nblock, State: -1 0 128 255 255;\n"),
        ("pi0fast", lerobot_rules("pi0fast"), "Task: Pick up the red block, State: -1 0 128 255 255;\n"),
    ],
)
def test_text(tokenizer, policy, rules, expected):
    assert encoder(tokenizer, policy, rules).text(RAW, STATE) == expected


def test_lerobots_pi0_adds_only_a_missing_newline(tokenizer):
    text = encoder(tokenizer, "pi0", lerobot_rules("pi0")).text
    assert text("pick_up") == "pick_up\n"
    assert text("pick_up\n") == "pick_up\n"


@pytest.mark.parametrize("rules", [openpi_rules("pi05"), openpi_rules("pi0"), lerobot_rules("pi0")])
def test_tokens_are_the_texts_with_bos_and_without_eos(tokenizer, rules):
    policy = "pi05" if rules.state_in_prompt else "pi0"
    ours = encoder(tokenizer, policy, rules)
    tokens = ours.encode("put the bowl on the plate", STATE)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert tokens.dtype == np.int64
    assert tokens[0] == reference.bos_id() == 2
    assert reference.eos_id() not in tokens
    assert reference.decode(tokens[1:].tolist()) == ours.text("put the bowl on the plate", STATE)


def test_lerobots_pi0_fast_ends_with_a_bos(tokenizer):
    families = openpi_rules("pi0fast"), lerobot_rules("pi0fast")
    plain, ended = (encoder(tokenizer, "pi0fast", rules) for rules in families)
    tokens = plain.encode("open the drawer", STATE)
    np.testing.assert_array_equal(ended.encode("open the drawer", STATE), [*tokens, 2])
    exact = encoder(tokenizer, "pi0fast", lerobot_rules("pi0fast"), len(tokens))
    with pytest.raises(PromptTooLongError, match=f"{len(tokens) + 1} tokens"):
        exact.encode("open the drawer", STATE)


def test_openpis_newline_is_a_token_of_its_own(tokenizer):
    tokens = encoder(tokenizer, "pi0", openpi_rules("pi0")).encode("open the drawer")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert tokens[-1] == reference.piece_to_id("\n")


def test_the_tokenizer_has_paligemmas_conventions(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert model.encode("255", out_type=str) == ["2", "5", "5"]
    assert model.decode(model.encode("  two  spaces ")) == "  two  spaces "
    assert model.decode(model.encode("机器人 naïve ☕")) == "机器人 naïve ☕"
    assert 3 not in model.encode("机器人 naïve ☕")


def test_training_the_tokenizer_is_repeatable():
    assert train_tokenizer(512) == train_tokenizer(512)


def test_a_prompt_that_does_not_fit_is_refused_and_never_cut(tokenizer):
    ours = encoder(tokenizer, "pi0", openpi_rules("pi0"), capacity=48)
    fitting = ours.encode("a " * 10)
    assert len(fitting) <= 48
    with pytest.raises(PromptTooLongError, match=r"the prompt has \d+ tokens, pi0 has room for 48: shorten"):
        ours.encode("机器人" * 30)


def test_exactly_full_is_fine(tokenizer):
    length = len(encoder(tokenizer, "pi0", openpi_rules("pi0")).encode("push the plate"))
    assert len(encoder(tokenizer, "pi0", openpi_rules("pi0"), length).encode("push the plate")) == length
    with pytest.raises(PromptTooLongError):
        encoder(tokenizer, "pi0", openpi_rules("pi0"), length - 1).encode("push the plate")


@pytest.mark.parametrize("prompt", ["", "  ", "\n", None, 7, b"pick"])
def test_prompts_that_say_nothing(prompt):
    for rules in (openpi_rules("pi05"), lerobot_rules("pi0")):
        with pytest.raises(PromptError):
            clean_prompt(prompt, rules)


def test_a_state_in_the_prompt_must_be_given(tokenizer):
    with pytest.raises(ObservationError, match="reads the state from its prompt"):
        encoder(tokenizer, "pi05", openpi_rules("pi05")).encode("pick")


def test_a_state_beside_the_prompt_is_ignored(tokenizer):
    ours = encoder(tokenizer, "pi05", openpi_rules("pi05", state_in_prompt=False))
    np.testing.assert_array_equal(ours.encode("pick", STATE), ours.encode("pick"))


def test_damaged_and_foreign_tokenizers(tokenizer, tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no protobuf")
    with pytest.raises(CheckpointError, match=r"broken\.model: not a SentencePiece model"):
        PromptEncoder(broken, "pi0", openpi_rules("pi0"), 48)
    with pytest.raises(CheckpointError, match="512 pieces, but the policy's token embedding has 100 rows"):
        PromptEncoder(tokenizer, "pi0", openpi_rules("pi0"), 48, 100)
