"""From an observation's bytes to its actions, whatever they came through: what HTTP and websocket share."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .. import __version__
from .body import BodyBudget
from .metrics import Metrics
from .refusals import Refusal, Reporter, refusal_of
from .requests import Reader
from .settings import ServerSettings
from .worker import ModelWorker, Observation, Prediction

logger = logging.getLogger(__name__)

DECODING_THREADS = 2
CLOSE_TIMEOUT_S = 10.0

Read = Callable[[], tuple[Observation, float]]


class Service:
    """One model's thread with all that is around it."""

    def __init__(self, worker: ModelWorker, settings: ServerSettings, checkpoint_digest: str) -> None:
        self.worker, self.settings, self.digest = worker, settings, checkpoint_digest
        self.reader = Reader(worker.spec, settings)
        self.reporter = Reporter()
        self.budget = BodyBudget(settings)
        self.metrics = Metrics(lambda: worker.waiting, lambda: self.problem() is None)
        labels = (worker.spec.config, worker.precision, checkpoint_digest, __version__)
        self.metrics.policy.labels(*labels).set(1)
        self.started = time.time()
        self._decoders = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode")

    def problem(self) -> str | None:
        """Why the server is not healthy, or None."""
        return self.worker.problem(self.settings.stuck_after_s)

    async def predict(self, transport: str, started: float, read: Read) -> Prediction:
        """Decode on another thread, queue, wait. started: on time.monotonic(). Raises Refusal."""
        observation, limit_s = await self._decode(read)
        deadline = started + limit_s
        future = asyncio.wrap_future(self.worker.submit(observation, deadline))
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                prediction = await future
        except TimeoutError:
            raise Refusal(
                504, "deadline", f"no actions within {limit_s * 1e3:.0f} ms: ask less often"
            ) from None
        except Exception as error:
            raise refusal_of(error) from error
        self.metrics.inference.observe(prediction.infer_s)
        self.metrics.queued.observe(prediction.queue_s)
        self.metrics.total.observe(time.monotonic() - started)
        self.metrics.requests.labels(transport, "ok").inc()
        return prediction

    async def _decode(self, read: Read) -> tuple[Observation, float]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, read)
        except Exception as error:
            raise refusal_of(error) from error

    def refused(self, transport: str, client: str, refusal: Refusal) -> None:
        """Count and log a request that gets no actions."""
        self.metrics.requests.labels(transport, refusal.code).inc()
        self.reporter.report(client, refusal)

    def authorise(self, headers: Mapping[str, str]) -> None:
        """Refusal 401 unless the token of the settings is there: `Bearer`, or openpi's `Api-Key`."""
        token = self.settings.token
        if token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
        if scheme.lower() not in ("bearer", "api-key") or not same:
            raise Refusal(401, "unauthorised", "this server needs the header Authorization: Bearer TOKEN")

    @staticmethod
    def check_origin(headers: Mapping[str, str]) -> None:
        """Refusal 403 for a page of another site that a browser lets talk to this machine's ports."""
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise Refusal(403, "foreign_origin", f"requests from pages of {origin[:80]!r} are not answered")

    def describe(self) -> dict[str, Any]:
        """What is served: the websocket's metadata and part of /health; plain data."""
        spec = self.worker.spec
        return {
            "server": "flashrt",
            "version": __version__,
            "policy": spec.config,
            "precision": self.worker.precision,
            "checkpoint": self.digest,
            "views": list(spec.views),
            "state_dim": spec.state_dim,
            "state_names": list(spec.state_names) if spec.state_names else None,
            "action_dim": spec.action_dim,
            "action_names": list(spec.action_names) if spec.action_names else None,
            "action_horizon": spec.horizon,
            "action_representation": spec.action_representation,
            "rate_hz": spec.action_rate_hz,
            "layout": self.settings.layout,
        }

    def close(self) -> None:
        """End the threads; the policy is freed, unless an inference under way does not end in time."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if not self.worker.close(CLOSE_TIMEOUT_S):
            logger.error("the inference under way has not ended in %g s: left alone", CLOSE_TIMEOUT_S)
