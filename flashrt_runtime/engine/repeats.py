"""What a model repeats until it is done, as a graph of one step or of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import PrefixPolicy


class Repeats:
    """`model.repeat` captured behind `model.generate`, whose buffers it reads and writes.

    whole: every step is in one graph, and nothing is asked in between. Otherwise a graph of one step is
    replayed until the model is done; the answer is read one step late, so that the GPU never waits for the
    host: at most one step too many is run, which changes nothing.
    """

    def __init__(self, model: PrefixPolicy, noise: Tensor, out: Tensor, whole: bool) -> None:
        self.model, self.noise, self.out = model, noise, out
        total = model.repeats(out)
        self.steps_at_once = total if whole else 1
        self.replays = 1 if whole else total
        self.answers = torch.zeros(2, dtype=torch.bool, pin_memory=True)
        self.asked = [torch.cuda.Event(blocking=True) for _ in range(2)]
        self.graph = torch.cuda.CUDAGraph()

    @torch.inference_mode()
    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """On the current stream `stream`, after `model.generate` has run there."""
        self.model.repeat(self.noise, self.out)  # libraries choose algorithms outside the capture
        stream.synchronize()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            for _ in range(self.steps_at_once):
                self.model.repeat(self.noise, self.out)

    def run(self) -> None:
        """Enqueue the repeats on the current stream; waits for answers only."""
        if self.replays == 1:
            self.graph.replay()
            return
        self._ask(0)
        for step in range(self.replays):
            self.graph.replay()
            self._ask(step + 1)
            self.asked[step % 2].synchronize()
            if self.answers[step % 2]:
                return

    def _ask(self, step: int) -> None:
        """Whether the model was done before the replay of `step`."""
        done = self.model.done()
        assert done is not None
        self.answers[step % 2].copy_(done, non_blocking=True)
        self.asked[step % 2].record()
