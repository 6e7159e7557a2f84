"""Control thread, inference worker, metrics and trigger: real threads, waited for by conditions."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrt_ros.core.contract import RatesSpec
from flashrt_ros.core.control import ControlThread
from flashrt_ros.core.errors import IngestError, WorkerStoppedError
from flashrt_ros.core.metrics import LatencyWindow, RateMeter
from flashrt_ros.core.reasons import Reason
from flashrt_ros.core.timing import to_s
from flashrt_ros.core.trigger import InferenceTrigger
from flashrt_ros.core.worker import InferenceResult, InferenceWorker

MS = 1_000_000
Keep = Callable[[Any], Any]
LONG = 20.0  # seconds any condition here may take on a busy machine


class Counter:
    """Counts calls and lets a test wait for a number of them."""

    def __init__(self) -> None:
        self.count = 0
        self._condition = threading.Condition()

    def __call__(self) -> None:
        with self._condition:
            self.count += 1
            self._condition.notify_all()

    def wait_for(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self.count >= count, LONG)


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Registers threads to be stopped after the test: as they are no daemons, a failing run would hang."""
    kept: list[Any] = []

    def register(thread: Any) -> Any:
        kept.append(thread)
        return thread

    yield register
    for thread in kept:
        thread.stop(LONG)


# Control thread.


def test_control_keeps_its_rate_over_time_without_drift(keep: Keep) -> None:
    """Deadlines are absolute: ticks and skipped ones together fill the time exactly, whatever the load."""
    counter = Counter()
    control = keep(ControlThread(5 * MS, counter))
    began = time.monotonic_ns()
    control.start()
    first = control.next_deadline_ns
    counter.wait_for(60)
    assert control.stop()
    assert not control.running
    elapsed = time.monotonic_ns() - began
    assert (control.next_deadline_ns - first) % (5 * MS) == 0
    assert (control.next_deadline_ns - first) // (5 * MS) == control.ticks + control.missed
    assert elapsed >= (control.ticks + control.missed - 1) * 5 * MS
    assert control.jitter.total == control.ticks - 1
    assert control.jitter.max >= to_s(control.longest_gap_ns - 5 * MS)
    assert control.duration.total == control.ticks


def test_control_skips_missed_deadlines_and_never_bursts(keep: Keep) -> None:
    counter, starts, deadlines = Counter(), [], []

    def callback() -> None:
        starts.append(time.monotonic_ns())
        deadlines.append(control.next_deadline_ns)
        if counter.count == 2:
            time.sleep(0.055)
        counter()

    control = keep(ControlThread(10 * MS, callback))
    control.start()
    counter.wait_for(6)
    control.stop()
    assert control.missed >= 5
    assert control.longest_gap_ns >= 55 * MS
    assert starts[3] - starts[2] >= 55 * MS
    assert all(start >= deadline for start, deadline in zip(starts, deadlines, strict=True))
    steps = np.diff(deadlines) // (10 * MS)
    assert (np.diff(deadlines) % (10 * MS) == 0).all()
    assert (steps >= 1).all()
    assert steps[2] >= 6


def test_an_error_in_the_callback_is_reported_and_the_thread_goes_on(keep: Keep) -> None:
    counter, seen = Counter(), []

    def callback() -> None:
        counter()
        raise ValueError(f"call {counter.count}")

    control = keep(ControlThread(2 * MS, callback, on_error=seen.append))
    control.start()
    counter.wait_for(5)
    assert control.stop()
    assert control.errors == len(seen) >= 5
    assert str(seen[0]) == "call 1"
    assert isinstance(control.last_error, ValueError)


def test_control_stops_from_its_own_callback_before_start_and_twice(keep: Keep) -> None:
    control = keep(ControlThread(MS, lambda: None))
    assert control.stop()
    stopped = threading.Event()

    def callback() -> None:
        assert own.stop()
        stopped.set()

    own = keep(ControlThread(2 * MS, callback))
    own.start()
    assert stopped.wait(LONG)
    assert own.stop()
    assert own.ticks == 1
    assert own.stop()
    with pytest.raises(RuntimeError):
        own.start()
    with pytest.raises(ValueError, match="above 0 ns"):
        ControlThread(0, lambda: None)


def test_a_callback_that_hangs_is_told_by_stop(keep: Keep) -> None:
    entered, release = threading.Event(), threading.Event()

    def callback() -> None:
        entered.set()
        release.wait(LONG)

    control = keep(ControlThread(MS, callback))
    control.start()
    assert entered.wait(LONG)
    assert control.stop(timeout=0.01) is False
    release.set()
    assert control.stop(LONG)


def test_a_stop_does_not_wait_for_a_long_period(keep: Keep) -> None:
    control = keep(ControlThread(60_000 * MS, lambda: None))
    control.start()
    assert control.stop(LONG)
    assert control.ticks == 0


# Inference worker.


class Model:
    """An `infer` that the test holds and releases; records jobs and the thread they ran on."""

    def __init__(self) -> None:
        self.jobs: list[object] = []
        self.threads: set[threading.Thread] = set()
        self.entered = threading.Semaphore(0)
        self.release = threading.Semaphore(0)
        self.results: list[InferenceResult[object, object]] = []
        self.finished = Counter()

    def infer(self, job: object) -> object:
        self.jobs.append(job)
        self.threads.add(threading.current_thread())
        self.entered.release()
        assert self.release.acquire(timeout=LONG)
        if isinstance(job, Exception):
            raise job
        return f"done {job}"

    def on_result(self, result: InferenceResult[object, object]) -> None:
        self.results.append(result)
        self.finished()


@pytest.fixture
def model(keep: Keep) -> Iterator[Model]:
    """Set up after `keep`, so that it lets its jobs go before their worker is joined."""
    model = Model()
    yield model
    model.release.release(1000)


@pytest.fixture
def worker(model: Model, keep: Keep) -> InferenceWorker[object, object]:
    """A started worker."""
    worker: InferenceWorker[object, object] = keep(InferenceWorker(model.infer, model.on_result))
    worker.start()
    return worker


def wait_idle(worker: InferenceWorker[object, object]) -> None:
    deadline = time.monotonic() + LONG
    while not worker.idle:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_busy_worker_takes_the_latest_job_only_and_says_that_it_is_busy(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    assert worker.idle
    assert worker.offer(1)
    assert model.entered.acquire(timeout=LONG)
    assert not worker.idle
    for job in (2, 3, 4):
        worker.offer(job)
    model.release.release(2)
    model.finished.wait_for(2)
    wait_idle(worker)
    assert model.jobs == [1, 4]
    assert worker.replaced == 2
    assert [result.value for result in model.results] == ["done 1", "done 4"]
    assert all(result.reason is Reason.OK and result.finished >= result.started for result in model.results)
    assert worker.stop(LONG)
    assert not worker.running


def test_withdrawn_jobs_do_not_run(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    worker.offer(1)
    assert model.entered.acquire(timeout=LONG)
    worker.offer(2)
    worker.withdraw()
    model.release.release()
    wait_idle(worker)
    assert model.jobs == [1]
    assert worker.stop(LONG)


def test_commands_come_before_jobs_in_order_and_on_the_same_thread(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    order: list[tuple[int, int, threading.Thread]] = []
    worker.offer("first")
    assert model.entered.acquire(timeout=LONG)
    worker.offer("second")

    def note(number: int) -> None:
        order.append((number, len(model.jobs), threading.current_thread()))

    futures = [worker.call(partial(note, number)) for number in (1, 2)]
    model.release.release(2)
    for future in futures:
        assert future.result(LONG) is None
    model.finished.wait_for(2)
    assert [(i, jobs) for i, jobs, _ in order] == [(1, 1), (2, 1)]
    assert {thread for _, _, thread in order} == model.threads
    assert worker.stop(LONG)


def test_errors_become_results_and_the_thread_lives(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    model.release.release(10)
    errors = RuntimeError("no memory"), IngestError(Reason.IMAGE_DECODE, "camera", "bad")
    for count, error in enumerate(errors, 1):
        worker.offer(error)
        model.finished.wait_for(count)
    first, second = model.results
    assert (first.reason, str(first.error), first.value) == (Reason.INFERENCE_ERROR, "no memory", None)
    assert second.reason is Reason.IMAGE_DECODE

    def fail() -> None:
        raise KeyError("prompt")

    with pytest.raises(KeyError):
        worker.call(fail).result(LONG)
    assert worker.call(lambda: 5).result(LONG) == 5
    assert worker.stop(LONG)


def test_an_error_while_handling_a_result_is_reported(keep: Keep) -> None:
    seen: list[Exception] = []
    handled = threading.Event()

    def on_error(error: Exception) -> None:
        seen.append(error)
        handled.set()

    def on_result(result: object) -> None:
        raise ValueError("publisher is gone")

    worker = keep(InferenceWorker(lambda job: job, on_result, on_error))
    worker.start()
    worker.offer(1)
    assert handled.wait(LONG)
    assert str(seen[0]) == "publisher is gone"
    assert worker.call(lambda: 1).result(LONG) == 1
    assert worker.stop(LONG)


def test_stop_lets_the_job_end_cancels_commands_and_refuses_more(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    worker.offer(1)
    assert model.entered.acquire(timeout=LONG)
    worker.offer(2)
    waiting = worker.call(lambda: 1)
    assert worker.stop(timeout=0.01) is False
    assert waiting.cancelled()
    assert worker.offer(3) is False
    with pytest.raises(WorkerStoppedError):
        worker.call(lambda: 1)
    model.release.release()
    assert worker.stop(LONG)
    assert model.jobs == [1]
    assert len(model.results) == 1


def test_stop_before_start_and_from_the_worker_itself(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    assert InferenceWorker(model.infer, model.on_result).stop()
    with pytest.raises(RuntimeError, match="cannot stop itself"):
        worker.call(worker.stop).result(LONG)
    assert worker.stop(LONG)


def test_a_cancelled_command_does_not_run(
    model: Model, worker: InferenceWorker[object, object]
) -> None:
    worker.offer(1)
    assert model.entered.acquire(timeout=LONG)
    ran: list[int] = []
    future = worker.call(lambda: ran.append(1))
    assert future.cancel()
    model.release.release()
    assert worker.call(lambda: 2).result(LONG) == 2
    assert ran == []
    assert worker.stop(LONG)


# Metrics.


@given(samples=st.lists(st.floats(0, 10), min_size=1, max_size=50), size=st.integers(1, 30))
def test_percentiles_are_those_of_the_last_samples(samples: list[float], size: int) -> None:
    window = LatencyWindow(size)
    for sample in samples:
        window.add(sample)
    last = samples[-size:]
    summary = window.summary()
    assert summary.count == len(last)
    assert window.total == len(samples)
    assert summary.max == window.max == max(last)
    for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
        assert getattr(summary, name) == getattr(window, name) == pytest.approx(np.percentile(last, percent))


def test_an_empty_window_says_nan() -> None:
    window = LatencyWindow()
    assert window.summary().count == 0
    assert np.isnan(window.p50)
    assert np.isnan(window.max)
    window.add(1.0)
    window.clear()
    assert np.isnan(window.p99)
    with pytest.raises(ValueError, match="at least 1"):
        LatencyWindow(0)


def test_rate_of_regular_events_of_a_pause_and_of_none() -> None:
    meter = RateMeter(window_ns=2000 * MS)
    assert meter.rate(0) == 0.0
    for i in range(100):
        meter.tick(i * 20 * MS)
    last = 99 * 20 * MS
    assert meter.rate(last) == pytest.approx(50.0)
    assert meter.rate(last + 30 * MS) == pytest.approx(50.0)
    assert meter.rate(last + 500 * MS) < 45.0
    assert meter.rate(last + 3000 * MS) == 0.0
    meter.tick(last + 3000 * MS)
    assert meter.rate(last + 3000 * MS) == 0.0


# Trigger.

RATES = RatesSpec(control_period=20 * MS, inference_period=None)


def test_back_to_back_is_always_due() -> None:
    trigger = InferenceTrigger(RATES)
    assert all(trigger.due(now) for now in (0, 0, 1))


def test_fixed_rate_stays_on_its_grid_and_skips_what_was_missed() -> None:
    trigger = InferenceTrigger(replace(RATES, inference_period=100 * MS))
    due = [now for now in range(1000, 1000 + 1000, 7) if trigger.due(now * MS)]
    assert due == [1000, 1105, 1203, 1301, 1406, 1504, 1602, 1700, 1805, 1903]
    assert trigger.due(5555 * MS)
    assert not trigger.due(5599 * MS)
    assert trigger.due(5600 * MS)
    trigger.reset()
    assert trigger.due(0)
