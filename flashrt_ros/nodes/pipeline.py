"""What a configured policy node consists of: streams in, model on its worker thread, commands out on theirs.

    executor threads -> Synchroniser -> (worker) ingest, predict, Commander.submit -> (control) Commander.tick
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rclpy.clock import Clock

from flashrt_ros.core.commander import Commander, Output
from flashrt_ros.core.contract import RobotContract
from flashrt_ros.core.control import ControlThread
from flashrt_ros.core.errors import CoreError
from flashrt_ros.core.images import FallbackDecoder
from flashrt_ros.core.ingest import Ingest, MeasuredPositions
from flashrt_ros.core.metrics import LatencyWindow, RateMeter
from flashrt_ros.core.observation import Observation
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.sync import NotReady, Snapshot, Synchroniser
from flashrt_ros.core.timeline import Accepted, ObservationMark
from flashrt_ros.core.timing import to_s
from flashrt_ros.core.trigger import InferenceTrigger
from flashrt_ros.core.worker import InferenceResult, InferenceWorker

from .failures import describe, reason_of

FloatArray = NDArray[np.float64]
ANY_PROMPT = "task"
SENDING_PATIENCE = 1.0  # how long the last command may wait for one that is being sent [s]


class PolicyLike(Protocol):
    """What the node needs of flashrt_runtime.Policy; see there for shapes, units and errors."""

    @property
    def spec(self) -> Any: ...
    @property
    def precision(self) -> str: ...
    def set_prompt(self, prompt: str) -> None: ...
    def predict(self, images: Any, prompt: str, state: Any, *, seed: int | None) -> NDArray[np.float32]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no new chunk; `stream` is empty unless one stream is to blame."""

    reason: Reason
    stream: str
    message: str

    def __str__(self) -> str:
        return f"{self.stream}: {self.message}" if self.stream else self.message


@dataclass(frozen=True, slots=True)
class Prediction:
    """A chunk and what it was computed from. actions: (horizon, dof) in robot units."""

    actions: FloatArray
    mark: ObservationMark
    observation: Observation
    prompt: str
    inference_time: float  # [s]


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
    ) -> None:
        self.contract = contract
        self.synchroniser = Synchroniser(contract)
        measured = MeasuredPositions(contract, self.synchroniser)
        self.commander = Commander(contract, lambda: measured(time.monotonic_ns()))
        self.policy: PolicyLike | None = None
        self.prompt = ""  # read by the worker at each inference
        self.problem: Problem | None = None
        self.output: Output | None = None  # of the last control tick
        self.dropped: Counter[Reason] = Counter()
        self.violations: Counter[Reason] = Counter()
        self.last_violation: tuple[int, Problem] | None = None  # [ns, monotonic]
        self.inference = LatencyWindow()
        self.stamp_to_publish = LatencyWindow()
        self.chunk_rate, self.control_rate = RateMeter(), RateMeter()
        self.control: ControlThread | None = None
        self._clock = clock
        self._publish_command, self._publish_chunk = publish_command, publish_chunk
        self._on_problem = guarded(on_problem)
        self._seed = seed
        self._ingest = Ingest(contract, fallback_decoder)
        self._trigger = InferenceTrigger(contract.rates)
        self._used: dict[str, int] = {}  # camera stamps of the last observation
        self._jumps = 0  # clock jumps of the streams that have been dealt with
        self._placing = threading.Lock()
        self._sending = threading.Lock()  # nothing may follow the last command of `stop`
        self._next_due = 0  # when the next control tick is due [ns, ROS time]
        self._active = False
        self._started = 0  # [ns, monotonic clock]
        self.worker: InferenceWorker[None, Prediction | None] = InferenceWorker(
            lambda _job: self._infer(), self._on_result, guarded(self._on_worker_error)
        )
        self.worker.start()

    # Life, on the executor's thread

    @property
    def active(self) -> bool:
        """Between start and stop."""
        return self._active

    @property
    def fault(self) -> Problem | None:
        """While active: which of the threads has died, and what to do; None while both run."""
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
    def running_for(self) -> float:
        """Time since start [s]."""
        return to_s(time.monotonic_ns() - self._started)

    def load(self, loader: Callable[[], PolicyLike], prompt: str, wait: Callable[[], bool]) -> None:
        """Load the policy on the worker thread, check it against the contract, set the prompt ("" for none).

        `wait` is asked every 50 ms whether to go on. Raises what the loader and the prompt raise,
        PolicyMismatchError, InterruptedError when `wait` says no, or RuntimeError when the thread died.
        """

        def load_and_check() -> None:
            policy = loader()
            try:
                self.contract.check_policy(policy.spec)
                # Without a prompt any text will do: a missing tokenizer is to show now, not in mid-operation.
                policy.set_prompt(prompt or ANY_PROMPT)
            except Exception:
                policy.close()
                raise
            self.policy, self.prompt = policy, prompt

        self._result_of(self.worker.call(load_and_check), wait)

    def start(self) -> None:
        """Begin to infer and to command, from a fresh timeline."""
        self.commander.reset()
        self.synchroniser.clear()
        self.worker.call(self._forget)
        self.problem, self.output = None, None
        for meter in (self.inference, self.stamp_to_publish):
            meter.clear()
        self._next_due = self._clock.now().nanoseconds + self.contract.rates.control_period
        on_error = guarded(self._on_control_error)
        self.control = ControlThread(self.contract.rates.control_period, self._tick, on_error)
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
            policy, self.policy = self.policy, None
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
        if self.policy is None:
            raise RuntimeError("no policy is loaded")
        self.policy.set_prompt(prompt)
        # Before the fence: an inference marks the timeline first and reads the prompt after, so none that
        # passes the fence has used the old one.
        self.prompt = prompt
        if reset:
            self.commander.timeline.bump_generation()

    def wake(self) -> None:
        """Something new may have come: let the worker look."""
        if self._active:
            self.worker.offer(None)

    # Inference, on the worker thread

    def _forget(self) -> None:
        self._ingest.reset()
        self._trigger.reset()
        self._used = {}
        self._jumps = self.synchroniser.clock_jumps

    def _infer(self) -> Prediction | None:
        """One chunk from the newest observation; None when there is nothing new or nothing usable."""
        self._fence_clock_jumps()
        # The mark first: if `stop` comes after the question, its fence is newer than the mark.
        mark = self.commander.mark_observation()
        if not self._active or self.policy is None:
            return None
        now = time.monotonic_ns()
        selected = self.synchroniser.select(self._clock.now().nanoseconds, now)
        if isinstance(selected, NotReady):
            self._report(Problem(selected.reason, selected.stream, selected.message))
            return None
        prompt = self.prompt
        if not prompt:
            self._report(Problem(Reason.PROMPT_INVALID, "", "no prompt yet: call ~/set_prompt"))
            return None
        if not self._is_new(selected) or not self._trigger.due(now):
            return None
        observation = self._ingest.observe(selected)
        self._used = self._camera_stamps(selected)
        begin = time.perf_counter()
        actions = self.policy.predict(observation.images, prompt, observation.state, seed=self._seed)
        elapsed = time.perf_counter() - begin
        return Prediction(self.contract.actions_to_robot(actions), mark, observation, prompt, elapsed)

    def _fence_clock_jumps(self) -> None:
        """Streams whose stamps jumped back (a bag that loops): what was computed or used before is void."""
        jumps = self.synchroniser.clock_jumps
        if jumps == self._jumps:
            return
        self._jumps, self._used = jumps, {}
        self.commander.timeline.bump_generation()
        text = "header stamps jumped back: the actions of the time before were dropped"
        self._report(Problem(Reason.CLOCK, "", text))

    def _camera_stamps(self, snapshot: Snapshot) -> dict[str, int]:
        streams = self.contract.streams
        return {name: item.stamp for name, item in snapshot.messages.items() if streams[name].is_image}

    def _is_new(self, snapshot: Snapshot) -> bool:
        """Whether every camera has a frame newer than the last observation's, or one is newer by more than
        the allowed skew: waiting for the slowest for ever would waste the others."""
        stamps = self._camera_stamps(snapshot)
        if stamps.keys() != self._used.keys():
            return True
        if all(stamp > self._used[name] for name, stamp in stamps.items()):
            return True
        return max(stamps.values()) > max(self._used.values()) + self.contract.sync.max_skew

    def _on_result(self, result: InferenceResult[None, Prediction | None]) -> None:
        if result.error is not None:
            stream = getattr(result.error, "stream", "")
            self._report(Problem(reason_of(result.error, result.reason), stream, describe(result.error)))
        elif result.value is not None:
            self._place(result.value)

    def _place(self, prediction: Prediction) -> None:
        self.inference.add(prediction.inference_time)
        self._fence_clock_jumps()
        with self._placing:  # a tick between the two would shift the due time by one period
            placed = self.commander.submit(prediction.actions, prediction.mark)
            due = self._next_due
        if not isinstance(placed, Accepted):
            self.dropped[placed.reason] += 1
            if placed.reason is not Reason.OLD_GENERATION:  # that one was asked for
                self._report(Problem(placed.reason, "", f"chunk dropped: {placed.message}"))
            return
        due -= placed.consumed * self.contract.rates.control_period
        self._publish_chunk(PlacedChunk(prediction, placed, due))
        self.problem = None
        self.chunk_rate.tick(time.monotonic_ns())
        age = self._clock.now().nanoseconds - prediction.observation.newest_image_stamp
        self.stamp_to_publish.add(to_s(age))

    def _report(self, problem: Problem) -> None:
        self.problem = problem
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
            self.control_rate.tick(now)
        for violation in output.violations:
            self.violations[violation.reason] += 1
            self.last_violation = (now, Problem(violation.reason, "", str(violation)))
        self.output = output

    def _on_control_error(self, error: Exception) -> None:
        reason = error.reason if isinstance(error, CoreError) else Reason.CONTROL_ERROR
        self._report(Problem(reason, "", f"control: {type(error).__name__}: {error}"))
