"""The timeline: which action is due at this control tick.

Chunks are spliced by the count of commands really sent since their observation, never by an estimated
latency: a chunk whose observation was handed to the model k commands ago starts k commands into itself.
Ticks on which the robot was held count for nothing, so the first chunk starts at action 0 however long the
first inference took. An action is never played more than `open_loop_cap` after the start of its chunk; when
actions run out the robot is held by representation (absolute: last command; delta, velocity: zero), and
after `hold_deadline` commands stop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .chunk import at_control_rate, blend, check_chunk
from .contract_model import FloatArray, Representation, RobotContract
from .errors import ChunkError, TimelineConfigError
from .reasons import Reason
from .timing import period_ratio, to_s


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
    and its action next due (0 and 0 when none): the remainder that real-time chunking conditions on.
    """

    sent: int
    generation: int
    serial: int
    sequence: int
    index: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A chunk was spliced in.

    consumed: its control ticks covered by commands sent since the mark. start_index: first of its actions
    still due. blended: whether it was cross-faded with what was playing.
    """

    sequence: int
    generation: int
    consumed: int
    start_index: int
    blended: bool


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
    phase: action of that chunk and control ticks into it, -1 and 0 unless RUNNING. Arrays are shared: do
    not write to them.
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


Admit = Callable[[FloatArray], Dropped | None]


class Timeline:
    """Thread-safe: `tick` for the control thread, `mark_observation` and `submit` for the worker.

    The lock is held for tens of microseconds at most; `admit` runs under it, so it must be as quick.
    """

    def __init__(
        self,
        dof: int,
        representation: Representation,
        action_period: int,
        control_period: int,
        open_loop_cap: int,
        blend_steps: int,
        hold_deadline: int,
        lookahead: int | None = None,
    ) -> None:
        """Periods and durations in ns; `lookahead` bounds Command.lookahead (default: the open-loop cap).

        Raises TimelineConfigError when the control rate is no integer multiple of the action rate, or when
        the cap is shorter than one action.
        """
        try:
            self._ratio = period_ratio(action_period, control_period)
        except ValueError as error:
            raise TimelineConfigError(str(error)) from error
        rounding = action_period // 1000
        self._cap_actions = (open_loop_cap + rounding) // action_period
        if self._cap_actions < 1 or dof < 1 or blend_steps < 0 or hold_deadline < 0:
            raise TimelineConfigError(
                f"expected dof >= 1, open_loop_cap >= one action ({to_s(action_period):g} s), "
                f"blend_steps >= 0 and hold_deadline >= 0; got {dof}, {to_s(open_loop_cap):g} s, "
                f"{blend_steps} and {to_s(hold_deadline):g} s"
            )
        reach = min(open_loop_cap, open_loop_cap if lookahead is None else lookahead)
        self._dof = dof
        self._representation = representation
        self._control_period = control_period
        self._blend_ticks = blend_steps * self._ratio
        self._hold_ticks = hold_deadline // control_period
        self._lookahead_ticks = (reach + rounding) // control_period
        self._rest = np.zeros(dof)
        self._lock = threading.Lock()
        self._generation = 0
        self._sequence = 0
        self._serial = 0  # of the last mark
        self._accepted_serial = 0  # mark of the chunk accepted last
        self._sent = 0
        self._clear(CommandKind.WAITING)

    @classmethod
    def from_contract(cls, contract: RobotContract) -> Timeline:
        """A timeline with a contract's periods, cap, blend, deadline and longest trajectory lookahead."""
        return cls(
            dof=contract.dof,
            representation=contract.action.representation,
            action_period=contract.action.period,
            control_period=contract.rates.control_period,
            open_loop_cap=contract.timeline.open_loop_cap,
            blend_steps=contract.timeline.blend_steps,
            hold_deadline=contract.timeline.hold_deadline,
            lookahead=contract.trajectory_lookahead,
        )

    def _clear(self, kind: CommandKind) -> None:
        """Forget the path and the last command: nothing to hold, nothing to blend with."""
        self._kind = kind
        self._path: FloatArray = np.empty((0, self._dof))
        self._cursor = 0  # next row of the path
        self._offset = 0  # control ticks of the chunk before the path's first row
        self._last: FloatArray | None = None  # last values sent
        self._before_last: FloatArray | None = None
        self._held = 0  # ticks held so far
        self._reason = Reason.OK  # why nothing plays, when it is not plain starvation

    @property
    def kind(self) -> CommandKind:
        """Kind of the last tick."""
        return self._kind

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def sequence(self) -> int:
        """Sequence number of the last accepted chunk; counts up from 1 and never restarts."""
        return self._sequence

    @property
    def pending(self) -> bool:
        """Whether the next tick would play an action."""
        with self._lock:
            return self._cursor < len(self._path)

    @property
    def remaining(self) -> int:
        """Time for which actions are left [ns]."""
        with self._lock:
            return (len(self._path) - self._cursor) * self._control_period

    @property
    def idle_reason(self) -> Reason:
        """Why nothing is commanded while WAITING or STOPPED."""
        with self._lock:
            return self._idle_reason()

    def _idle_reason(self) -> Reason:
        if self._kind is CommandKind.STOPPED:
            return Reason.HOLD_DEADLINE
        return self._reason or Reason.NO_CHUNK

    def mark_observation(self) -> ObservationMark:
        """Note where the timeline stands; call it when an observation is handed to the model."""
        with self._lock:
            self._serial += 1
            playing = self._cursor < len(self._path)
            return ObservationMark(
                sent=self._sent,
                generation=self._generation,
                serial=self._serial,
                sequence=self._sequence if playing else 0,
                index=(self._offset + self._cursor) // self._ratio if playing else 0,
            )

    def submit(
        self, actions: ArrayLike, mark: ObservationMark, admit: Admit | None = None
    ) -> Accepted | Dropped:
        """Splice in a chunk (H, dof) computed from the observation of `mark`.

        `admit` may refuse the commands that would follow, (n, dof) at control rate and already blended.
        Never raises for a bad chunk: Dropped says CHUNK_SHAPE, CHUNK_NOT_FINITE, OLD_GENERATION, CHUNK_ORDER,
        CHUNK_LATE (all its actions within the cap have been covered), or what `admit` said.
        """
        try:
            checked = check_chunk(actions, self._dof)
        except ChunkError as error:
            return Dropped(error.reason, str(error))
        whole = at_control_rate(checked[: self._cap_actions], self._ratio, self._representation)
        with self._lock:
            if (refused := self._fence(mark, len(whole))) is not None:
                return refused
            consumed = self._consumed(mark)
            path = whole[consumed:]
            blended = self._last is not None and self._blend_ticks > 0
            if blended:
                path = blend(self._future(min(self._blend_ticks, len(path))), path, self._blend_ticks)
            if admit is not None and (refused := admit(path)) is not None:
                return refused
            path.flags.writeable = False
            self._path, self._cursor, self._offset = path, 0, consumed
            self._held, self._reason, self._accepted_serial = 0, Reason.OK, mark.serial
            self._sequence += 1
            return Accepted(self._sequence, self._generation, consumed, -(-consumed // self._ratio), blended)

    def _fence(self, mark: ObservationMark, length: int) -> Dropped | None:
        if mark.generation != self._generation:
            text = f"computed for generation {mark.generation}, now {self._generation}"
            return Dropped(Reason.OLD_GENERATION, text)
        if mark.serial <= self._accepted_serial:
            return Dropped(Reason.CHUNK_ORDER, "a chunk of this or a later observation is already playing")
        if (consumed := self._consumed(mark)) >= length:
            text = f"{consumed} commands were sent since its observation, it covers {length}"
            return Dropped(Reason.CHUNK_LATE, text)
        return None

    def _consumed(self, mark: ObservationMark) -> int:
        """Commands sent since the mark; a mark set between a tick and its refusal would count one too few."""
        return max(0, self._sent - mark.sent)

    def _future(self, count: int) -> FloatArray:
        """The next `count` commands if nothing new came: the rest of the path, then the hold."""
        rest = self._path[self._cursor : self._cursor + count]
        if self._representation is Representation.ABSOLUTE and self._last is not None:
            hold = rest[-1] if len(rest) else self._last
        else:
            hold = self._rest
        return np.concatenate([rest, np.tile(hold, (count - len(rest), 1))])

    def tick(self) -> Command:
        """The command due now; advances by one control period."""
        with self._lock:
            if self._cursor < len(self._path):
                return self._run()
            if self._last is None:
                return self._silent(self._idle_reason())
            self._held += 1
            if self._held > self._hold_ticks:
                self._clear(CommandKind.STOPPED)
                return self._silent(Reason.HOLD_DEADLINE)
            self._kind = CommandKind.HOLDING
            return self._hold(self._last, self._reason or Reason.STARVED)

    def _run(self) -> Command:
        values = self._path[self._cursor]
        index, phase = divmod(self._offset + self._cursor, self._ratio)
        lookahead, offsets = self._ahead(phase)
        self._cursor += 1
        self._sent += 1
        self._before_last, self._last = self._last, values
        self._held = 0
        self._kind = CommandKind.RUNNING
        return Command(
            self._kind, Reason.OK, values, lookahead, offsets, self._sequence, index, phase, self._generation
        )

    def _ahead(self, phase: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Points at action period after the row at the cursor, and their due offsets."""
        ratio, end = self._ratio, min(len(self._path), self._cursor + self._lookahead_ticks + 1)
        first = ratio - phase
        if self._representation is Representation.DELTA:
            first = ratio - 1 - phase or ratio  # an increment is complete on the last tick of its action
        points = self._path[self._cursor + first : end : ratio]
        if self._representation is Representation.DELTA and ratio > 1 and len(points):
            starts = np.concatenate([[0], first + ratio * np.arange(len(points) - 1)])
            stop = self._cursor + 1 + first + ratio * (len(points) - 1)
            points = np.add.reduceat(self._path[self._cursor + 1 : stop], starts, axis=0)
        offsets = (first + ratio * np.arange(len(points), dtype=np.int64)) * self._control_period
        return points, offsets

    def _hold(self, last: FloatArray, reason: Reason) -> Command:
        values = last if self._representation is Representation.ABSOLUTE else self._rest
        count = self._lookahead_ticks // self._ratio
        step = self._ratio * self._control_period
        return Command(
            CommandKind.HOLDING, reason, values, np.tile(values, (count, 1)),
            step * np.arange(1, count + 1, dtype=np.int64), self._sequence, -1, 0, self._generation,
        )

    def _silent(self, reason: Reason) -> Command:
        empty, none = np.empty((0, self._dof)), np.empty(0, dtype=np.int64)
        return Command(self._kind, reason, None, empty, none, self._sequence, -1, 0, self._generation)

    def hold_command(self) -> Command | None:
        """The hold for what was sent last, without advancing: a node's farewell. None: nothing to hold."""
        with self._lock:
            return None if self._last is None else self._hold(self._last, self._reason or Reason.STARVED)

    def confirm(self, values: FloatArray) -> None:
        """Tell that the last ticked command went out as `values`: a hold repeats what was really sent."""
        with self._lock:
            if self._last is not None:
                self._last = values

    def refuse(self, reason: Reason) -> None:
        """Tell that the last ticked RUNNING command was not sent: its chunk is dropped and the robot held."""
        with self._lock:
            self._sent -= 1
            self._last = self._before_last
            self._flush(reason)

    def bump_generation(self) -> int:
        """Fence off every chunk computed before now, drop the one playing and hold. Returns the
        generation."""
        with self._lock:
            self._generation += 1
            self._flush(Reason.NO_CHUNK)
            return self._generation

    def _flush(self, reason: Reason) -> None:
        self._path, self._cursor, self._reason = self._path[:0], 0, reason
        if self._last is None and self._kind is not CommandKind.STOPPED:
            self._kind = CommandKind.WAITING

    def reset(self) -> int:
        """Fence and forget everything, as before the first chunk. Returns the generation."""
        with self._lock:
            self._generation += 1
            self._clear(CommandKind.WAITING)
            return self._generation
