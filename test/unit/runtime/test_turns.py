"""One caller at a time, in the order they came; nobody waits for himself."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt_runtime
from flashrt_runtime import Policy
from flashrt_runtime.errors import ClosedError, ReentryError
from flashrt_runtime.turns import Turns
from flashrt_runtime.untrained import make_checkpoint

IMAGES = [np.zeros((60, 80, 3), np.uint8)] * 2
STATE = np.zeros(7)


@pytest.fixture
def policy(tmp_path: Path) -> Iterator[Policy]:
    loaded = flashrt_runtime.load_model(
        make_checkpoint(tmp_path / "tiny", size="tiny", preset="demo_arm"), hardware="cpu", num_steps=2
    )
    yield loaded
    loaded.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_loop_leaves_a_turn_to_everybody_who_waits() -> None:
    """With a `threading.Lock` the loop takes all of them before anyone wakes."""
    turns, order = Turns(), []

    def loop() -> None:
        for _ in range(20):
            with turns.one():
                order.append("loop")
                if len(order) == 1:
                    wait_for(lambda: len(turns._waiting) == 2)

    def once(name: str) -> None:
        with turns.one():
            order.append(name)

    threads = [threading.Thread(target=loop)]
    threads[0].start()
    wait_for(turns.locked)
    threads += [threading.Thread(target=once, args=(name,)) for name in ("first", "second")]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(order) == 22
    assert {"first", "second"} <= set(order[:4])
    assert not turns.locked()


def test_many_threads_exclude_each_other() -> None:
    turns, inside, most, done = Turns(), 0, 0, []

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with turns.one():
                inside += 1
                most = max(most, inside)
                inside -= 1
        done.append(True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(done), most, turns.locked()) == (8, 1, False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_anywhere_leaves_the_lock_free() -> None:
    """By a timer, some microseconds on the way in and out; what comes behind, from any thread, has a turn."""
    turns, rng, armed, interrupts = Turns(), np.random.default_rng(0), False, 0

    def interrupted(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise InterruptedError

    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        for delay in rng.uniform(1e-6, 2e-5, 5000):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, delay)
                with turns.one():
                    pass
                armed = False
            except InterruptedError:
                interrupts += 1
            assert not turns.locked()
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 50
    had = []

    def other() -> None:
        with turns.one():
            had.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(10)
    other()
    assert had == [True, True]


def test_a_call_from_inside_a_call_is_refused(policy: Policy) -> None:
    """A signal handler that closes the policy would wait for the call that it interrupted, for ever."""
    refused = []

    class Draw:
        """Where `predict` is when the signal comes."""

        def __call__(self, generator: object) -> object:
            signal.raise_signal(signal.SIGALRM)
            return draw(generator)

    def handler(*_: object) -> None:
        try:
            policy.close()
        except ReentryError as error:
            refused.append(str(error))

    draw = policy._encode._draw_noise
    policy._encode._draw_noise = Draw()  # type: ignore[assignment]
    before = signal.signal(signal.SIGALRM, handler)
    try:
        assert policy.predict(IMAGES, "wave", STATE, seed=1).shape == (50, 7)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(refused) == 1
    assert "from another thread" in refused[0]


def test_close_lets_go_of_the_model(policy: Policy) -> None:
    """Another is loaded while the closed one is still named: both would not fit a robot's memory."""
    policy.predict(IMAGES, "wave", STATE, seed=1)
    model = weakref.ref(policy._model)
    policy.close()
    gc.collect()
    assert model() is None
    assert policy.prompt == "wave"
    with pytest.raises(ClosedError, match="load_model"):
        policy.predict(IMAGES, "wave", STATE, seed=1)
