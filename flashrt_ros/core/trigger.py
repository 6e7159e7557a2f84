"""When to run the model next: as soon as it is free (back to back), at a fixed rate, or on a watermark."""

from __future__ import annotations

from collections.abc import Callable

from .contract_model import RatesSpec


class InferenceTrigger:
    """Asked whenever something new came or the worker became free. Belongs to one thread."""

    def __init__(self, rates: RatesSpec, remaining: Callable[[], int] = lambda: 0) -> None:
        """`remaining`: time for which actions are left to play [ns], read in watermark mode."""
        self._period = rates.inference_period
        self._watermark = rates.inference_watermark
        self._remaining = remaining
        self._next: int | None = None

    def due(self, now_mono_ns: int) -> bool:
        """Whether an inference may start now; a True counts as started."""
        if self._watermark is not None:
            return self._remaining() < self._watermark
        if self._period is None:
            return True
        if self._next is None:
            self._next = now_mono_ns
        if now_mono_ns < self._next:
            return False
        # Stays on the grid of the first start; periods that were missed are skipped, not made up for.
        self._next += ((now_mono_ns - self._next) // self._period + 1) * self._period
        return True

    def reset(self) -> None:
        """The next call of `due` is the first."""
        self._next = None
