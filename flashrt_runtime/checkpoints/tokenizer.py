"""Where the PaliGemma SentencePiece model comes from, and a small one trained for random checkpoints."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache import cache_directory, home_directory, looked_for
from ..errors import CheckpointError, TokenizerNotFoundError

if TYPE_CHECKING:
    from .base import Checkpoint

ENVIRONMENT_VARIABLE = "FLASH_RT_PALIGEMMA_TOKENIZER"
FILE_NAME = "paligemma_tokenizer.model"
IN_CHECKPOINT = ("tokenizer.model", FILE_NAME)
FAST_FOLDER = "fast"  # of a checkpoint: the processor of pi0-FAST's action tokens
DOWNLOAD_COMMAND = "flashrt download-tokenizer"

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3


def tokenizer_in(directory: Path) -> Path | None:
    """The SentencePiece model that a checkpoint directory carries, if any."""
    for name in IN_CHECKPOINT:
        if (directory / name).is_file():
            return directory / name
    return None


def cache_file() -> Path:
    """Where the downloaded tokenizer is kept."""
    return cache_directory() / FILE_NAME


def search_path() -> tuple[Path, ...]:
    """Places looked at when neither the checkpoint nor the environment names a tokenizer, in order."""
    home = home_directory()
    openpi = () if home is None else (home / ".cache" / "openpi" / "big_vision" / FILE_NAME,)
    return (*looked_for(FILE_NAME), *openpi, Path("/workspace") / FILE_NAME)


def resolve_tokenizer(checkpoint: Checkpoint) -> Path:
    """The SentencePiece model for a checkpoint.

    Order: the checkpoint's own file, $FLASH_RT_PALIGEMMA_TOKENIZER, `search_path()`, openpi's public bucket
    when gcsfs is installed. An environment variable that names no file is an error even when another place
    has one. Raises TokenizerNotFoundError whose message is the command that fetches it.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override and not Path(override).is_file():
        raise TokenizerNotFoundError(
            f"{ENVIRONMENT_VARIABLE}={override}: no such file; correct it, unset it, or run: "
            f"{DOWNLOAD_COMMAND}"
        )
    if checkpoint.tokenizer is not None:
        return checkpoint.tokenizer
    found = Path(override) if override else next(filter(Path.is_file, search_path()), None)
    if found is None:
        found = _fetched(checkpoint)
    _check_vocabulary(found, checkpoint.config.vocab_size)
    return found


def _fetched(checkpoint: Checkpoint) -> Path:
    """From openpi's bucket, where gcsfs is installed."""
    if find_spec("gcsfs") is None:
        looked = ", ".join(map(str, search_path()))
        raise TokenizerNotFoundError(
            f"no PaliGemma tokenizer in {checkpoint.path}, ${ENVIRONMENT_VARIABLE}, {looked}. "
            f"Run: {DOWNLOAD_COMMAND}"
        )
    from .download import TokenizerDownloadError, download_with_gcsfs

    try:
        return download_with_gcsfs(cache_file())
    except TokenizerDownloadError as error:
        raise TokenizerNotFoundError(
            f"no PaliGemma tokenizer, and {error}. Run: {DOWNLOAD_COMMAND}"
        ) from error


def _check_vocabulary(file: Path, vocab_size: int) -> None:
    """A tokenizer that did not come with the checkpoint must have exactly the vocabulary of its embedding."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model: {error}") from error
    if pieces != vocab_size:
        raise TokenizerNotFoundError(
            f"{file} has {pieces} pieces, but the policy was trained with {vocab_size}: it is another "
            "tokenizer"
        )


# fmt: off
VERBS = ("pick up", "put", "place", "open", "close", "push", "move", "stack", "grasp", "turn on", "lift")
OBJECTS = (
    "block", "cube", "bowl", "plate", "mug", "drawer", "cabinet", "gripper", "stove", "bottle", "basket",
    "box", "butter", "cream cheese", "moka pot", "book", "wine rack", "ramekin", "cookie box", "caddy",
)
COLOURS = ("red", "blue", "green", "yellow", "black", "white")
PLACES = ("on the table", "in the basket", "next to the plate", "in the top drawer", "behind the box")
# fmt: on


def training_sentences() -> list[str]:
    """Robot instructions in both prompt formats: enough text for a few hundred merges."""
    sentences = []
    for index, (verb, thing) in enumerate((verb, thing) for verb in VERBS for thing in OBJECTS):
        colour, place = COLOURS[index % len(COLOURS)], PLACES[index % len(PLACES)]
        text = f"{verb} the {colour} {thing} and place it {place}"
        state = " ".join(str((index * 37 + joint * 53) % 257 - 1) for joint in range(8))
        sentences += [text, f"Task: {text}, State: {state};", "Action: "]
    return sentences


def train_tokenizer(vocab_size: int) -> bytes:
    """A SentencePiece BPE model with PaliGemma's conventions: ids pad 0, eos 1, bos 2, unk 3; digits split,
    byte fallback, no dummy prefix, whitespace kept, newline a piece of its own. The same bytes on every run.

    vocab_size: 256 byte pieces and about 80 characters are the floor.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        bos_id=BOS_ID,
        unk_id=UNK_ID,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
