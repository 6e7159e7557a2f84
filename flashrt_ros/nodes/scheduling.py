"""Who goes first on a CPU that several threads want: commands, then messages, then the model."""

from __future__ import annotations

import contextlib
import os
import threading

CONTROL_PRIORITY = 10  # SCHED_FIFO, 1..99: above everything that is not real time, below drivers
WORKER_NICENESS = 5


def prefer_this_thread() -> bool:
    """SCHED_FIFO for the calling thread; whether the system permits it (root, or an rtprio limit).

    It sleeps between ticks of a millisecond; a thread that ran away is throttled by the kernel.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(CONTROL_PRIORITY))
    except (OSError, AttributeError):  # AttributeError: not on this platform
        return False
    return True


def yield_this_thread() -> None:
    """Let the other threads of this process go first on a CPU that they need too.

    Not where the control thread is SCHED_FIFO: it goes first anyway, and a nice thread that other programs
    keep from a CPU while it holds the interpreter's lock would keep the control thread waiting for it.
    """
    if _fifo_permitted():
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WORKER_NICENESS)


def _fifo_permitted() -> bool:
    """Tried on a thread of its own, which ends."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(prefer_this_thread()), name="scheduling")
    thread.start()
    thread.join()
    return found == [True]
