"""The one thread that owns the model: commands through a queue, and a slot for the latest thing to infer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from .errors import WorkerStoppedError
from .reasons import Reason


@dataclass(frozen=True, slots=True)
class InferenceResult[Job, Value]:
    """What became of a job: a value, or the error with its reason; times on the monotonic clock [ns]."""

    job: Job
    value: Value | None
    error: Exception | None
    reason: Reason
    started: int
    finished: int


class InferenceWorker[Job, Value]:
    """Runs `infer(job)` for the latest job offered, and any command, all on one thread.

    A job that was offered while another ran is replaced by a newer one: there is no queue of stale
    observations. Commands (`call`: load, change the prompt, close) come first and in order. An exception in
    `infer` becomes a result with the exception's own `reason` (INFERENCE_ERROR when it has none). The
    thread is not a daemon: `stop` must be called, and joins it, because a native call still running at
    interpreter exit aborts the process.
    """

    def __init__(
        self,
        infer: Callable[[Job], Value],
        on_result: Callable[[InferenceResult[Job, Value]], None],
        on_error: Callable[[Exception], None] | None = None,
        name: str = "inference",
    ) -> None:
        """`on_result` runs on the worker thread after every job; if it raises, `on_error` gets the
        exception."""
        self._infer = infer
        self._on_result = on_result
        self._on_error = on_error
        self._condition = threading.Condition()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._slot: list[Job] = []
        self._busy = False
        self._stopping = False
        self.replaced = 0  # jobs that a newer one displaced before they ran
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError when started before."""
        self._thread.start()

    def offer(self, job: Job) -> bool:
        """Hand over the latest job without waiting; False when the worker has been stopped."""
        with self._condition:
            if self._stopping:
                return False
            self.replaced += len(self._slot)
            self._slot = [job]
            self._condition.notify()
            return True

    def withdraw(self) -> None:
        """Forget a job that has not started (deactivate)."""
        with self._condition:
            self._slot = []

    def call[Result](self, function: Callable[[], Result]) -> Future[Result]:
        """Run `function` on the worker thread before any further job; its result or exception is the
        future's.

        Raises WorkerStoppedError after `stop`.
        """
        future: Future[Result] = Future()
        with self._condition:
            if self._stopping:
                raise WorkerStoppedError("the inference worker has been stopped and takes no more commands")
            self._commands.append((function, future))
            self._condition.notify()
        return future

    @property
    def idle(self) -> bool:
        """Nothing running and nothing waiting; never blocks for longer than a job takes to be handed over."""
        with self._condition:
            return not (self._busy or self._slot or self._commands)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more work, let the current job end, cancel waiting commands and join.

        False when the thread is still in a call after `timeout` seconds. May be called again. Raises
        RuntimeError on the worker's own thread, which cannot join itself.
        """
        if self._thread is threading.current_thread():
            raise RuntimeError("the inference worker cannot stop itself: call stop() from another thread")
        with self._condition:
            self._stopping = True
            self._slot = []
            cancelled, self._commands = self._commands, deque()
            self._condition.notify()
        for _, future in cancelled:
            future.cancel()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            work()
            with self._condition:
                self._busy = False

    def _next(self) -> Callable[[], None] | None:
        """The next piece of work, commands first; None to end."""
        with self._condition:
            self._condition.wait_for(lambda: self._stopping or self._commands or self._slot)
            if self._stopping:
                return None
            self._busy = True
            if self._commands:
                function, future = self._commands.popleft()
                return lambda: self._execute(function, future)
            job = self._slot.pop()
            return lambda: self._process(job)

    def _execute(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except Exception as error:  # belongs to whoever waits for the future
            future.set_exception(error)
        else:
            future.set_result(result)

    def _process(self, job: Job) -> None:
        value: Value | None = None
        failure: Exception | None = None
        reason, started = Reason.OK, time.monotonic_ns()
        try:
            value = self._infer(job)
        except Exception as error:  # becomes a result: the thread outlives any job
            failure = error
            own = getattr(error, "reason", None)
            reason = own if isinstance(own, Reason) else Reason.INFERENCE_ERROR
        result = InferenceResult(job, value, failure, reason, started, time.monotonic_ns())
        try:
            self._on_result(result)
        except Exception as error:
            if self._on_error is not None:
                self._on_error(error)
