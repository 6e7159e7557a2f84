"""The model's own thread: loads the policy, runs one observation at a time, and is never waited for."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceLostError, FlashRTError
from ..inputs import Images, State
from ..spec import PolicySpec
from .refusals import Refusal, refusal_of

logger = logging.getLogger(__name__)

FAILURES_UNTIL_UNHEALTHY = 3
SEED_BITS = 53  # what a JSON number holds exactly everywhere


class Predicts(Protocol):
    """What the worker needs of a `Policy`."""

    spec: PolicySpec

    @property
    def precision(self) -> str: ...

    def predict(
        self,
        images: Images,
        prompt: str | None = None,
        state: State | None = None,
        *,
        seed: int | None = None,
    ) -> NDArray[np.float32]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Observation:
    """predict's arguments. images: (H, W, 3) uint8 RGB, a list in the policy's order or by view name, where
    None stands for a camera that the robot does not have; state: robot's units or None; seed: None lets the
    server draw one; finish: applied to the actions (a layout's way back to the robot's convention).
    """

    images: Images
    prompt: str
    state: NDArray[np.float32] | None = None
    seed: int | None = None
    finish: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class Prediction:
    """actions: (horizon, action_dim) float32; seed: the one used; infer_s: the model's time; queue_s: the
    wait for it.
    """

    actions: NDArray[np.float32]
    seed: int
    infer_s: float
    queue_s: float


@dataclass
class _Job:
    observation: Observation
    deadline: float
    submitted: float = field(default_factory=time.monotonic)
    future: Future[Prediction] = field(default_factory=Future)


class ModelWorker:
    """Owns a policy: made, used and closed on one thread, because a CUDA context and its graphs want that.

    `load` is called on that thread; the constructor waits for it and raises what it raises.
    """

    def __init__(self, load: Callable[[], Predicts], queue_size: int) -> None:
        self.queue_size = queue_size
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._closing = False
        self._running_since: float | None = None
        self._failures = 0
        self.lost: DeviceLostError | None = None  # the GPU: nothing is computed any more
        self.on_lost: Callable[[], None] = lambda: None  # called once, on the model's thread
        loaded: Future[Predicts] = Future()
        self._thread = threading.Thread(target=self._main, args=(load, loaded), name="model", daemon=True)
        self._thread.start()
        policy = loaded.result()
        self.spec, self.precision = policy.spec, policy.precision

    def submit(self, observation: Observation, deadline: float) -> Future[Prediction]:
        """Queue an observation; deadline: on time.monotonic(). Cancelling the future takes it out again.

        Raises Refusal: 429 when the queue is full, 503 when the worker is closing or its GPU is lost.
        """
        job = _Job(observation, deadline)
        with self._changed:
            self._check_room()
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def check_room(self) -> None:
        """Refusal when an observation could not be queued now: asked before its body is read and decoded."""
        with self._changed:
            self._check_room()

    @property
    def waiting(self) -> int:
        """Observations that wait, the one being computed not counted."""
        with self._changed:
            return self._drop_cancelled()

    def problem(self, stuck_after_s: float) -> str | None:
        """Why no actions can be expected from here, or None when all is well."""
        if self.lost is not None:
            return str(self.lost)
        if not self._thread.is_alive() or self._closing:
            return "the model's thread has ended"
        started = self._running_since
        if started is not None and time.monotonic() - started > stuck_after_s:
            return f"an inference has been running for {time.monotonic() - started:.0f} s"
        if self._failures >= FAILURES_UNTIL_UNHEALTHY:
            return f"the last {self._failures} inferences failed"
        return None

    def close(self, timeout_s: float | None = None) -> bool:
        """End the thread after the inference under way; what waits is refused. May be called twice.

        False when that inference has not ended after the timeout: the thread, a daemon, is left to it.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _check_room(self) -> None:
        if self.lost is not None:
            raise refusal_of(self.lost)
        if self._closing:
            raise Refusal(503, "shutting_down", "the server is shutting down")
        if self._drop_cancelled() >= self.queue_size:
            raise Refusal(
                429,
                "queue_full",
                f"{self.queue_size} observations are waiting for the model already: ask less often, or run "
                "more replicas",
                retry_after_s=1.0,
            )

    def _drop_cancelled(self) -> int:
        if any(job.future.cancelled() for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())
        return len(self._waiting)

    def _main(self, load: Callable[[], Predicts], loaded: Future[Predicts]) -> None:
        try:
            policy = load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(policy)
        try:
            while (job := self._next()) is not None:
                self._run(policy, job)
        finally:
            self._refuse_waiting()
            policy.close()

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return None if self._closing else self._waiting.popleft()

    def _refuse_waiting(self) -> None:
        with self._changed:
            self._closing = True
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Refusal(503, "shutting_down", "the server is shutting down"))

    def _run(self, policy: Predicts, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        if self.lost is not None:
            job.future.set_exception(self.lost)
            return
        started = time.monotonic()
        if started > job.deadline:
            job.future.set_exception(
                Refusal(504, "deadline", "the deadline passed before the model was free: ask less often")
            )
            return
        observation = job.observation
        seed = secrets.randbits(SEED_BITS) if observation.seed is None else observation.seed
        self._running_since = started
        try:
            actions = policy.predict(observation.images, observation.prompt, observation.state, seed=seed)
            if observation.finish is not None:
                actions = observation.finish(actions)
        except DeviceLostError as error:
            self.lost = error
            job.future.set_exception(error)  # first: whatever the rest does, this one is answered
            logger.critical("%s", error)
            self.on_lost()
        except Exception as error:
            if not isinstance(error, FlashRTError):
                self._failures += 1
                logger.exception("inference failed")
            job.future.set_exception(error)
        else:
            self._failures = 0
            ended = time.monotonic()
            job.future.set_result(Prediction(actions, seed, ended - started, started - job.submitted))
        finally:
            self._running_since = None
