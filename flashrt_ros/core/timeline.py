"""The timeline: which action is due at this control tick.

Chunks are spliced by the count of commands really sent since their observation, never by an estimated
latency: a chunk whose observation was handed to the model k commands ago starts k commands into itself.
Ticks on which the robot was held count for nothing, so the first chunk starts at action 0 however long the
first inference took. An action is never played more than `open_loop_cap` after the start of its chunk; when
actions run out the robot is held by representation (absolute: last command; delta, velocity: zero), for one
tick at least, and after `hold_deadline` commands stop.

Counts alone would let an old plan outlive a pause, so a monotonic clock bounds them: the age of a chunk's
observation, the wait of an accepted chunk for its first tick, the hold, and the gap between two ticks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .chunk import at_action_rate, at_control_rate, blend, check_chunk
from .contract_model import FloatArray, Representation, RobotContract
from .errors import ChunkError, TimelineConfigError
from .reasons import Reason
from .timeline_types import Accepted, Command, CommandKind, Dropped, ObservationMark
from .timing import period_ratio, to_s

__all__ = ["Accepted", "Admit", "Command", "CommandKind", "Dropped", "ObservationMark", "Timeline"]

# Ticks further apart than this many control periods, and than this time [ns], mean that control stood still.
STALL_PERIODS, STALL_TIME = 5, 100_000_000

Admit = Callable[[FloatArray], Dropped | None]
Limit = Callable[[FloatArray], FloatArray]


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
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Periods and durations in ns; `lookahead` bounds Command.lookahead (default: the open-loop cap);
        `clock` gives monotonic time in ns.

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
        self._hold_deadline = hold_deadline
        self._cap = open_loop_cap
        self._stall = max(STALL_PERIODS * control_period, STALL_TIME)
        self._clock = clock
        self._lookahead_ticks = (reach + rounding) // control_period
        self._rest = np.zeros(dof)
        self._lock = threading.Lock()
        self._generation = self._sequence = 0
        self._serial = 0  # of the last mark
        self._accepted_serial = 0  # mark of the chunk accepted last
        self._fenced_serial = 0  # last mark before the last stop or stall
        self._broken_serial = 0  # last mark whose plan was dropped before it was played
        self._ticked: int | None = None  # monotonic time of the last tick
        self._sent = 0
        self._clear(CommandKind.WAITING)

    @classmethod
    def from_contract(
        cls, contract: RobotContract, clock: Callable[[], int] = time.monotonic_ns
    ) -> Timeline:
        """A timeline with a contract's periods, cap, blend, deadline and longest trajectory lookahead."""
        spec = contract.timeline
        return cls(
            contract.dof, contract.action.representation, contract.action.period,
            contract.rates.control_period, spec.open_loop_cap, spec.blend_steps, spec.hold_deadline,
            lookahead=contract.trajectory_lookahead, clock=clock,
        )

    def _clear(self, kind: CommandKind) -> None:
        """Forget the path and the last command: nothing to hold, nothing to blend with."""
        self._kind = kind
        self._path: FloatArray = np.empty((0, self._dof))
        self._beyond = self._path  # what the chunk holds past the cap: planned, never played
        self._cursor = 0  # next row of the path
        self._offset = 0  # control ticks of the chunk before the path's first row
        self._last: FloatArray | None = None  # last values sent
        self._before_last: FloatArray | None = None
        self._held = 0  # ticks held so far
        self._held_since = 0  # monotonic time of the first of them
        self._accepted_at = 0  # monotonic time at which the path was accepted
        self._stop_reason = Reason.HOLD_DEADLINE
        self._reason = Reason.OK  # why nothing plays, when it is not plain starvation

    def adopt_limits(self, contract: RobotContract) -> None:
        """Take cap, blend and deadline of `contract` from the next tick on; all else must be as before.

        A chunk that plays ends at the new cap. Raises TimelineConfigError, and then changes nothing.
        """
        other = Timeline.from_contract(contract)
        names = ("cap", "cap_actions", "blend_ticks", "hold_ticks", "hold_deadline", "lookahead_ticks")
        with self._lock:
            for name in names:
                setattr(self, f"_{name}", getattr(other, f"_{name}"))
            end = max(self._cursor, self._cap_actions * self._ratio - self._offset)
            self._beyond = np.concatenate([self._path[end:], self._beyond])  # planned as before
            self._path = self._path[:end]

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
            return self._stop_reason
        return self._reason or Reason.NO_CHUNK

    def mark_observation(self, taken: int | None = None) -> ObservationMark:
        """Note where the timeline stands; call it when an observation is handed to the model.

        `taken`: monotonic time of the observation [ns], now when None.
        """
        with self._lock:
            self._serial += 1
            playing, ahead = self._cursor < len(self._path), [self._path[self._cursor :], self._beyond]
            return ObservationMark(
                sent=self._sent,
                generation=self._generation,
                serial=self._serial,
                sequence=self._sequence if playing else 0,
                index=(self._offset + self._cursor) // self._ratio if playing else 0,
                taken=self._clock() if taken is None else taken,
                path=np.concatenate(ahead) if playing else self._path[:0],
            )

    def plan(self, mark: ObservationMark) -> FloatArray:
        """A mark's path as actions (n, dof), due when those of a chunk from its observation are."""
        return at_action_rate(mark.path, self._ratio, self._representation)

    def submit(
        self, actions: ArrayLike, mark: ObservationMark, admit: Admit | None = None, frozen: int = 0,
        limit: Limit = lambda values: values,
    ) -> Accepted | Dropped:
        """Splice in a chunk (H, dof) computed from the observation of `mark`.

        `frozen`: how many of its first actions are those of the mark's plan (real-time chunking). A chunk
        spliced in among them goes on where the plan is, so it is not blended with it as well.
        `admit` may refuse the commands that would follow, (n, dof) at control rate and already blended;
        `limit` tells as what a command (dof,) would be sent now, which the seam is measured against.
        Never raises for a bad chunk: Dropped says CHUNK_SHAPE, CHUNK_NOT_FINITE, OLD_GENERATION, CHUNK_ORDER,
        CHUNK_LATE (all its actions within the cap have been covered, its observation is older than the cap
        and the hold deadline together, or from before a stop or stall), or what `admit` said.
        """
        try:
            checked = check_chunk(actions, self._dof)
        except ChunkError as error:
            return Dropped(error.reason, str(error))
        whole = at_control_rate(checked, self._ratio, self._representation)
        covered = len(at_control_rate(checked[: self._cap_actions], self._ratio, self._representation))
        with self._lock:
            if (refused := self._fence(mark, covered)) is not None:
                return refused
            consumed = self._consumed(mark)
            path = whole[consumed:covered]
            goes_on = self._last is None or self._goes_on(mark, consumed, frozen)
            if blended := self._blend_ticks > 0 and not goes_on:
                path = blend(self._future(min(self._blend_ticks, len(path))), path, self._blend_ticks)
            if admit is not None and (refused := admit(path)) is not None:
                return refused
            jump = self._jump(path[0], limit)
            path.flags.writeable = False
            self._path, self._beyond, self._cursor, self._offset = path, whole[covered:], 0, consumed
            self._held, self._reason, self._accepted_serial = 0, Reason.OK, mark.serial
            self._accepted_at = self._clock()
            self._sequence += 1
            start_index = -(-consumed // self._ratio)
            return Accepted(self._sequence, self._generation, consumed, start_index, blended, jump)

    def _goes_on(self, mark: ObservationMark, consumed: int, frozen: int) -> bool:
        """Whether a chunk leaves its frozen part no sooner than it is spliced in, and that was played."""
        in_force = mark.sequence == self._sequence and mark.serial > self._broken_serial
        return frozen > 0 and in_force and consumed <= (frozen - 1) * self._ratio + 1

    def _jump(self, first: FloatArray, limit: Limit) -> float:
        """Accepted's jump of a path that begins with the command `first`."""
        if self._last is None:
            return 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # absurd wishes; the limiter sees to them
            return float(np.abs(first - limit(self._future(1)[0])).max())

    def _fence(self, mark: ObservationMark, length: int) -> Dropped | None:
        if mark.generation != self._generation:
            text = f"computed for generation {mark.generation}, now {self._generation}"
            return Dropped(Reason.OLD_GENERATION, text)
        if mark.serial <= self._accepted_serial:
            return Dropped(Reason.CHUNK_ORDER, "a chunk of this or a later observation is already playing")
        if (consumed := self._consumed(mark)) >= length:
            text = f"{consumed} commands were sent since its observation, it covers {length}"
            return Dropped(Reason.CHUNK_LATE, text)
        if mark.serial <= self._fenced_serial:
            return Dropped(Reason.CHUNK_LATE, "its observation was taken before commands stopped or stalled")
        if (age := self._clock() - mark.taken) > (bound := self._cap + self._hold_deadline):
            text = f"its observation is {to_s(age):.3f} s old; the bound (cap + hold) is {to_s(bound):g} s"
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
            now = self._clock()
            stalled = self._watch(now)
            if self._cursor < len(self._path):
                return self._run()
            if self._last is None:
                return replace(self._silent(self._idle_reason()), stalled=stalled)
            self._held += 1
            self._held_since = now if self._held == 1 else self._held_since
            over = self._held > max(1, self._hold_ticks) or now - self._held_since > self._hold_deadline
            if over and not stalled:  # after a stall one hold goes out, where the robot is by then
                self._stop(Reason.HOLD_DEADLINE)
                return self._silent(Reason.HOLD_DEADLINE)
            self._kind = CommandKind.HOLDING
            return replace(self.hold(self._last, self._reason or Reason.STARVED), stalled=stalled)

    def watch(self) -> bool:
        """Tell that the control thread is alive but asks for no command now: a chunk waiting for its first
        tick expires after the open-loop cap. Returns whether ticks had stopped coming (Command.stalled)."""
        with self._lock:
            return self._watch(self._clock())

    def _watch(self, now: int) -> bool:
        """Drop the plan when ticks had stopped coming (returned) or it waited too long to be started."""
        gap = 0 if self._ticked is None else now - self._ticked
        self._ticked = now
        stalled = gap > self._stall
        if stalled and self._last is not None:
            self._fenced_serial = self._serial  # the robot may have gone on along its lookahead, uncounted
            self._flush(Reason.CONTROL_STALLED)
            return True
        waiting = self._cursor == 0 and len(self._path) > 0
        if waiting and now - self._accepted_at > self._cap + self._control_period:  # a tick may be that far
            self._flush(Reason.CHUNK_LATE)
        return stalled

    def stop(self, reason: Reason) -> None:
        """Stop for `reason`, as after the hold deadline: only a chunk of a later observation starts again."""
        with self._lock:
            self._stop(reason)

    def _stop(self, reason: Reason) -> None:
        self._clear(CommandKind.STOPPED)
        self._stop_reason = reason
        self._fenced_serial = self._serial

    def _run(self) -> Command:
        values = self._path[self._cursor]
        index, phase = divmod(self._offset + self._cursor, self._ratio)
        lookahead, offsets = self._ahead(phase)
        self._cursor += 1
        self._sent += 1
        self._before_last, self._last = self._last, values
        self._held, self._kind = 0, CommandKind.RUNNING
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

    def hold(self, last: FloatArray, reason: Reason) -> Command:
        """The hold for `last`, values of a command sent; nothing advances."""
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
            return None if self._last is None else self.hold(self._last, self._reason or Reason.STARVED)

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
        """Fence off every chunk computed before now, drop the one playing, hold. Returns the generation."""
        with self._lock:
            self._generation += 1
            self._flush(Reason.NO_CHUNK)
            return self._generation

    def _flush(self, reason: Reason) -> None:
        self._path, self._cursor, self._reason = self._path[:0], 0, reason
        self._beyond, self._broken_serial = self._path, self._serial
        if self._last is None and self._kind is not CommandKind.STOPPED:
            self._kind = CommandKind.WAITING

    def reset(self) -> int:
        """Fence and forget everything, as before the first chunk. Returns the generation."""
        with self._lock:
            self._generation += 1
            self._clear(CommandKind.WAITING)
            return self._generation
