"""What a configured policy node consists of: streams in, model on its worker thread, commands out on theirs.

    executor threads -> Synchroniser -> (worker) PolicyRunner, Commander.submit -> (control) Commander.tick
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rclpy.clock import Clock

from flashrt_ros.core.calibration_job import CalibrationJob
from flashrt_ros.core.commander import Commander, Output
from flashrt_ros.core.contract import OnViolation, RobotContract
from flashrt_ros.core.control import ControlThread
from flashrt_ros.core.errors import CoreError
from flashrt_ros.core.images import FallbackDecoder
from flashrt_ros.core.ingest import MeasuredPositions
from flashrt_ros.core.latch import DEFAULT_MAX_FAILURES, FaultLatch
from flashrt_ros.core.measurements import Measurements, SeamMeter
from flashrt_ros.core.problem import Problem
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.refusals import MessageInspector
from flashrt_ros.core.sync import Synchroniser
from flashrt_ros.core.timeline import Accepted
from flashrt_ros.core.timing import to_s
from flashrt_ros.core.worker import InferenceResult, InferenceWorker

from .failures import describe, reason_of
from .policy_runner import PolicyLike, PolicyRunner, Prediction
from .scheduling import prefer_this_thread

SENDING_PATIENCE = 1.0  # how long the last command may wait for one that is being sent [s]


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A prediction that the timeline accepted; `due`: when its action 0 is or was due [ns, ROS time]."""

    prediction: Prediction
    accepted: Accepted
    due: int


def guarded(handler: Callable[[Any], None]) -> Callable[[Any], None]:
    """`handler`, for a thread that must go on: what it raises becomes a line on stderr."""

    def call(subject: Any) -> None:
        try:
            handler(subject)
        except Exception as error:
            with contextlib.suppress(Exception):  # there is no other way left to say it
                text = f"{type(subject).__name__} not reported ({type(error).__name__}: {error}): {subject}"
                print(f"flashrt_ros: {text}", file=sys.stderr, flush=True)

    return call


class Pipeline:
    """Owns the worker and the control thread. `start` and `stop` may be repeated; `close` ends it.

    publish_command(output, stamp) runs on the control thread, publish_chunk(placed) on the worker's,
    on_problem(problem) on either. All three must be quick and may use thread-safe publishers only.
    """

    def __init__(
        self,
        contract: RobotContract,
        clock: Clock,
        *,
        publish_command: Callable[[Output, int], None],
        publish_chunk: Callable[[PlacedChunk], None],
        on_problem: Callable[[Problem], None],
        fallback_decoder: FallbackDecoder | None = None,
        seed: int | None = None,
        max_failures: int = DEFAULT_MAX_FAILURES,
    ) -> None:
        """`max_failures`: see FaultLatch."""
        self.contract = contract
        self.synchroniser = Synchroniser(contract)
        self.measured = Measurements()
        self.inspector = MessageInspector(
            contract, self.measured.refused, exotic=fallback_decoder is not None
        )
        self.latch = FaultLatch(max_failures)
        positions = MeasuredPositions(contract, self.synchroniser)
        self.commander = Commander(contract, lambda: positions(time.monotonic_ns()))
        self.problem: Problem | None = None
        self.output: Output | None = None  # of the last control tick
        self.last_violation: tuple[int, Problem] | None = None  # [ns, monotonic]
        self.control: ControlThread | None = None
        self.held = False  # by `hold`
        self.calibration: CalibrationJob | None = None  # under way, or failed where it is needed
        self._clock = clock
        self._publish_command, self._publish_chunk = publish_command, publish_chunk
        self._on_problem = guarded(on_problem)
        self._seams = SeamMeter(self.measured, contract.rates.control_period)
        self._placing = threading.Lock()
        self._sending = threading.Lock()  # nothing may follow the last command of `stop`
        self._pausing = threading.Lock()  # what the latch and the hold say is put in force as one
        self._next_due = 0  # when the next control tick is due [ns, ROS time]
        self._active = False
        self._started = 0  # [ns, monotonic clock]
        self.runner = PolicyRunner(
            contract, clock, self.synchroniser, self.commander, self.measured, self._report,
            self._on_observation, fallback_decoder, seed,
        )
        self.worker: InferenceWorker[None, Prediction | None] = InferenceWorker(
            lambda _job: self.runner.infer(lambda: self.playing), self._on_result,
            guarded(self._on_worker_error),
        )
        self.worker.start()

    # Life, on the executor's thread

    @property
    def active(self) -> bool:
        """Between start and stop."""
        return self._active

    @property
    def playing(self) -> bool:
        """Active, and neither held, in fault nor calibrating: chunks are wanted."""
        wanted = self.calibration is None and self.latch.fault is None
        return self._active and not self.held and wanted

    @property
    def policy(self) -> PolicyLike | None:
        """The loaded policy."""
        return self.runner.policy

    @property
    def prompt(self) -> str:
        """The prompt in force, empty for none."""
        return self.runner.prompt

    @property
    def fault(self) -> Problem | None:
        """What is latched; while active also which of the threads has died, and what to do."""
        if (latched := self.latch.fault) is not None:
            return latched
        control = self.control
        if not self._active or control is None:
            return None
        if not control.running:
            text = "the control thread has died, nothing is commanded: deactivate and activate again"
            return Problem(Reason.CONTROL_ERROR, "", text)
        if not self.worker.running:
            text = "the inference thread has died: deactivate, clean up and configure again"
            return Problem(Reason.WORKER_STOPPED, "", text)
        return None

    @property
    def stuck(self) -> Problem | None:
        """Why it must not be started now: a thread of the last time would send its old command yet."""
        if self._active or self.control is None or not self.control.running:
            return None
        text = "the control thread of the last activation has not ended: try again, or end this node"
        return Problem(Reason.CONTROL_ERROR, "", text)

    @property
    def running_for(self) -> float:
        """Time since start [s]."""
        return to_s(time.monotonic_ns() - self._started)

    def load(self, loader: Callable[[], PolicyLike], prompt: str, wait: Callable[[], bool]) -> None:
        """Load the policy on the worker thread, check it against the contract, set the prompt ("" for none).

        `wait` is asked every 50 ms whether to go on. Raises what the loader and the prompt raise,
        PolicyMismatchError, InterruptedError when `wait` says no, or RuntimeError when the thread died.
        """

        self._result_of(self.worker.call(lambda: self.runner.adopt(loader(), prompt)), wait)

    def start(self) -> None:
        """Begin to infer and to command, from a fresh timeline."""
        self.commander.reset()
        self.synchroniser.clear()
        self.worker.call(self.runner.forget)
        self.problem, self.output, self.held = None, None, False
        self.measured.clear()
        self._seams.reset()
        self._next_due = self._clock.now().nanoseconds + self.contract.rates.control_period
        on_error = guarded(self._on_control_error)
        self.control = ControlThread(
            self.contract.rates.control_period, self._tick, on_error, on_start=prefer_this_thread
        )
        self._started = time.monotonic_ns()
        self._active = True
        self.control.start()

    def stop(self) -> None:
        """Command a hold, then nothing; chunks still being computed are dropped."""
        if not self._active:
            return
        self.worker.withdraw()
        ended = self.control is None or self.control.stop()  # the tick under way still sends
        self._active = False
        if (calibration := self.calibration) is not None and calibration.for_activation:
            calibration.cancelled.set()
        farewell = self.commander.farewell()
        self.commander.reset()
        if farewell is not None and self._sending.acquire(timeout=SENDING_PATIENCE):
            try:
                self._publish_command(farewell, self._clock.now().nanoseconds)
            finally:
                self._sending.release()
        if not ended:
            text = "the control thread is stuck and did not stop; it sends no more commands once it goes on"
            self._report(Problem(Reason.CONTROL_ERROR, "", text))

    def close(self) -> None:
        """Stop, free the policy on its own thread and join that thread; an error in closing is reported."""
        try:
            self.stop()
        finally:
            if (calibration := self.calibration) is not None:
                calibration.cancelled.set()
            policy, self.runner.policy = self.policy, None
            try:
                if policy is not None:
                    self._result_of(self.worker.call(policy.close))
            except Exception as error:
                text = f"the policy could not be closed: {describe(error)}"
                self._report(Problem(Reason.INFERENCE_ERROR, "", text))
            finally:
                self.worker.stop()

    def _result_of(self, future: Future[None], go_on: Callable[[], bool] = lambda: True) -> None:
        """Wait for a call on the worker as long as that thread lives and `go_on` agrees."""
        while True:
            try:
                return future.result(timeout=0.05)
            except TimeoutError:
                alive = self.worker.running  # before `done`: it may do the work and end just now
                if future.done():  # or the call raised a TimeoutError of its own
                    return future.result()
                if not alive:
                    raise RuntimeError("the inference thread has died") from None
                if not go_on():
                    raise InterruptedError("asked to stop while the checkpoint was being loaded") from None

    def set_prompt(self, prompt: str, reset: bool) -> None:
        """Use `prompt` from the next inference on; raises what the policy says about it.

        reset: drop the chunk that plays and the one being computed, and hold until the next.
        """
        self.runner.set_prompt(prompt)
        # After the prompt: an inference marks the timeline first and reads the prompt then, so none that
        # passes the fence has used the old one.
        if reset:
            self.commander.timeline.bump_generation()

    def new_episode(self) -> None:
        """Drop the chunk that plays and the one being computed, forget what was observed; hold until the
        next chunk."""
        self.worker.call(self.runner.forget)
        self.commander.timeline.bump_generation()

    # Hold and fault, on any thread

    def hold(self) -> None:
        """Hold by representation, for as long as it takes, until `resume`; no chunk is computed meanwhile."""
        self.held = True
        self._apply_pause()

    def resume(self) -> Problem | None:
        """Follow chunks again; with a fault nothing changes, also no hold, and that fault is returned."""
        with self._pausing:
            if (fault := self.fault) is not None:
                return fault
            self.held = False
            self._put_in_force()
        self.wake()
        return None

    def raise_fault(self, problem: Problem) -> None:
        """Report a problem; it latches if it is of a kind that does."""
        self._report(problem)

    def reset_fault(self) -> Problem | None:
        """Forget the latched fault and go on, held if `hold` was called; returns what was latched."""
        fault = self.latch.reset()
        self.problem = None
        self._apply_pause()
        self.wake()
        return fault

    def adopt_limits(self, contract: RobotContract, max_failures: int) -> None:
        """Take limits, timeline and inference rate of `contract`; all else must be as before."""
        self.commander.adopt_limits(contract)
        self.runner.adopt_rates(contract.rates)
        self.runner.guide.adopt(contract)
        self.latch.max_failures = max_failures
        self.contract = contract

    def _apply_pause(self) -> None:
        with self._pausing:
            self._put_in_force()

    def _put_in_force(self) -> None:
        if (fault := self.latch.fault) is not None:
            self.commander.pause(fault.reason, str(fault), bounded=True)
        elif self.held:
            self.commander.pause(Reason.HELD, Reason.HELD.text, bounded=False)
        else:
            self.commander.resume()

    def wake(self) -> None:
        """Something new may have come: let the worker look."""
        if self.playing:
            self.worker.offer(None)

    # Results, on the worker thread

    def _on_observation(self) -> None:
        """What stood in the way of an observation does no more; what the policy makes of it will show."""
        problem = self.problem
        if problem is not None and problem.reason.concerns_input:
            self.problem = None

    def _on_result(self, result: InferenceResult[None, Prediction | None]) -> None:
        if result.error is not None:
            stream = getattr(result.error, "stream", "")
            self._report(Problem(reason_of(result.error, result.reason), stream, describe(result.error)))
        elif result.value is not None:
            self._place(result.value)

    def _place(self, prediction: Prediction) -> None:
        measured = self.measured
        measured.inference.add(prediction.inference_time)
        self.runner.fence_clock_jumps()
        with self._placing:  # a tick between the two would shift the due time by one period
            placed = self.commander.submit(prediction.actions, prediction.mark, prediction.frozen)
            due = self._next_due
        if not isinstance(placed, Accepted):
            measured.dropped[placed.reason] += 1
            # Those were asked for.
            if placed.reason is not Reason.OLD_GENERATION and self.playing:
                self._report(Problem(placed.reason, "", f"chunk dropped: {placed.message}"))
            return
        self.latch.chunk_accepted()
        self.runner.guide.placed(prediction.mark, placed)
        due -= placed.consumed * self.contract.rates.control_period
        self._publish_chunk(PlacedChunk(prediction, placed, due))
        self.problem = None
        measured.chunk_rate.tick(time.monotonic_ns())
        if prediction.observation.newest_image_stamp:
            age = to_s(self._clock.now().nanoseconds - prediction.observation.newest_image_stamp)
            measured.stamp_to_publish.add(age)
            measured.overhead.add(age - prediction.inference_time)

    def _report(self, problem: Problem) -> None:
        self.problem = problem
        self.measured.problems[problem.reason] += 1
        clamped = self.contract.on_violation is OnViolation.CLAMP and problem.reason is Reason.LIMIT_POSITION
        if not clamped and self.latch.note(problem) is not None:
            self._apply_pause()
        self._on_problem(problem)

    def _on_worker_error(self, error: Exception) -> None:
        self._report(Problem(Reason.INFERENCE_ERROR, "", f"{type(error).__name__}: {error}"))

    # Commands, on the control thread

    def _tick(self) -> None:
        with self._placing:
            output = self.commander.tick()
            stamp = self._clock.now().nanoseconds
            self._next_due = stamp + self.contract.rates.control_period
        with self._sending:
            if not self._active:  # `stop` has said the last word, or will
                return
            self._publish_command(output, stamp)
        now = time.monotonic_ns()
        if output.values is not None:
            self.measured.control_rate.tick(now)
        if output.positions is not None:
            self._seams.add(output.sequence, output.positions)
        for violation in output.violations:
            self.measured.violations[violation.reason] += 1
            self.last_violation = (now, Problem(violation.reason, "", str(violation)))
        if output.refused:
            self._report(Problem(output.reason, "", f"chunk dropped when it was due: {output.message}"))
        self.output = output

    def _on_control_error(self, error: Exception) -> None:
        reason = error.reason if isinstance(error, CoreError) else Reason.CONTROL_ERROR
        self._report(Problem(reason, "", f"control: {type(error).__name__}: {error}"))
