"""Who goes first on a CPU that several threads want: commands, then messages, then the model."""

from __future__ import annotations

import contextlib
import os
import threading

CONTROL_PRIORITY = 10  # SCHED_FIFO, 1..99: above everything that is not real time, below drivers
WORKER_NICENESS = 5


def prefer_this_thread() -> None:
    """SCHED_FIFO for the calling thread, where the system permits it (root, or an rtprio limit).

    It sleeps between ticks of a millisecond; a thread that ran away is throttled by the kernel.
    """
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on this platform
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(CONTROL_PRIORITY))


def yield_this_thread() -> None:
    """Let the other threads of this process go first on a CPU that they need too."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WORKER_NICENESS)
