"""One caller at a time, in the order they came; nobody waits for himself."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
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


def wait_for_queue(turns: Turns, length: int) -> None:
    deadline = time.monotonic() + 10
    while len(turns._queue) < length:
        assert time.monotonic() < deadline, f"{len(turns._queue)} of {length} came"
        time.sleep(0.001)


def test_a_loop_leaves_a_turn_to_everybody_who_waits() -> None:
    """With a `threading.Lock` the loop takes all of them before anyone wakes."""
    turns, order = Turns(), []

    def loop() -> None:
        for _ in range(4):
            with turns:
                order.append("loop")
                if len(order) == 1:
                    wait_for_queue(turns, 3)

    def once(name: str) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=loop)]
    threads[0].start()
    for place, name in enumerate(("first", "second")):
        wait_for_queue(turns, 1 + place)
        threads.append(threading.Thread(target=once, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert order == ["loop", "first", "second", "loop", "loop", "loop"]
    assert not turns.locked()


def test_many_threads_exclude_each_other() -> None:
    turns, inside, most, done = Turns(), 0, 0, []

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with turns:
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


def test_an_interrupt_while_waiting_gives_the_place_up() -> None:
    turns, order = Turns(), []
    turns.__enter__()

    def interrupted(*_: object) -> None:
        raise InterruptedError

    def second() -> None:
        with turns:
            order.append("second")

    def holder() -> None:
        with turns:
            wait_for_queue(turns, 2)
            signal.raise_signal(signal.SIGALRM)  # runs in the main thread, which waits
            waiting.start()
            wait_for_queue(turns, 2)

    turns.__exit__(None, None, None)
    before, waiting = signal.signal(signal.SIGALRM, interrupted), threading.Thread(target=second)
    holding = threading.Thread(target=holder)
    try:
        holding.start()
        wait_for_queue(turns, 1)
        with pytest.raises(InterruptedError), turns:
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
    holding.join(10)
    waiting.join(10)
    assert (order, turns.locked()) == (["second"], False)
    with turns:  # and may come again
        pass


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
