"""What goes in and out of the timeline: marks, verdicts on chunks, commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from .contract_model import FloatArray
from .reasons import Reason


class CommandKind(Enum):
    """What a tick asks for; only RUNNING and HOLDING carry values to publish."""

    WAITING = "waiting"  # nothing has been commanded since the last reset
    RUNNING = "running"
    HOLDING = "holding"
    STOPPED = "stopped"  # hold deadline passed: silence until a chunk comes


@dataclass(frozen=True, slots=True)
class ObservationMark:
    """Where the timeline stood when an observation was handed to the model.

    sent: commands of chunks sent so far. serial: order of marks. sequence and index: the chunk then playing
    and its action next due (0 and 0 when none). taken: monotonic time of the observation [ns].
    path: (n, dof) float64 at control rate, what would be played from the next tick on, blended as it is and
    past the open-loop cap, before the limits; empty when nothing plays. start and speed: (dof,) position
    commanded last and speed there, from which the limits judge it; None where the commander had none.
    """

    sent: int
    generation: int
    serial: int
    sequence: int
    index: int
    taken: int
    path: FloatArray = field(default_factory=lambda: np.empty((0, 0)), compare=False, repr=False)
    start: FloatArray | None = field(default=None, compare=False, repr=False)
    speed: FloatArray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A chunk was spliced in.

    consumed: its control ticks covered by commands sent since the mark. start_index: first of its actions
    still due. blended: whether it was cross-faded with what was playing. jump: how far its first command is
    from the one that would have been sent in its place, largest of the joints [units of a command]; 0 when
    there was nothing before.
    """

    sequence: int
    generation: int
    consumed: int
    start_index: int
    blended: bool
    jump: float = 0.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A chunk was refused; what played before goes on."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Command:
    """One control tick.

    values: (dof,) float64, None when WAITING or STOPPED. lookahead: (n, dof), the points at action period
    that follow if nothing new comes, due offsets[i] ns after this command (absolute, velocity: their
    values; delta: increments since the point before). sequence: chunk in force, 0 for none. index and
    phase: action of that chunk and control ticks into it, -1 and 0 unless RUNNING. stalled: this tick found
    that the ticks before it had stopped coming. Arrays are shared: do not write to them.
    """

    kind: CommandKind
    reason: Reason
    values: FloatArray | None
    lookahead: FloatArray
    offsets: NDArray[np.int64]
    sequence: int
    index: int
    phase: int
    generation: int
    stalled: bool = False
