"""openpi's websocket policy protocol: metadata on connect, then one answer for each observation.

Messages are msgpack with NumPy arrays. An answer holds `actions` and `server_timing`; an error is a text
frame, as openpi's server sends it (its client raises RuntimeError with that text). openpi then closes the
connection; here it stays open unless the message was unreadable, so that one bad frame does not cost a robot
its connection.
"""

from __future__ import annotations

import time
from functools import partial

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse

from . import wire
from .refusals import Refusal
from .service import Service
from .worker import Observation, Prediction

UNREADABLE = 1007
INTERNAL_ERROR = 1011


def add_openpi_route(app: FastAPI, service: Service) -> None:
    """Serve the protocol at `/`."""
    connections = _Connections(service)

    @app.websocket("/")
    async def policy(websocket: WebSocket) -> None:
        client = f"{websocket.client.host}:{websocket.client.port}" if websocket.client else "unknown"
        try:
            service.authorise(websocket.headers)
            service.check_origin(websocket.headers)
            connections.admit()
        except Refusal as refusal:
            service.refused("openpi", client, refusal)
            await websocket.send_denial_response(JSONResponse(refusal.as_json(), refusal.status))
            return
        with service.metrics.websockets.track_inprogress():
            try:
                await websocket.accept()
                await websocket.send_bytes(wire.pack(service.describe()))
                await _serve(websocket, service, client)
            except WebSocketDisconnect:
                pass
            finally:
                connections.release()


class _Connections:
    def __init__(self, service: Service) -> None:
        self.limit, self.open = service.settings.max_connections, 0

    def admit(self) -> None:
        if self.open >= self.limit:
            raise Refusal(429, "too_many_connections", f"{self.limit} connections are open already", 1.0)
        self.open += 1

    def release(self) -> None:
        self.open -= 1


async def _serve(websocket: WebSocket, service: Service, client: str) -> None:
    """Answer until the client leaves (WebSocketDisconnect) or sends what cannot be read."""
    previous_s: float | None = None
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        started = time.monotonic()
        content = message.get("bytes")
        try:
            if content is None:
                raise wire.malformed("a text frame came, expected a binary one")
            with service.budget.hold(len(content)):
                read = partial(_read, service, content)
                prediction = await service.predict("openpi", started, read)
        except Refusal as refusal:
            service.refused("openpi", client, refusal)
            await websocket.send_text(f"{refusal.code}: {refusal.message}")
            if refusal.status == 400:
                await websocket.close(UNREADABLE, refusal.code)
                return
            continue
        await websocket.send_bytes(_answer(service, prediction, previous_s))
        previous_s = time.monotonic() - started


def _read(service: Service, content: bytes) -> tuple[Observation, float]:
    return service.reader.message(wire.unpack(content))


def _answer(service: Service, prediction: Prediction, previous_s: float | None) -> bytes:
    timing = {"infer_ms": prediction.infer_s * 1e3, "queue_ms": prediction.queue_s * 1e3}
    if previous_s is not None:
        timing["prev_total_ms"] = previous_s * 1e3
    return wire.pack(
        {
            "actions": prediction.actions,
            "policy_timing": {"infer_ms": prediction.infer_s * 1e3},
            "server_timing": timing,
            "seed": prediction.seed,
            "checkpoint": service.digest,
        }
    )
