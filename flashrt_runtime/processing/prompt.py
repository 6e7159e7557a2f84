"""Prompts to token ids, in the format each policy was trained with.

Formats: openpi `tokenizer.py` (PaligemmaTokenizer), LeRobot `processor_pi05.py` and `processor_pi0.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from ..config import FamilyRules, PolicyName
from ..errors import CheckpointError, ObservationError, PromptError, PromptTooLongError
from .state import discretize


def clean_prompt(prompt: str, rules: FamilyRules) -> str:
    """The instruction as the family tokenises it: trimmed, underscores and newlines to spaces; LeRobot's pi0
    keeps it as it is. Raises PromptError when nothing is left to say."""
    if not isinstance(prompt, str):
        raise PromptError(f"prompt: expected text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise PromptError("the prompt is empty: say what the robot shall do")
    if not rules.clean_underscores:
        return prompt
    if rules.lowercase:  # openpi's pi0-FAST, which keeps newlines
        return prompt.lower().strip().replace("_", " ")
    return prompt.strip().replace("_", " ").replace("\n", " ")


class PromptEncoder:
    """Tokenises instructions with a SentencePiece model."""

    def __init__(
        self,
        tokenizer: Path,
        policy: PolicyName,
        rules: FamilyRules,
        capacity: int,
        vocab_size: int | None = None,
    ) -> None:
        """tokenizer: a SentencePiece model file; capacity: tokens the policy has room for; vocab_size: rows
        of its token embedding. Raises CheckpointError for a damaged model or one with ids the policy does not
        have."""
        self.policy = policy
        self.rules = rules
        self.capacity = capacity
        try:
            self.processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        except (RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{tokenizer}: not a SentencePiece model: {error}") from error
        pieces = self.processor.vocab_size()
        if vocab_size is not None and pieces > vocab_size:
            raise CheckpointError(
                f"{tokenizer}: {pieces} pieces, but the policy's token embedding has {vocab_size} rows"
            )
        if self.processor.bos_id() < 0:
            raise CheckpointError(
                f"{tokenizer}: no beginning-of-sequence piece; this is not PaliGemma's tokenizer"
            )

    def text(self, prompt: str, normalized_state: NDArray[np.float32] | None = None) -> str:
        """The full text that is tokenised, newline included.

        With the state in the prompt: `Task: {prompt}, State: {bins};\\nAction: `, where pi0-FAST generates
        the second line itself; else the prompt and a newline.
        """
        cleaned = clean_prompt(prompt, self.rules)
        if self.rules.state_in_prompt:
            if normalized_state is None:
                raise ObservationError("this policy reads the state from its prompt: a state is needed")
            bins = " ".join(str(index) for index in discretize(normalized_state))
            return f"Task: {cleaned}, State: {bins};\n" + ("" if self.policy == "pi0fast" else "Action: ")
        return cleaned if cleaned.endswith("\n") else f"{cleaned}\n"

    def encode(self, prompt: str, normalized_state: NDArray[np.float32] | None = None) -> NDArray[np.int64]:
        """Token ids (L,) int64, L <= capacity, BOS first (and last where the rules say so), no EOS, no
        padding.

        normalized_state: (n,) float32, needed when the state is in the prompt and ignored otherwise.
        Raises PromptError, PromptTooLongError (the text is never cut off) or ObservationError.
        """
        text = self.text(prompt, normalized_state)
        try:
            if not self.rules.state_in_prompt and self.rules.clean_underscores:
                # openpi tokenises the newline on its own, LeRobot with the text before it.
                ids = self.processor.encode(text[:-1]) + self.processor.encode("\n")
            else:
                ids = self.processor.encode(text)
        except (RuntimeError, UnicodeError) as error:  # lone surrogates are no text
            raise PromptError(f"prompt {prompt!r}: cannot be tokenised: {error}") from error
        bos = self.processor.bos_id()
        tokens = [bos, *ids, bos] if self.rules.end_with_bos else [bos, *ids]
        if len(tokens) > self.capacity:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens, {self.policy} has room for {self.capacity}: shorten "
                f"{prompt!r}"
            )
        return np.asarray(tokens, dtype=np.int64)
