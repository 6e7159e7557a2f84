"""The HTTP interface: POST /predict, GET /health, /healthz, /metrics, and the OpenAPI page at /docs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from .. import __version__
from . import metrics, wire
from .layouts import check_layout
from .multipart import media_type
from .openpi import add_openpi_route
from .refusals import Refusal
from .requests import ErrorResponse, PredictResponse
from .schema import request_body
from .service import Service
from .settings import ServerSettings
from .worker import ModelWorker, Prediction

DESCRIPTION = """Actions of a vision-language-action policy. One observation is computed at a time.
The same port speaks openpi's websocket policy protocol at `/`."""

PAGE_MAY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
DRAINED = 1 << 20  # bytes of a refused body that are read and dropped to keep the connection

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body cannot be read", "model": ErrorResponse},
    401: {"description": "The token is missing or wrong", "model": ErrorResponse},
    403: {"description": "A web page of another site", "model": ErrorResponse},
    408: {"description": "The body came too slowly", "model": ErrorResponse},
    413: {"description": "The body is too large", "model": ErrorResponse},
    415: {"description": "The body's content-type is none of those below", "model": ErrorResponse},
    422: {"description": "The observation does not fit the policy", "model": ErrorResponse},
    429: {"description": "Too many observations wait: try again", "model": ErrorResponse},
    500: {"description": "The inference failed", "model": ErrorResponse},
    503: {"description": "The server is shutting down, or its GPU is lost", "model": ErrorResponse},
    504: {"description": "No actions within the deadline", "model": ErrorResponse},
}


def create_app(worker: ModelWorker, settings: ServerSettings, checkpoint_digest: str) -> FastAPI:
    """The application around a worker, which it closes when it ends.

    Raises OptionError for a layout that does not fit the policy.
    """
    check_layout(settings.layout, worker.spec, settings.cameras)
    service = Service(worker, settings, checkpoint_digest)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="flashrt",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its scripts from the internet, where a robot has none
        redoc_url=None,
    )
    app.state.service = service
    _add_predict(app, service)
    _add_status(app, service)
    add_openpi_route(app, service)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        service.refused("http", _client(request), refusal)
        return _answer(refusal, unread=_unread(request))

    return app


def _client(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else "unknown"


def _unread(request: Request) -> bool:
    """Whether so much of the body is still to come that the connection is better closed than drained."""
    if getattr(request.state, "body_read", False):
        return False
    announced = request.headers.get("content-length", "")
    return "transfer-encoding" in request.headers or int(announced if announced.isdecimal() else 0) > DRAINED


def _answer(refusal: Refusal, unread: bool = False) -> Response:
    headers = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = f"{refusal.retry_after_s:.0f}"
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if unread or refusal.status == 408:
        headers["Connection"] = "close"
    return JSONResponse(refusal.as_json(), refusal.status, headers)


def _add_predict(app: FastAPI, service: Service) -> None:
    @app.post(
        "/predict",
        response_model=PredictResponse,
        responses=REFUSALS,
        openapi_extra={"requestBody": request_body(service), "security": _security(service)},
        summary="Actions for one observation",
    )
    async def predict(request: Request) -> Response:
        started = time.monotonic()
        service.authorise(request.headers)
        service.check_origin(request.headers)
        service.worker.check_room()
        content_type = request.headers.get("content-type", "")
        try:
            async with service.budget.read(request) as body:
                answer = service.predict("http", started, lambda: service.reader.read(content_type, body))
                prediction = await _unless_disconnected(request, answer)
        except ClientDisconnect:
            refusal = Refusal(499, "disconnected", "the client left before its answer")
            service.refused("http", _client(request), refusal)
            return _answer(refusal)
        return _response(service, prediction, request.headers.get("accept", ""))

    if service.settings.token is not None:
        _declare_token(app)


async def _unless_disconnected(request: Request, answer: Awaitable[Prediction]) -> Prediction:
    """The answer; ClientDisconnect when the client leaves first, and then its observation is not computed."""
    task = asyncio.ensure_future(answer)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, left):
            pending.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(service: Service, prediction: Prediction, accept: str) -> Response:
    spec = service.worker.spec
    content: dict[str, Any] = {
        "actions": prediction.actions,
        "shape": list(prediction.actions.shape),
        "action_names": list(spec.action_names) if spec.action_names else None,
        "rate_hz": spec.action_rate_hz,
        "latency_ms": prediction.infer_s * 1e3,
        "queue_ms": prediction.queue_s * 1e3,
        "seed": prediction.seed,
        "checkpoint": service.digest,
    }
    if media_type(accept)[0] == "application/msgpack":
        return Response(wire.pack(content), media_type="application/msgpack")
    content["actions"] = prediction.actions.astype(float).tolist()
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether actions can be expected, and of which policy")
    async def health() -> JSONResponse:
        problem = service.problem()
        content = {
            "status": "ok" if problem is None else "failing",
            "problem": problem,
            "uptime_s": time.time() - service.started,
            "waiting": service.worker.waiting,
            "queue_size": service.worker.queue_size,
            **service.describe(),
        }
        return JSONResponse(content, 200 if problem is None else 503)

    @app.get("/healthz", summary="The same as one word, as openpi's server answers")
    async def healthz() -> PlainTextResponse:
        problem = service.problem()
        return (
            PlainTextResponse("OK\n") if problem is None else PlainTextResponse(f"failing: {problem}\n", 503)
        )

    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_MAY})

    @app.get("/metrics", summary="Prometheus metrics", responses={401: REFUSALS[401]})
    async def prometheus(request: Request) -> Response:
        service.authorise(request.headers)
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _security(service: Service) -> list[dict[str, list[str]]]:
    return [{"bearer": []}] if service.settings.token is not None else []


def _declare_token(app: FastAPI) -> None:
    """Adds the Authorize button of the OpenAPI page."""
    generated = app.openapi

    def with_token() -> dict[str, Any]:
        schema = generated()
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        return schema

    app.openapi = with_token  # type: ignore[method-assign]
