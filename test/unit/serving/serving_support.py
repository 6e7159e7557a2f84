"""Requests for the tests, and servers: in this process with limits of their own, or `flashrt serve`."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from flashrt_runtime.serving import ModelWorker, ServerSettings, create_app, listen
from flashrt_runtime.serving.server import uvicorn_config

ROOT = Path(__file__).resolve().parents[3]
DIGEST = "0" * 64
HOME = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02]
VIEWS = ("base_0_rgb", "left_wrist_0_rgb")


def picture(index: int, size: tuple[int, int] = (224, 224)) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def request_body(**changes: Any) -> dict[str, Any]:
    """A JSON request with small images of two views; None leaves a key out."""
    images = {view: text(encoded(picture(index, (48, 64)))) for index, view in enumerate(VIEWS)}
    body = {"images": images, "state": HOME, "prompt": "pick up the block", "seed": 3} | changes
    return {key: value for key, value in body.items() if value is not None}


@dataclass
class Served:
    """A running server."""

    host: str
    port: int
    http: httpx.Client
    service: Any = None
    pid: int | None = None

    def metric(self, line: str) -> float:
        """One sample of /metrics by its name and labels."""
        for sample in self.http.get("/metrics").text.splitlines():
            if sample.startswith(line + " "):
                return float(sample.rsplit(" ", 1)[1])
        return 0.0


class Gate:
    """A real policy whose predict waits until it is let go: what a slow model looks like from outside."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.spec, self.precision = policy, policy.spec, policy.precision
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.calls = 0

    def predict(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.calls += 1
        self.entered.release()
        assert self.open.wait(30)
        return self.policy.predict(*args, **kwargs)

    def close(self) -> None:
        self.policy.close()


class Shared:
    """A policy whose owner closes it."""

    def __init__(self, policy: Any) -> None:
        self.spec, self.precision, self.predict = policy.spec, policy.precision, policy.predict

    def close(self) -> None:
        pass


@contextlib.contextmanager
def serving(policy: Any, **settings: Any) -> Iterator[Served]:
    """A server in this process for as long as the block lasts."""
    chosen = ServerSettings(**settings)
    worker = ModelWorker(lambda: policy, chosen.queue_size)
    sock = listen(port=0)
    app = create_app(worker, chosen, DIGEST)
    server = uvicorn.Server(uvicorn_config(app, chosen))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    host, port = sock.getsockname()
    try:
        headers = {"Authorization": f"Bearer {chosen.token}"} if chosen.token else {}
        with httpx.Client(base_url=f"http://{host}:{port}", headers=headers, timeout=60) as client:
            wait_for(lambda: server.started)
            yield Served(host, port, client, app.state.service)
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def served_by_command(checkpoint: Path, *options: str) -> Iterator[Served]:
    """`flashrt serve` in a process of its own, ended with SIGTERM."""
    command = [sys.executable, "-m", "flashrt_runtime.cli", "serve", "--checkpoint", str(checkpoint)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*command, "--port", "0", "--json", "--hardware", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        else:
            pytest.fail(f"no server: {process.stderr.read() if process.stderr else ''}")
        address = json.loads("".join(lines))["address"]
        host, port = address.removeprefix("http://").split(":")
        with httpx.Client(base_url=address, timeout=60) as client:
            wait_for(lambda: client.get("/healthz").is_success)
            yield Served(host, int(port), client, pid=process.pid)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert process.returncode in (0, -15), errors
        assert "Traceback" not in errors, errors


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    """Until the condition holds; fails after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
