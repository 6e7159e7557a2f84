"""pi0-FAST: the language model itself writes the actions, as tokens (arXiv:2501.09747)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PolicyConfig
from ..errors import ObservationError, OptionError
from ..layers.kv_cache import Window
from ..layers.linear import Embedding
from .prefix import PrefixPolicy

NOTHING = -1  # an output that no token was written to: the chunk had ended
BROKEN = -2  # an output whose scores were not finite
ROWS_AT_ONCE = 16384


class DecodeKernel(Protocol):
    """One token through the language model by other means, in slots below `slots`; see
    `engine.fused_decode`.
    """

    slots: int

    def ready(self) -> bool:
        """Whether it can stand in for the stack now."""
        ...

    def hidden(self, x: Tensor, gap: int) -> Tensor:
        """As `Pi0Fast.hidden` of the embedded token x: (1, width)."""
        ...

    def repack(self) -> None:
        """Copies of the model's weights are made again, where they lie."""
        ...


@dataclass(frozen=True)
class Scoring:
    """Which tokens compete: ids (n,) int64, None for the whole vocabulary; rows (n, width), what each is
    scored with; stops (k,) int64, the tokens that end a chunk.
    """

    ids: Tensor | None
    rows: Tensor
    stops: Tensor


def score(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden @ rows^T in float32, whatever the rows' dtype: rounded scores would tie. (1, n)."""
    if rows.dtype == torch.float32:
        return F.linear(hidden.float(), rows)
    return torch.cat([F.linear(hidden.float(), part.float()) for part in rows.split(ROWS_AT_ONCE)], dim=-1)


class Pi0Fast(PrefixPolicy):
    """Prefix of views and text, bidirectional; then one token at a time, each seeing all before it.

    The last prompt token is run a second time, as the first step of decoding: its K and V are in the cache
    already, so that all that is new is its final hidden state, and prefill and decoding share nothing else.
    Everything a step needs lies on the device: a step can be captured, alone or many in a row.
    """

    def __init__(self, config: PolicyConfig, num_views: int, dtype: torch.dtype, rope_bf16: bool) -> None:
        super().__init__(config, num_views, dtype, rope_bf16, head=True)
        self.max_tokens, self.gap = 80, 0
        self.fused: DecodeKernel | None = None
        self.restricted: Scoring | None = None
        own = not config.decode.tied_head
        self.head = Embedding(config.vocab_size, config.prefix.width, dtype=dtype) if own else None

    @property
    def suffix_capacity(self) -> int:
        """Slots of generated tokens; twice as many as published decoders allow fit the model-space entry."""
        return max(512, self.max_tokens)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Temperature's noise on each score of each step; none of it when greedy."""
        if self.config.decode.temperature == 0:
            return 0, 0
        return self.max_tokens, len(self.scoring().rows)

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """T times Gumbel noise g: the largest of logits / T + g is a draw of softmax(logits / T)."""
        noise = torch.empty(self.noise_shape, dtype=torch.float32)
        return -self.config.decode.temperature * noise.exponential_(generator=generator).log()

    def new_output(self, device: torch.device) -> Tensor:
        """Tokens: (max_tokens,) int64."""
        return torch.full((self.max_tokens,), NOTHING, dtype=torch.int64, device=device)

    def decode_as(self, max_tokens: int, skip_position: bool) -> None:
        """At most so many tokens a chunk; see `FamilyRules.skip_position`. Before `prepare`."""
        self.max_tokens, self.gap = max_tokens, int(skip_position)

    def prepare(self, device: torch.device) -> None:
        """As `PrefixPolicy.prepare`, and what a step reads and leaves behind."""
        super().prepare(device)
        self.last, self.token, self.step = (
            torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.slot = torch.zeros((), dtype=torch.int32, device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        self.no_stops = torch.zeros(0, dtype=torch.int64, device=device)
        self.scoring_now: Scoring = self.scoring()

    @property
    def head_rows(self) -> Tensor:
        """What every token is scored with: (vocab_size, width)."""
        return self.paligemma.embedding.weight if self.head is None else self.head.weight

    @torch.inference_mode()
    def restrict(self, ids: Tensor, stops: Tensor) -> None:
        """Let only `ids` (n,) int64 compete from now on, and `stops` (k,) among them end a chunk."""
        self.restricted = Scoring(ids, self.head_rows[ids].float(), stops)
        self.scoring_now = self.restricted

    def scoring(self) -> Scoring:
        """What competes in a chunk: the restriction in force, or the whole vocabulary without a stop."""
        return self.restricted or Scoring(None, self.head_rows, self.no_stops)

    def prefill(self, images: Tensor, tokens: Tensor) -> None:
        """As `PrefixPolicy.prefill`; at least one token. Raises ObservationError for none."""
        if tokens.shape[0] == 0:
            raise ObservationError("pi0fast needs a prompt: every token is masked")
        super().prefill(images, tokens)
        self.last.copy_(tokens[-1:])

    def prefill_padded(self, image_features: Tensor, tokens: Tensor) -> None:
        """As `PrefixPolicy.prefill_padded`."""
        super().prefill_padded(image_features, tokens)
        before = image_features.shape[0] + 1
        self.last.copy_(tokens.index_select(0, (self.prefix_length.long() - before).view(1)))

    def generate(self, state: Tensor | None, noise: Tensor, out: Tensor) -> None:
        """The first token. out: (max_tokens,) int64, `NOTHING` behind the stop; state is in the prompt."""
        out.fill_(NOTHING)
        self.token.copy_(self.last)
        self.slot.copy_(self.prefix_length - 1)
        self.step.zero_()
        self.stopped.zero_()
        self.bound = self.prefix_bound - 1
        self._advance(noise, out, gap=0)

    def repeat(self, noise: Tensor, out: Tensor) -> None:
        """One more token."""
        self._advance(noise, out, gap=self.gap)

    def repeats(self, out: Tensor) -> int:
        """All but the first token."""
        return len(out) - 1

    def done(self) -> Tensor:
        """Whether a stop token has been written."""
        return self.stopped

    def hidden(self, gap: int) -> Tensor:
        """Final hidden state of the current token, `gap` positions behind its slot: (1, width)."""
        x = torch.empty(1, self.paligemma.width, dtype=self.dtype, device=self.token.device)
        self.paligemma.embed_text(self.token, x)
        captured = self.cache.length is None  # then only the device knows the slot, and steps are limited
        if self.fused is not None and self.fused.ready() and (captured or self.bound < self.fused.slots):
            return self.fused.hidden(x, gap)
        bound = self.cache.capacity - 1 if captured else self.bound
        window = Window.behind(self.slot, 1, bound)
        cos, sin = self.rope
        position = self.slot.long().view(1) + gap
        out: Tensor = self.paligemma.stack(x, (cos[position], sin[position]), self.cache, window)
        return out

    def _advance(self, noise: Tensor, out: Tensor, gap: int) -> None:
        """Choose the token that follows the current one, write it and make it the current one."""
        scoring = self.scoring_now
        scores = score(self.hidden(gap), scoring.rows)
        if noise.numel():
            scores = scores + noise.index_select(0, self.step)
        best, choice = scores.max(dim=-1)
        token = choice if scoring.ids is None else scoring.ids.index_select(0, choice)
        written = torch.where(best.isfinite(), token, BROKEN)
        out.index_copy_(0, self.step, torch.where(self.stopped, NOTHING, written))
        self.stopped.logical_or_((token == scoring.stops).any())
        self.token.copy_(token)
        self.slot += 1
        self.step += 1
        self.bound += 1

    def sample_tokens(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        max_tokens: int,
        stop: int | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        pruned: bool = False,
    ) -> Tensor:
        """Token ids (n,) int64, n <= max_tokens, the stop token last; arguments as `Policy.sample_tokens`.

        tokens: the whole prompt, a BOS at its end included where the family has one. Raises OptionError for
        more tokens than the cache has slots, and for `pruned` without a restriction.
        """
        if not 1 <= max_tokens <= self.suffix_capacity:
            raise OptionError(f"max_tokens must be from 1 to {self.suffix_capacity}, got {max_tokens}")
        if pruned and self.restricted is None:
            raise OptionError("pruned scoring needs the action tokens of a FAST processor: none is loaded")
        device = self.token.device
        within = self.scoring() if pruned else Scoring(None, self.head_rows, self.no_stops)
        stops = self.no_stops if stop is None else torch.tensor([stop], dtype=torch.int64, device=device)
        noise = torch.empty(0, 0)
        if temperature > 0:
            noise = torch.empty(max_tokens, len(within.rows)).exponential_(generator=generator)
            noise = -temperature * noise.log()
        out = torch.full((max_tokens,), NOTHING, dtype=torch.int64, device=device)
        self.scoring_now = Scoring(within.ids, within.rows, stops)
        try:
            self.sample(images, image_mask, tokens, token_mask, None, noise.to(device), out)
        finally:
            self.scoring_now = self.scoring()
        return out[out != NOTHING]

    def weights_changed(self) -> None:
        """The fused step has packed copies."""
        if self.fused is not None:
            self.fused.repack()

    def release(self) -> None:
        """The fused step refers back to the model."""
        self.fused = None
