"""Which of several kernels serves an operation at a shape: measured once on a GPU, remembered on disk.

Until something was measured the first candidate serves. Where several are within `MARGIN` of the fastest the
first of them is kept, so that noise does not change the kernels, and with them the rounding, from one machine
start to the next.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..cache import cache_directory, write_atomically
from ..errors import OptionError
from . import native, prefix

logger = logging.getLogger(__name__)

# Beside noise: between two neighbours what begins early is still 1 to 2.5 us of 20 slower than in a forward.
MARGIN = 1.08
REPEATS = 7
ROUNDS = 2  # of each candidate the fastest counts: a change of clocks or another program spoils one
FLUSH_BYTES = 128 << 20  # more than any GPU's second-level cache: weights come from memory, as in a forward

NEIGHBOUR_SHAPE = (512, 2048)

Candidates = Mapping[str, Callable[[], Tensor]]


class Variants:
    """The choices in force on one GPU in this process."""

    def __init__(self, measure: Callable[[Callable[[], Tensor]], float] | None = None) -> None:
        """measure: milliseconds of one call; default by CUDA events on the current stream."""
        self.chosen: dict[str, str] = {}
        self.measured: dict[str, dict[str, float]] = {}
        self.timed = 0  # operations that were measured here, not remembered
        self._measure = measure or _device_time
        self._here = threading.local()  # who measures, and not all who run meanwhile

    def run(self, operation: str, candidates: Candidates) -> Tensor:
        """The result of the candidate that serves `operation`, a name with its shape and dtype.

        candidates: in order of preference, all of them valid here.
        """
        measuring = getattr(self._here, "measuring", False)
        if measuring and operation not in self.chosen and len(candidates) > 1:
            self._choose(operation, candidates)
        name = self.chosen.get(operation, "")
        return candidates[name if name in candidates else next(iter(candidates))]()

    def _choose(self, operation: str, candidates: Candidates) -> None:
        times: dict[str, float] = {}
        serving = dict(candidates)
        for _ in range(ROUNDS):
            for name, call in list(serving.items()):
                try:
                    times[name] = min(self._measure(call), times.get(name, math.inf))
                except RuntimeError as error:  # another one may serve
                    logger.warning("%s: %s failed: %s", operation, name, error)
                    times.pop(name, None)
                    del serving[name]
        if not times:
            return
        fastest = min(times.values())
        self.timed += 1
        self.measured[operation] = times
        self.chosen[operation] = next(name for name, each in times.items() if each <= MARGIN * fastest)
        described = ", ".join(f"{name} {1e3 * each:.1f} us" for name, each in times.items())
        logger.debug("%s: %s of %s", operation, self.chosen[operation], described)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what this thread runs in this block for the first time; not for a stream being captured."""
        before = getattr(self._here, "measuring", False)
        self._here.measuring = True
        try:
            yield
        finally:
            self._here.measuring = before

    @contextlib.contextmanager
    def remembered(
        self, identity: Mapping[str, str], file: Path | None, anew: bool = False
    ) -> Iterator[None]:
        """Take the choices of `file`, if of this identity; what the block measures goes there too.

        file: None where there is no place for one. anew: forget what is known, and measure again.
        """
        if anew:
            self.chosen, self.measured = {}, {}
        elif file is not None:
            chosen, measured = _read(file, identity)
            self.chosen = chosen | self.chosen
            self.measured = measured | self.measured
        before = self.timed
        yield
        if file is not None and self.timed > before:
            content = dict(identity) | {"chosen": self.chosen, "measured_ms": self.measured}
            with contextlib.suppress(OSError):  # a read-only home costs the time of measuring, no more
                write_atomically(file, json.dumps(content, indent=1).encode())


TABLES: dict[int, Variants] = {}


def of(device: torch.device) -> Variants:
    """The table of a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return TABLES.setdefault(index, Variants())


def device_identity(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: GPU, torch, CUDA, this package's version and its kernels as built."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "version": __version__,
        "kernels": _kernels_digest() if native.available() else "none",
    }


@functools.cache
def _kernels_digest() -> str:
    return hashlib.sha256(Path(str(native.load().__file__)).read_bytes()).hexdigest()


def device_file(device: torch.device) -> Path | None:
    """Where the choices of a GPU are kept; None for a user without a home."""
    name = "".join(each if each.isalnum() else "-" for each in torch.cuda.get_device_name(device))
    try:
        return cache_directory() / "autotune" / f"{name}.json"
    except OptionError:
        return None


def _read(file: Path, identity: Mapping[str, str]) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Choices and times of a file; none where it is of another identity, damaged or not there."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if any(content[name] != value for name, value in identity.items()):
            return {}, {}
        chosen = {str(operation): str(name) for operation, name in content["chosen"].items()}
        return chosen, dict(content["measured_ms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def _neighbour() -> Callable[[], object]:
    """A small kernel of ours, as they stand in front of an operation and behind it."""
    rows = torch.empty(NEIGHBOUR_SHAPE, dtype=torch.bfloat16, device="cuda").zero_()
    one = torch.ones((), device="cuda")
    return functools.partial(prefix.quantise, rows, one) if native.available() else (lambda: None)


def _device_time(call: Callable[[], Tensor]) -> float:
    """Median milliseconds of a call as a graph replays it, between two small kernels of ours, its operands
    from memory.

    Launched one by one, several small kernels would take the host's time; alone, a kernel that begins while
    the one in front still runs would gain nothing by it.
    """
    neighbour = _neighbour()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph, stream, before = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    times: list[float] = []
    with torch.cuda.stream(stream):
        neighbour()
        call()
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            neighbour()
            call()
            neighbour()
        finally:
            graph.capture_end()
        for _ in range(REPEATS):
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    before.wait_stream(stream)
    return statistics.median(times)
