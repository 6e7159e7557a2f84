"""FAST action tokens: a chunk as DCT coefficients, rounded, written as text and byte-pair encoded
(arXiv:2501.09747).

The processor is two files, as the public `fast` processor is published: tokenizer.json (a byte-level BPE of
the `tokenizers` library) and processor_config.json (scale, min_token, vocab_size). No code of it is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..cache import cache_directory, looked_for
from ..checkpoints.base import Checkpoint
from ..checkpoints.hub import is_hub_id
from ..checkpoints.json_fields import JsonObject
from ..checkpoints.tokenizer import FAST_FOLDER
from ..config import PolicyConfig
from ..errors import ActionTokenError, CheckpointError, NoStopError, TokenizerNotFoundError

BPE_FILE, CONFIG_FILE = "tokenizer.json", "processor_config.json"
ENVIRONMENT_VARIABLE = "FLASH_RT_FAST_TOKENIZER"
HUB_ID = "physical-intelligence/fast"
ACTION_TEXT, STOP_TEXT = "Action: ", "|"
REPLACEMENT = "\ufffd"  # what a byte-level decoder writes for bytes that are no UTF-8

Floats = NDArray[np.float64]


@lru_cache(maxsize=8)
def dct_matrix(length: int) -> Floats:
    """Orthonormal DCT-II as a (length, length) matrix; its transpose is the inverse.

    A matrix of at most 50 x 50 in place of a dependency on scipy for one function.
    """
    k, n = np.arange(length)[:, None], np.arange(length)
    matrix: Floats = np.sqrt(2.0 / length) * np.cos(np.pi * (2 * n + 1) * k / (2 * length))
    matrix[0] /= np.sqrt(2.0)
    return matrix


class FastProcessor:
    """Chunks (horizon, dim) in model space to FAST ids and back."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError when a file is missing, damaged or disagrees with the other."""
        self.directory = directory
        config = JsonObject.read(directory / CONFIG_FILE)
        scale, minimum = config.number("scale"), config.integer("min_token")
        self.vocab_size = config.required_integer("vocab_size")
        if scale is None or not scale > 0 or minimum is None:
            raise CheckpointError(f"{config.file}: expected a positive scale and a min_token")
        self.scale, self.min_token = scale, minimum
        try:
            self.bpe: Any = Tokenizer.from_file(str(directory / BPE_FILE))
        except Exception as error:  # the library raises plain Exception
            file = directory / BPE_FILE
            raise CheckpointError(f"{file}: not a BPE of the tokenizers library: {error}") from error
        found = self.bpe.get_vocab_size()
        if found > self.vocab_size:
            raise CheckpointError(
                f"{directory}: {BPE_FILE} has {found} tokens, {CONFIG_FILE} says at most {self.vocab_size}"
            )

    def encode(self, actions: NDArray[np.floating]) -> list[int]:
        """FAST ids of a chunk (horizon, dim); coefficients below min_token are raised to it, as published."""
        coefficients = np.around(dct_matrix(len(actions)) @ actions.astype(np.float64) * self.scale)
        characters = np.maximum(coefficients.reshape(-1) - self.min_token, 0).astype(np.int64)
        ids: list[int] = self.bpe.encode("".join(map(chr, characters))).ids
        return ids

    def decode(self, ids: Sequence[int], horizon: int, dim: int) -> Floats:
        """The chunk (horizon, dim) that `ids` stand for.

        Raises ActionTokenError for an unknown id, bytes that are no text, and another number of
        coefficients.
        """
        unknown = [token for token in ids if not 0 <= token < self.bpe.get_vocab_size()]
        if unknown:
            limit = self.bpe.get_vocab_size() - 1
            raise ActionTokenError(f"FAST token {unknown[0]} is out of range: expected 0 to {limit}", ids)
        text: str = self.bpe.decode(list(ids), skip_special_tokens=False)
        if REPLACEMENT in text:
            raise ActionTokenError("the FAST tokens are no text: a character is cut in two", ids)
        if len(text) != horizon * dim:
            raise ActionTokenError(
                f"the FAST tokens hold {len(text)} coefficients: expected {horizon} actions x {dim} = "
                f"{horizon * dim}",
                ids,
            )
        coefficients = np.array([ord(character) for character in text], np.float64) + self.min_token
        chunk: Floats = dct_matrix(horizon).T @ (coefficients.reshape(horizon, dim) / self.scale)
        return chunk


@dataclass(frozen=True)
class ActionTokens:
    """A policy's token ids for an action chunk: `Action: `, FAST tokens counted down from `first`, `|`.

    lead: ids of `Action: `; bar: id of `|`; eos: openpi writes it behind the bar; first: id of FAST token 0;
    horizon, dim: of a chunk.
    """

    processor: FastProcessor
    lead: tuple[int, ...]
    bar: int
    eos: int
    first: int
    horizon: int
    dim: int

    @classmethod
    def of(cls, processor: FastProcessor, tokenizer: Path, config: PolicyConfig) -> ActionTokens:
        """tokenizer: a SentencePiece model. Raises CheckpointError when the three do not fit."""
        import sentencepiece

        text = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        bar = text.encode(STOP_TEXT)
        if len(bar) != 1:
            raise CheckpointError(
                f"{tokenizer}: {STOP_TEXT!r} is {len(bar)} tokens: not PaliGemma's tokenizer"
            )
        first = config.vocab_size - 1 - config.decode.skip_ids
        if first < processor.vocab_size:
            raise CheckpointError(
                f"{processor.directory}: {processor.vocab_size} action tokens do not fit below id {first} of "
                f"the policy's {config.vocab_size}"
            )
        lead = tuple(text.encode(ACTION_TEXT))
        return cls(processor, lead, bar[0], text.eos_id(), first, config.horizon, config.action_dim)

    @property
    def stops(self) -> NDArray[np.int64]:
        """Ids that end a chunk."""
        return np.array([self.bar, self.eos], np.int64)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Every id that can occur in a chunk, ascending: what a pruned head scores."""
        actions = self.first - np.arange(self.processor.vocab_size)
        ids: NDArray[np.int64] = np.unique(np.concatenate((actions, self.lead, self.stops))).astype(np.int64)
        return ids

    def encode(self, actions: NDArray[np.floating]) -> NDArray[np.int64]:
        """Ids of a chunk (horizon, dim), lead and bar included."""
        tokens = self.processor.encode(actions)
        return np.array([*self.lead, *(self.first - token for token in tokens), self.bar], np.int64)

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Actions (horizon, dim) float32 in model space from generated tokens (n,); what follows the first
        stop is not looked at.

        Raises NoStopError, or ActionTokenError with every generated token: no `Action: ` at the beginning,
        a token that is no action's, tokens that are no chunk.
        """
        given = [int(token) for token in tokens]
        end = next((at for at, token in enumerate(given) if token in (self.bar, self.eos)), None)
        if end is None:
            raise NoStopError(f"no stop among the {len(given)} tokens of a chunk", given)
        lead = len(self.lead)
        if tuple(given[:lead]) != self.lead:
            raise ActionTokenError(f"no {ACTION_TEXT!r} {list(self.lead)} at the chunk's beginning", given)
        ids = [self.first - token for token in given[lead:end]]
        try:
            return self.processor.decode(ids, self.horizon, self.dim).astype(np.float32)
        except ActionTokenError as error:
            reason = str(error).partition("; the ")[0]
            raise ActionTokenError(reason, given) from error


def open_action_tokens(checkpoint: Checkpoint, tokenizer: Path) -> ActionTokens:
    """The action tokens of a pi0-FAST checkpoint; tokenizer: its SentencePiece model.

    Raises TokenizerNotFoundError without a FAST processor, CheckpointError for one that does not fit.
    """
    return ActionTokens.of(FastProcessor(resolve_processor(checkpoint)), tokenizer, checkpoint.config)


def cache_folder() -> Path:
    """Where a processor that every checkpoint may use is put."""
    return cache_directory() / FAST_FOLDER


def resolve_processor(checkpoint: Checkpoint) -> Path:
    """The directory of a checkpoint's FAST processor.

    Order: `fast/` of the checkpoint, $FLASH_RT_FAST_TOKENIZER, the directory that LeRobot's config.json names
    as action_tokenizer_name, `cache_folder()`, the hub where `huggingface_hub` is installed. Raises
    TokenizerNotFoundError that says where it was looked for.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override and not (Path(override) / CONFIG_FILE).is_file():
        raise TokenizerNotFoundError(
            f"{ENVIRONMENT_VARIABLE}={override}: no {CONFIG_FILE} there; correct it or unset it"
        )
    named = _named(checkpoint.path / "config.json")
    others = [Path(name) for name in (override, named) if name]
    places = [checkpoint.path / FAST_FOLDER, *others, *looked_for(FAST_FOLDER)]
    found = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    if found is not None:
        return found
    reason = ""
    wanted = named if is_hub_id(named) else HUB_ID
    if find_spec("huggingface_hub") is not None:
        hub: Any = import_module("huggingface_hub")
        try:
            return Path(hub.snapshot_download(wanted, allow_patterns=["*.json"]))
        except Exception as error:  # the hub's own types, of many versions
            reason = f", nor on the hub ({(str(error) or type(error).__name__).splitlines()[0]})"
    looked = ", ".join(map(str, places))
    raise TokenizerNotFoundError(
        f"no FAST processor ({BPE_FILE}, {CONFIG_FILE}) in {looked}{reason}. Put the files of {wanted} into "
        f"{cache_folder()}, or name their directory in {ENVIRONMENT_VARIABLE}"
    )


def _named(config: Path) -> str:
    return (JsonObject.read(config).text("action_tokenizer_name") or "") if config.is_file() else ""


def train_processor(
    chunks: NDArray[np.floating], directory: Path, scale: float, vocab_size: int, *, words: bool = True
) -> None:
    """Write a processor fitted to chunks (n, horizon, dim), in the published format: for checkpoints that no
    public processor was made for, and tests.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    transformed = np.einsum("kt,ntd->nkd", dct_matrix(chunks.shape[1]), chunks)
    coefficients = np.around(transformed * scale).astype(int)
    low = int(coefficients.min())
    texts = ["".join(map(chr, chunk.reshape(-1) - low)) for chunk in coefficients]
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[*pre_tokenizers.ByteLevel.alphabet()],
        max_token_length=10000,
    )
    bpe.train_from_iterator(iter(texts), trainer=trainer)
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / BPE_FILE))
    config = {
        "action_dim": None,
        "min_token": low,
        "processor_class": "UniversalActionProcessor",
        "scale": scale,
        "time_horizon": None,
        "vocab_size": max(vocab_size, bpe.get_vocab_size()),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
