"""Timeline and limiter as one: what the control thread asks for a command, and the worker for a place for
its chunk.

Keeps the position commanded last. The first command after a start, a reset or a stop is limited from the
measured joint positions, so commands never jump to where the arm is not. Silence never follows a command that
moves the arm: a hold comes between, velocities are brought down to zero, and acceleration limits are kept,
whatever the deadlines say.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .contract_model import FloatArray, OnViolation, Representation, RobotContract
from .errors import CoreError
from .limits import Limited, Limiter, Violation
from .reasons import Reason
from .timeline import Accepted, Command, CommandKind, Dropped, ObservationMark, Timeline
from .timing import period_ratio, to_s
from .trajectory import TrajectoryPoints, trajectory_points


@dataclass(frozen=True, slots=True)
class Output:
    """What to publish for one control tick; `values` None means silence (WAITING, STOPPED).

    values: (dof,) float64 in the contract's action representation and robot units. trajectory: the same
    command and its lookahead as positions, None when no output is a JointTrajectory. violations: wishes
    clamped or refused now. sequence and index: chunk in force and its action, 0 and -1 when there is none.
    positions: (dof,) where the command leads to, in robot units; None with silence. refused: what was due was
    not sent and its chunk dropped, for `reason`.
    """

    kind: CommandKind
    reason: Reason
    message: str
    values: FloatArray | None
    trajectory: TrajectoryPoints | None
    violations: tuple[Violation, ...]
    sequence: int
    index: int
    generation: int
    positions: FloatArray | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Why no chunk is played for now; `until`: when the hold ends in silence [ns, monotonic], None: never."""

    reason: Reason
    message: str
    until: int | None


class Commander:
    """`tick` and `farewell` belong to one thread (control); `mark_observation`, `plan` and `submit` to the
    worker's; `pause`, `resume` and `adopt_limits` to any."""

    def __init__(
        self, contract: RobotContract, measured: Callable[[], FloatArray],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`measured` returns the action joints' current positions (dof,) in robot units, or raises a
        CoreError; `clock` gives monotonic time in ns."""
        self.timeline = Timeline.from_contract(contract, clock)
        self.limiter = Limiter(contract)
        self._measured = measured
        self._clock = clock
        self._hold_deadline = contract.timeline.hold_deadline
        self._pause: Pause | None = None
        self._stepping = threading.Lock()  # marks and chunks come between two ticks
        self._representation = contract.action.representation
        self._action_period = contract.action.period
        self._control_period = contract.rates.control_period
        self._rejects = contract.on_violation is OnViolation.REJECT
        self._trajectories = contract.trajectory_lookahead > 0
        self._reference: FloatArray | None = None  # position commanded last
        self._speed: FloatArray | None = None  # at which it was reached, None at rest
        self._moving = False  # whether what was sent last moves the arm until something else is sent
        self._gap = False  # whether ticks had stopped coming before this one

    def mark_observation(self, taken: int | None = None) -> ObservationMark:
        """See Timeline.mark_observation; with what `plan` needs."""
        with self._stepping:
            mark = self.timeline.mark_observation(taken)
            return replace(mark, start=self._reference, speed=self._speed)

    def plan(self, mark: ObservationMark, actions: int | None = None) -> FloatArray:
        """What is sent from a mark on if nothing new comes, limits included, as actions (n, dof), at most
        `actions`, of which the first is due at the next tick: what real-time chunking conditions on. Empty
        when nothing played.

        The same limiter from the same state gives the very commands; where it judges from measured positions,
        those that go out if the robot follows. 30 us while limits are kept, else 6 us a command, 40 us with
        acceleration limits.
        """
        ticks = None if actions is None else actions * period_ratio(self._action_period, self._control_period)
        path = mark.path[:ticks]
        if not len(path):
            return path
        periods = np.full(len(path), self._control_period, dtype=np.int64)
        try:
            start = self._measured() if mark.start is None else mark.start
            limited = self.limiter.apply_path(path, start, periods, mark.speed)
        except CoreError:  # nor will any of it be sent
            return path[:0]
        return self.timeline.plan(replace(mark, path=limited.values))

    def submit(self, actions: ArrayLike, mark: ObservationMark, frozen: int = 0) -> Accepted | Dropped:
        """Splice in a chunk (horizon, dof) in robot units of which the first `frozen` actions are those of
        `plan(mark)`; see Timeline.submit.

        When the contract rejects violations, a chunk with a command beyond a limit, at its seam or inside, is
        dropped whole with LIMIT_POSITION or LIMIT_VELOCITY. While paused, every chunk is dropped.
        """
        if (pause := self._pause) is not None:
            return Dropped(pause.reason, pause.message)
        admit = self._admit if self._rejects else None
        with self._stepping:
            return self.timeline.submit(actions, mark, admit, frozen, self._as_sent)

    def _as_sent(self, values: FloatArray) -> FloatArray:
        """A command as it would go out at the next tick."""
        reference = self._reference
        if reference is None:
            return values
        try:
            return self.limiter.apply(values, reference, self._speed).values
        except CoreError:
            return values

    def _admit(self, path: FloatArray) -> Dropped | None:
        start = self._reference
        try:
            start = self._measured() if start is None else start
        except CoreError as error:
            return Dropped(error.reason, str(error))
        periods = np.full(len(path), self._control_period, dtype=np.int64)
        violation = self.limiter.first_violation(path, start, periods, self._speed)
        return None if violation is None else Dropped(violation.reason, str(violation))

    def pause(self, reason: Reason, message: str, *, bounded: bool) -> None:
        """Drop what plays and hold from the next tick on until `resume`; another pause in force is replaced.

        bounded: after the hold deadline there is silence, as after starvation. To ask again for the pause in
        force changes nothing: the deadline is that of the first time.
        """
        now = self._pause
        if now is not None and (now.reason, now.message, now.until is not None) == (reason, message, bounded):
            return
        until = self._clock() + self._hold_deadline if bounded else None
        self._pause = Pause(reason, message, until)  # before the fence: a chunk must not slip in between
        self.timeline.bump_generation()

    def resume(self) -> None:
        """Follow chunks again: those of observations from now on."""
        if self._pause is not None:
            self.timeline.bump_generation()
            self._pause = None

    def adopt_limits(self, contract: RobotContract) -> None:
        """Take limits, cap, blend and deadline of `contract`; all else must be as before. Any thread."""
        limiter = Limiter(contract)
        self.timeline.adopt_limits(contract)
        self._hold_deadline = contract.timeline.hold_deadline
        self._rejects = contract.on_violation is OnViolation.REJECT
        self.limiter = limiter

    def tick(self) -> Output:
        """The command due now, within limits; advances the timeline by one control period."""
        with self._stepping:
            return self._tick()

    def _tick(self) -> Output:
        if (pause := self._pause) is not None:
            return self._paused(pause)
        if self._reference is None:
            self.timeline.watch()
            if not self.timeline.pending:
                return self._silence(self.timeline.idle_reason)
            try:
                self._reference, self._speed = self.limiter.check_start(self._measured()), None
            except CoreError as error:
                return self._silence(error.reason, str(error))
        command = self.timeline.tick()
        self._gap = command.stalled
        if command.values is None:
            return self._silence(command.reason)
        return self._stalled() if self._gap else self._limited(command)

    def _paused(self, pause: Pause) -> Output:
        """Hold what was commanded last, after a stall where the robot is; silence when nothing was commanded,
        or once the pause's bound is over."""
        self._gap = self.timeline.watch()
        over = pause.until is not None and self._clock() >= pause.until
        if over and not self._gap and not self._moving:
            if self.timeline.kind is not CommandKind.STOPPED:
                self.timeline.stop(pause.reason)
            return self._silence(pause.reason, pause.message)
        command = self.timeline.hold_command()
        if command is None or self._reference is None:
            return self._quiet(pause)
        held = self._stalled() if self._gap else self._limited(command)
        return self._quiet(pause) if held.values is None else replace(
            held, reason=pause.reason, message=pause.message
        )

    def _quiet(self, pause: Pause) -> Output:
        """Silence that no longer counts as running, whatever the last tick before the pause was."""
        quiet = self._silence(pause.reason, pause.message)
        if quiet.values is not None or quiet.kind is CommandKind.STOPPED:
            return quiet
        return replace(quiet, kind=CommandKind.WAITING)

    def _stalled(self) -> Output:
        """Hold where the robot is now: while no tick came it may have gone on along its last lookahead."""
        if (error := self._settle()) is not None:
            self.timeline.stop(error.reason)
            return self._silence(error.reason, str(error))
        assert self._reference is not None
        self.timeline.confirm(self._reference)
        command = self.timeline.hold_command()
        return self._silence(self.timeline.idle_reason) if command is None else self._limited(command)

    def _settle(self) -> CoreError | None:
        """Go on from where the robot is now, at rest. Returns why that is not known: then silence it is, but
        for velocities, of which zero is right wherever the robot is."""
        self._speed = None
        try:
            self._reference = self.limiter.check_start(self._measured())
        except CoreError as error:
            if self._representation is not Representation.VELOCITY:
                self._moving = False
                return error
        return None

    def farewell(self) -> Output | None:
        """The last message before going silent (deactivate, shutdown): a hold. None when nothing was
        commanded, or when ticks had stopped coming and the robot's position is not known."""
        self._gap = self.timeline.watch()
        command = self.timeline.hold_command()
        if self._representation is Representation.VELOCITY:
            self._speed = None  # nothing follows that could brake further: zero, whatever the acceleration
        if command is None or self._reference is None:
            output = self._silence(Reason.HELD)
        else:
            output = self._stalled() if self._gap else self._limited(command)
        return None if output.values is None else output

    def reset(self) -> int:
        """Fence and forget everything; call it while no control thread runs. Returns the new generation."""
        self._reference = self._speed = self._pause = None
        self._moving = False
        return self.timeline.reset()

    @property
    def moving(self) -> bool:
        """Whether what was sent last moves the arm until something else is sent. Any thread."""
        return self._moving

    @property
    def _brakes(self) -> bool:
        """Whether a last hold is not enough before silence: the arm goes on with its velocity, or would stop
        harder than its acceleration limits allow."""
        velocity = self._representation is Representation.VELOCITY
        return self._moving and (velocity or self.limiter.bounds_acceleration)

    def _braked(self, reason: Reason, message: str = "") -> Output:
        """A hold, as near to standing as acceleration limits allow; after a stall where the robot is now, or
        silence when that is not known."""
        assert self._reference is not None
        self._moving = False  # if nothing can be sent, silence it is
        if self._gap and (error := self._settle()) is not None:
            return self._silence(error.reason, str(error))
        held = self._limited(self.timeline.hold(self._reference, reason))
        return replace(held, message=message or reason.text)

    def _follow(
        self, start: FloatArray, values: FloatArray, positions: FloatArray, kind: CommandKind
    ) -> None:
        """Note where a command that is sent leads."""
        speed = (positions - start) / to_s(self._control_period)
        self._reference, self._speed = positions, speed
        if self._representation is Representation.VELOCITY:
            self._moving = bool(values.any())
        else:
            braking = self.limiter.bounds_acceleration and bool(speed.any())
            self._moving = braking or kind is CommandKind.RUNNING

    def _silence(self, reason: Reason, message: str = "", violations: tuple[Violation, ...] = ()) -> Output:
        """No command, once nothing moves any more."""
        if self._brakes:
            return self._braked(reason, message)
        self._reference = self._speed = None
        self._moving = False
        timeline = self.timeline
        return Output(
            timeline.kind, reason, message or reason.text, None, None, violations,
            timeline.sequence, -1, timeline.generation,
        )

    def _limited(self, command: Command) -> Output:
        start = self._start()
        try:
            limited = self._apply(command, start)
        except CoreError as error:
            if command.kind is not CommandKind.RUNNING:
                return self._silence(error.reason, str(error))
            return self._refused(error.reason, str(error), ())
        if limited.violations and self._rejects and command.kind is CommandKind.RUNNING:
            first = limited.violations[0]
            return self._refused(first.reason, str(first), limited.violations)
        values = limited.values[0]
        self._follow(start, values, limited.positions[0], command.kind)
        violations = limited.violations
        if command.kind is CommandKind.RUNNING:
            self.timeline.confirm(values)
        elif self.limiter.bounds_acceleration:
            # A hold that brakes does what it should; the next one holds where this one got to.
            violations = tuple(v for v in violations if v.reason is not Reason.LIMIT_ACCELERATION)
            self.timeline.confirm(values)
        message = "" if command.reason is Reason.OK else command.reason.text
        return Output(
            command.kind, command.reason, message, values, self._trajectory(limited, command.offsets, start),
            violations, command.sequence, command.index, command.generation, self._reference,
        )

    def _start(self) -> FloatArray:
        """Position that this command moves on from; velocities and increments that leave as such do not know
        where they lead, so it is measured."""
        assert self._reference is not None
        if self.limiter.from_measured:
            try:
                return self.limiter.check_start(self._measured())
            except CoreError:
                return self._reference  # predicted from the last measurement until the synchroniser stops us
        return self._reference

    def _apply(self, command: Command, start: FloatArray) -> Limited:
        assert command.values is not None
        rows = command.values[None, :]
        periods = np.array([self._control_period], dtype=np.int64)
        if self._trajectories:
            rows = np.concatenate([rows, command.lookahead])
            periods = np.concatenate([periods, np.diff(command.offsets, prepend=0)])
        standing = command.kind is CommandKind.HOLDING and self.limiter.bounds_acceleration
        return self.limiter.apply_path(rows, start, periods, self._speed, standing)

    def _trajectory(
        self, limited: Limited, offsets: NDArray[np.int64], previous: FloatArray
    ) -> TrajectoryPoints | None:
        if not self._trajectories:
            return None
        return trajectory_points(
            limited.positions, offsets, action_period=self._action_period, previous=previous,
            control_period=self._control_period,
        )

    def _refused(self, reason: Reason, message: str, violations: tuple[Violation, ...]) -> Output:
        """Drop the chunk and hold; with nothing to hold yet, stay silent."""
        self.timeline.refuse(reason)
        command = self.timeline.hold_command()
        held = self._silence(reason, message) if command is None else self._limited(command)
        return replace(held, reason=reason, message=message, violations=violations, refused=True)
