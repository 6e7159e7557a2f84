"""Long steps tell how far they are; whoever wants to know listens (the command line's bars)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

Listener = Callable[[int, int], None]

_listeners: list[Listener] = []


def report(done: int, total: int) -> None:
    """`done` of `total` units of the step under way. Cheap where nobody listens; any thread may call it."""
    for listener in _listeners:
        listener(done, total)


def tracked[T](items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with a report before each and one at the end."""
    done = 0
    for item in items:
        report(done, total)
        yield item
        done += 1
    report(done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls listener(done, total) for every report of this process while the block lasts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
