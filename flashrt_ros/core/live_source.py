"""Observations of the live topics, one after the other, for a calibration: by the synchroniser that serves
the policy, and by an ingest of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from .contract_model import RobotContract
from .errors import IngestError, TooFewObservationsError
from .images import FallbackDecoder
from .ingest import Ingest
from .observation import Observation
from .reasons import Reason
from .sync import NotReady, Synchroniser
from .timing import NS_PER_S, to_s

INTERVAL = NS_PER_S // 10  # between two observations: neighbouring frames say the same [ns]
POLL = 0.01  # [s]


class LiveSource:
    """Belongs to the thread that takes the observations; messages are pushed by others."""

    def __init__(
        self,
        contract: RobotContract,
        synchroniser: Synchroniser,
        clock: Callable[[], int],
        fallback_decoder: FallbackDecoder | None = None,
        monotonic: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """clock: ROS time [ns]; fallback_decoder: see image_from_message."""
        self._contract = contract
        self._synchroniser = synchroniser
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._ingest = Ingest(contract, fallback_decoder)

    def observations(
        self,
        count: int,
        *,
        go_on: Callable[[], bool],
        patience: int | None = None,
        on_problem: Callable[[NotReady | None], None] = lambda problem: None,
    ) -> Iterator[Observation]:
        """At most `count` observations with different camera frames, 0.1 s apart or more.

        Ends early when `go_on` says no. on_problem is told what stands in the way, and None when it is gone.
        Raises TooFewObservationsError after `patience` ns without an observation; None: waits for ever.
        """
        used: tuple[int, ...] = ()
        last: NotReady | None = None
        for taken in range(count):
            begin = now = self._monotonic()
            while go_on():
                found = self._newest()
                if isinstance(found, Observation) and (stamps := self._camera_stamps(found)) != used:
                    used, begin = stamps, self._monotonic()
                    on_problem(None)
                    yield found
                    break
                if isinstance(found, NotReady):
                    last = found
                    on_problem(found)
                now = self._monotonic()
                if patience is not None and now - begin > patience:
                    raise self._too_few(taken, count, now - begin, last)
                self._sleep(POLL)
            else:
                return
            self._rest(begin, go_on)

    def _rest(self, taken: int, go_on: Callable[[], bool]) -> None:
        """Until the next observation is due."""
        while go_on() and self._monotonic() - taken < INTERVAL:
            self._sleep(POLL)

    def _newest(self) -> Observation | NotReady:
        selected = self._synchroniser.select(self._clock(), self._monotonic())
        if isinstance(selected, NotReady):
            return selected
        try:
            return self._ingest.observe(selected)
        except IngestError as error:
            return NotReady(error.reason, error.stream, error.message)

    def _camera_stamps(self, observation: Observation) -> tuple[int, ...]:
        return tuple(observation.stamps.get(stream.name, -1) for stream in self._contract.image_streams)

    @staticmethod
    def _too_few(taken: int, count: int, waited: int, problem: NotReady | None) -> TooFewObservationsError:
        why = "no new camera frame came" if problem is None else f"{problem.stream}: {problem.message}"
        text = f"{taken} of {count} observations, then none for {to_s(waited):.1f} s: {why}"
        return TooFewObservationsError(Reason.STALE_RECEIPT if problem is None else problem.reason, text)
