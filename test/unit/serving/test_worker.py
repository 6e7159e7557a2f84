"""The model's thread: one observation at a time, a bounded queue, deadlines, and its end."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import wait

import numpy as np
import pytest
from serving_support import HOME, Gate, Shared, picture, wait_for

from flashrt_runtime.errors import CheckpointNotFoundError
from flashrt_runtime.loading import load_model
from flashrt_runtime.serving import ModelWorker
from flashrt_runtime.serving.refusals import Refusal, Reporter, refusal_of
from flashrt_runtime.serving.worker import Observation

LATER = 60.0


def observation(**changes):
    images = [picture(0, (48, 64)), picture(1, (48, 64))]
    values = {"images": images, "prompt": "pick", "state": np.array(HOME, np.float32), "seed": 1} | changes
    return Observation(**values)


@pytest.fixture
def gate(policy):
    """A policy that answers when it is let to, and its worker with room for two."""
    slow = Gate(Shared(policy))
    worker = ModelWorker(lambda: slow, queue_size=2)
    yield slow, worker
    slow.open.set()
    worker.close(30)


def submit(worker, **changes):
    return worker.submit(observation(**changes), time.monotonic() + LATER)


def test_everything_happens_on_one_thread(policy):
    threads = []

    class Watched(Shared):
        def predict(self, *args, **kwargs):
            threads.append(threading.current_thread().name)
            return policy.predict(*args, **kwargs)

        def close(self):
            threads.append(threading.current_thread().name)

        def __init__(self):
            super().__init__(policy)
            del self.predict
            threads.append(threading.current_thread().name)

    worker = ModelWorker(Watched, 8)
    wait([submit(worker) for _ in range(3)], 30)
    worker.close(30)
    assert threads == ["model"] * 5


def test_what_loading_raises_is_raised(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        ModelWorker(lambda: load_model(tmp_path / "nowhere"), 8)


def test_a_full_queue_refuses_and_says_so(gate):
    slow, worker = gate
    futures = [submit(worker)]
    assert slow.entered.acquire(timeout=30)  # the first is being computed, so that two may wait
    futures += [submit(worker) for _ in range(2)]
    with pytest.raises(Refusal, match="2 observations are waiting") as refused:
        submit(worker)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)
    with pytest.raises(Refusal):
        worker.check_room()
    slow.open.set()
    assert not wait(futures, 30).not_done
    submit(worker).result(30)


def test_a_cancelled_observation_is_not_computed_and_makes_room(gate):
    slow, worker = gate
    first = submit(worker)
    assert slow.entered.acquire(timeout=30)
    second, third = submit(worker), submit(worker)
    assert second.cancel()
    assert worker.waiting == 1
    fourth = submit(worker)
    slow.open.set()
    wait([first, third, fourth], 30)
    assert slow.calls == 3


def test_an_observation_whose_deadline_has_passed_is_not_computed(gate):
    slow, worker = gate
    submit(worker)
    assert slow.entered.acquire(timeout=30)
    late = worker.submit(observation(), time.monotonic() - 0.001)
    slow.open.set()
    with pytest.raises(Refusal, match="deadline"):
        late.result(30)
    assert slow.calls == 1


def test_closing_finishes_what_runs_and_refuses_what_waits(gate):
    slow, worker = gate
    running, waiting = submit(worker), None
    assert slow.entered.acquire(timeout=30)
    waiting = submit(worker)
    closing = threading.Thread(target=worker.close)
    closing.start()
    wait_for(lambda: worker.problem(LATER) is not None)
    slow.open.set()
    closing.join(30)
    assert running.result(0).actions.shape == (50, 7)
    with pytest.raises(Refusal, match="shutting down"):
        waiting.result(0)
    with pytest.raises(Refusal, match="shutting down"):
        submit(worker)


def test_closing_does_not_wait_for_ever(gate):
    slow, worker = gate
    running = submit(worker)
    assert slow.entered.acquire(timeout=30)
    assert worker.close(0.05) is False
    slow.open.set()
    assert running.result(30).seed == 1
    assert worker.close(30) is True


def test_a_stuck_inference_and_a_row_of_failures_are_problems(gate):
    slow, worker = gate
    running = submit(worker)
    assert slow.entered.acquire(timeout=30)
    wait_for(lambda: worker.problem(0.01) is not None)
    assert "has been running for" in worker.problem(0.01)
    assert worker.problem(LATER) is None
    slow.open.set()
    running.result(30)

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert")

    working, slow.policy.predict = slow.policy.predict, broken
    wait([submit(worker) for _ in range(2)], 30)
    assert worker.problem(LATER) is None
    wait([submit(worker)], 30)
    assert worker.problem(LATER) == "the last 3 inferences failed"
    slow.policy.predict = working
    submit(worker).result(30)
    assert worker.problem(LATER) is None


def test_a_clients_mistakes_are_no_failures_of_the_server(gate):
    slow, worker = gate
    slow.open.set()
    for _ in range(4):
        with pytest.raises(ValueError, match="state: expected shape"):
            submit(worker, state=np.zeros(3, np.float32)).result(30)
    assert worker.problem(LATER) is None


def test_an_unexpected_error_stays_vague_to_clients():
    refusal = refusal_of(RuntimeError("secret/path/model.py"))
    assert refusal.status == 500
    assert "secret" not in refusal.message


def test_a_flood_of_refusals_is_a_line_a_second(caplog):
    reporter = Reporter(interval_s=0.2)
    for _ in range(100):
        reporter.report("client", Refusal(422, "invalid_request", "no\nimage\x1b[31m"))
    reporter.report("client", Refusal(429, "queue_full", "full"))
    assert len(caplog.records) == 2
    time.sleep(0.25)
    reporter.report("client", Refusal(422, "invalid_request", "no image"))
    assert "(and 99 more since the last such line)" in caplog.records[-1].message
    assert "\n" not in caplog.records[0].message
    assert "\x1b" not in caplog.records[0].message
    assert caplog.records[0].levelno == logging.WARNING
