"""FAST action tokens: the published arithmetic, round trips, and every way a sequence can be no chunk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer

from flashrt_runtime.checkpoints.tokenizer import train_tokenizer
from flashrt_runtime.config import DecodeConfig
from flashrt_runtime.errors import (
    ActionError,
    ActionTokenError,
    CheckpointError,
    NoStopError,
    TokenizerNotFoundError,
)
from flashrt_runtime.processing import fast_tokens
from flashrt_runtime.processing.fast_tokens import ActionTokens, FastProcessor, train_processor

# Fitted, saved and run by the published code on synthetic chunks (see the oracle that made it): the public
# vocabulary could not be fetched.
PUBLISHED = Path(__file__).resolve().parents[2] / "data" / "fast"
HORIZON, DIM = 10, 7


@pytest.fixture(scope="module")
def processor() -> FastProcessor:
    return FastProcessor(PUBLISHED)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(PUBLISHED / "expected.npz") as stored:
        arrays = dict(stored)
    cuts = np.cumsum(arrays["lengths"])[:-1]
    return arrays | {"tokens": np.split(arrays["tokens"], cuts)}


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "tokenizer.model"
    file.write_bytes(train_tokenizer(512))
    return file


@pytest.fixture(scope="module")
def tokens(processor, text_tokenizer) -> ActionTokens:
    config = SimpleNamespace(vocab_size=2048, horizon=HORIZON, action_dim=DIM, decode=DecodeConfig())
    return ActionTokens.of(processor, text_tokenizer, config)


def published_encode(chunk: np.ndarray, directory: Path) -> list[int]:
    """The encoder written from its equations: DCT-II (orthonormal) over time, times scale, rounded, less
    min_token, each a character, byte-pair encoded.
    """
    config = json.loads((directory / "processor_config.json").read_text())
    steps, dims = chunk.shape
    text = ""
    for k in range(steps):
        for d in range(dims):
            total = sum(chunk[n, d] * np.cos(np.pi * k * (2 * n + 1) / (2 * steps)) for n in range(steps))
            coefficient = total * np.sqrt((1 if k == 0 else 2) / steps)
            text += chr(max(int(np.around(coefficient * config["scale"])) - config["min_token"], 0))
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids


def test_tokens_are_those_of_the_published_code(processor, expected):
    for chunk, wanted in zip(expected["chunks"], expected["tokens"], strict=True):
        assert processor.encode(chunk) == wanted.tolist()


def test_tokens_are_those_of_the_published_equations(processor, expected):
    for chunk in expected["chunks"][::9]:
        assert processor.encode(chunk) == published_encode(chunk, PUBLISHED)


def test_decoded_actions_are_those_of_the_published_code(processor, expected):
    for ids, wanted in zip(expected["tokens"], expected["decoded"], strict=True):
        assert np.abs(processor.decode(ids.tolist(), HORIZON, DIM) - wanted).max() <= 1e-6


def test_a_round_trip_loses_what_rounding_does(processor, expected):
    """A coefficient is off by half a step at most, and the transform keeps lengths."""
    bound = np.sqrt(HORIZON) * 0.5 / processor.scale
    worst = 0.0
    for chunk in expected["chunks"]:
        back = processor.decode(processor.encode(chunk), HORIZON, DIM)
        worst = max(worst, np.linalg.norm(back - chunk, axis=0).max())
        again = processor.decode(processor.encode(back), HORIZON, DIM)
        np.testing.assert_allclose(again, back, atol=1e-9)
    assert 0.1 * bound < worst <= bound


@pytest.mark.parametrize("shape", [(50, 7), (1, 3), (15, 8)])
@pytest.mark.parametrize("words", [True, False])
def test_a_processor_trained_here_is_one_of_the_same_kind(tmp_path, shape, words):
    chunks = np.random.default_rng(0).uniform(-1, 1, (30, *shape))
    train_processor(chunks, tmp_path, 10, 400, words=words)
    ours = FastProcessor(tmp_path)
    for chunk in chunks[:5]:
        ids = ours.encode(chunk)
        assert ids == published_encode(chunk, tmp_path)
        assert np.abs(ours.decode(ids, *shape) - chunk).max() <= np.sqrt(shape[0]) * 0.05


def test_ids_count_down_from_below_the_special_tokens(tokens, processor, expected):
    chunk = expected["chunks"][0]
    ids = tokens.encode(chunk)
    fast = processor.encode(chunk)
    assert ids.tolist() == [*tokens.lead, *(2048 - 1 - 128 - token for token in fast), tokens.bar]
    np.testing.assert_allclose(tokens.decode(ids), processor.decode(fast, HORIZON, DIM), atol=1e-6)


def test_every_id_that_can_occur_is_scored_and_no_other(tokens, processor):
    ids = set(tokens.ids.tolist())
    assert len(ids) == len(tokens.ids)
    assert {*tokens.lead, tokens.bar, tokens.eos} <= ids
    assert {2048 - 1 - 128 - token for token in range(processor.vocab_size)} <= ids
    assert len(ids) == processor.vocab_size + len({*tokens.lead, tokens.bar, tokens.eos})


def test_what_follows_the_stop_is_not_looked_at(tokens, expected):
    ids = tokens.encode(expected["chunks"][3])
    want = tokens.decode(ids)
    for behind in ([tokens.eos], [5, 5, 5], ids[:4].tolist()):
        np.testing.assert_array_equal(tokens.decode(np.array([*ids, *behind])), want)
    ended_by_eos = np.array([*ids[:-1], tokens.eos])
    np.testing.assert_array_equal(tokens.decode(ended_by_eos), want)


def malformed(tokens: ActionTokens, ids: list[int]) -> dict[str, tuple[list[int], type[Exception], str]]:
    lead, first = len(tokens.lead), tokens.first
    return {
        "no stop": (ids[:-1], NoStopError, "no stop among"),
        "nothing": ([], NoStopError, "0 tokens"),
        "a stop alone": ([tokens.bar], ActionTokenError, "'Action: '"),
        "no lead": (ids[lead:], ActionTokenError, "'Action: '"),
        "half a lead": (ids[1:], ActionTokenError, "'Action: '"),
        "a lead alone": ([*tokens.lead, tokens.bar], ActionTokenError, "hold 0 coefficients: expected 10"),
        "too few": ([*ids[:-3], tokens.bar], ActionTokenError, "coefficients: expected"),
        "too many": ([*ids[:-1], ids[lead], tokens.bar], ActionTokenError, "coefficients: expected"),
        "a word among them": ([*ids[:-2], 300, tokens.bar], ActionTokenError, "out of range"),
        "above the first": ([*ids[:-2], first + 1, tokens.bar], ActionTokenError, "FAST token -1 is out"),
    }


CASES = tuple(malformed(SimpleNamespace(lead=(0,), bar=0, first=0), [0] * 9))


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_that_is_no_chunk_is_an_error_with_its_tokens(tokens, expected, case):
    given, kind, message = malformed(tokens, tokens.encode(expected["chunks"][1]).tolist())[case]
    with pytest.raises(kind, match=message) as caught:
        tokens.decode(np.array(given, np.int64))
    assert caught.value.tokens == tuple(given)
    assert str(list(given)) in str(caught.value)
    assert isinstance(caught.value, ActionError)


def test_a_character_cut_in_two_is_an_error(tmp_path):
    """Coefficients above 127 are two bytes each: half of one is no coefficient."""
    train_processor(np.random.default_rng(0).uniform(-20, 20, (20, 2, 2)), tmp_path, 10, 260)
    wide = FastProcessor(tmp_path)
    ids = wide.encode(np.array([[20.0, 20.0], [20.0, 20.0]]))
    assert len(ids) > 4
    with pytest.raises(ActionTokenError, match="cut in two"):
        wide.decode(ids[1:], 2, 2)


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(PUBLISHED, tmp_path / "fast"))


def edit(directory: Path, **changes: object) -> None:
    file = directory / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "positive scale"),
        ({"scale": None}, "positive scale"),
        ({"min_token": "low"}, "min_token"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": 5}, "at most 5"),
    ],
)
def test_configurations_that_cannot_be(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(CheckpointError, match=message):
        FastProcessor(copied)


def test_files_that_are_damaged(copied):
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a BPE"):
        FastProcessor(copied)
    (copied / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"processor_config\.json: not JSON"):
        FastProcessor(copied)


def test_action_tokens_must_fit_the_vocabulary(processor, text_tokenizer):
    config = SimpleNamespace(vocab_size=800, horizon=HORIZON, action_dim=DIM, decode=DecodeConfig())
    with pytest.raises(CheckpointError, match="768 action tokens do not fit below id 671"):
        ActionTokens.of(processor, text_tokenizer, config)


class TestWhereAProcessorIsLookedFor:
    @pytest.fixture(autouse=True)
    def nowhere_else(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(fast_tokens, "find_spec", lambda name: None)
        monkeypatch.delenv("FLASH_RT_FAST_TOKENIZER", raising=False)
        self.checkpoint = SimpleNamespace(path=tmp_path / "checkpoint")
        self.checkpoint.path.mkdir()

    def found(self) -> Path:
        return fast_tokens.resolve_processor(self.checkpoint)

    def test_nowhere(self, tmp_path):
        with pytest.raises(TokenizerNotFoundError, match=r"physical-intelligence/fast into .*cache"):
            self.found()

    def test_in_order(self, tmp_path, monkeypatch):
        earlier = Path(shutil.copytree(PUBLISHED, tmp_path / "home" / ".cache" / "flash_rt" / "fast"))
        assert self.found() == earlier
        cache = Path(shutil.copytree(PUBLISHED, tmp_path / "cache" / "fast"))
        assert self.found() == cache
        named = Path(shutil.copytree(PUBLISHED, tmp_path / "named"))
        (self.checkpoint.path / "config.json").write_text(json.dumps({"action_tokenizer_name": str(named)}))
        assert self.found() == named
        override = Path(shutil.copytree(PUBLISHED, tmp_path / "override"))
        monkeypatch.setenv("FLASH_RT_FAST_TOKENIZER", str(override))
        assert self.found() == override
        own = Path(shutil.copytree(PUBLISHED, self.checkpoint.path / "fast"))
        assert self.found() == own

    def test_an_override_that_is_not_there_is_an_error(self, tmp_path, monkeypatch):
        shutil.copytree(PUBLISHED, self.checkpoint.path / "fast")
        monkeypatch.setenv("FLASH_RT_FAST_TOKENIZER", str(tmp_path / "missing"))
        with pytest.raises(TokenizerNotFoundError, match="missing: no processor_config"):
            self.found()

    def test_the_hub_is_asked_for_json_alone(self, monkeypatch):
        """The hub is a stand-in: tests have no network."""
        asked = []

        def snapshot_download(name, allow_patterns):
            asked.append((name, allow_patterns))
            return str(PUBLISHED)

        monkeypatch.setattr(fast_tokens, "find_spec", lambda name: True)
        hub = SimpleNamespace(snapshot_download=snapshot_download)
        monkeypatch.setattr(fast_tokens, "import_module", lambda name: hub)
        (self.checkpoint.path / "config.json").write_text('{"action_tokenizer_name": "lerobot/fast-action"}')
        assert self.found() == PUBLISHED
        assert asked == [("lerobot/fast-action", ["*.json"])]
        (self.checkpoint.path / "config.json").write_text('{"action_tokenizer_name": "./fast-action"}')
        assert self.found() == PUBLISHED
        assert asked[1:] == [("physical-intelligence/fast", ["*.json"])], "a path is no hub id"
