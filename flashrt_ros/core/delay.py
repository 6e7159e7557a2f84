"""How many actions are consumed while the model computes: what real-time chunking has to freeze."""

from __future__ import annotations

import math
from collections import deque

from .timeline_types import Accepted, ObservationMark

WINDOW = 20
QUANTILE = 0.9


class DelayEstimate:
    """A high quantile of the delays of the last chunks, counted in actions that were really sent.

    Only chunks that came while another one played count: the first inference after a start, which may take
    seconds, does not, and a slow one is forgotten after `window` chunks. Belongs to one thread.
    """

    def __init__(self, ratio: int, window: int = WINDOW, quantile: float = QUANTILE) -> None:
        """ratio: control ticks an action lasts. Raises ValueError for arguments out of range."""
        if ratio < 1 or window < 1 or not 0.0 < quantile <= 1.0:
            raise ValueError(
                f"expected ratio, window >= 1 and 0 < quantile <= 1, got {ratio}, {window}, {quantile}"
            )
        self._ratio = ratio
        self._quantile = quantile
        self._delays: deque[int] = deque(maxlen=window)

    def add(self, mark: ObservationMark, accepted: Accepted) -> None:
        """Count the chunk of `mark`, unless nothing played when its observation was taken."""
        if mark.sequence != 0:
            # The last tick sent lies on or before the last frozen action; one at least, the one due next.
            self._delays.append(max(1, -(-(accepted.consumed - 1) // self._ratio) + 1))

    def clear(self) -> None:
        """Forget everything (a new start)."""
        self._delays.clear()

    @property
    def actions(self) -> int:
        """Actions that most inferences leave time for, as the number to freeze; 0 before any was counted."""
        if not self._delays:
            return 0
        rank = math.ceil(len(self._delays) * self._quantile - 1e-9)
        return sorted(self._delays)[rank - 1]
