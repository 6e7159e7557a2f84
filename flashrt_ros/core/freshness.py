"""Begin with the frame at hand, or wait for the next one?

When the model becomes free, the newest frame has been lying about for up to a camera period. Beginning at
once gives more chunks, each from an older frame; waiting gives fewer, each from a fresh one. Both show the
robot an equally old world on average (a chunk from a fresh frame is followed for longer), but waiting costs
less computation, and makes the delay from frame to command the same every time, which is what splicing and
real-time chunking build on. So a frame that is no longer fresh is left alone if the next is due while actions
last.
"""

from __future__ import annotations

FRESH = 5_000_000  # a frame received this long ago is as good as new [ns]
LONGEST_WAIT = 50_000_000  # slower cameras are not waited for [ns]
RESERVE = 1.5  # of the last inference's time, must be left to play after the wait


def next_frame_is_better(age: int, period: int, remaining: int, inference: int) -> bool:
    """age: of the newest frame, since its receipt; period: of the slowest camera; remaining: time for which
    actions are left; inference: how long the last one took. All in ns."""
    if age <= FRESH or period > LONGEST_WAIT or age > 2 * period:  # or the next frame is overdue itself
        return False
    wait = max(0, period - age)
    return remaining > wait + int(RESERVE * inference)
