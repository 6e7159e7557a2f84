"""What a request costs beyond the model, on loopback: the client's wall time less the server's `infer_ms`.

    python -m benchmarks.bench_serving                        # a tiny random policy, two views of 224x224
    python -m benchmarks.bench_serving --checkpoint DIR --requests 500 --json

The server is `flashrt serve` in a process of its own. Websocket is the unmodified openpi-client; HTTP is a
kept connection. Clients ask one after the other.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image

from flashrt_runtime.serving import wire
from flashrt_runtime.untrained import make_checkpoint

PROMPT = "pick up the block"
SIZE = (224, 224)
# name -> a call that sends observation number `index` and gives the server's own milliseconds
Ask = Callable[[int], float]


class Server:
    """`flashrt serve` until the block is left."""

    def __init__(self, checkpoint: Path, options: list[str]) -> None:
        command = [sys.executable, "-m", "flashrt_runtime.cli", "serve", "--checkpoint", str(checkpoint)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json", *options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        self.about = json.loads("".join(lines))
        self.host, port = self.about["address"].removeprefix("http://").split(":")
        self.port = int(port)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(30)


class Observations:
    """Random camera frames of the policy's views; every index another set."""

    def __init__(self, about: dict[str, Any], count: int = 16) -> None:
        rng = np.random.default_rng(0)
        self.views = about["views"]
        width = about["state_dim"]
        self.state = None if width is None else rng.uniform(-0.3, 0.3, width).astype(np.float32)
        self.frames = [rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(count)]

    def images(self, index: int) -> dict[str, np.ndarray]:
        return {
            view: self.frames[(index + number) % len(self.frames)] for number, view in enumerate(self.views)
        }

    def message(self, index: int) -> dict[str, Any]:
        return {"images": self.images(index), "state": self.state, "prompt": PROMPT, "seed": index}

    def json(self, index: int, kind: str | None) -> bytes:
        """kind: PNG or JPEG, None for raw pixels."""
        images = {view: base64.b64encode(_file(image, kind)).decode() for view, image in
                  self.images(index).items()}  # fmt: skip
        shape = {} if kind else {"image_shape": [*SIZE, 3]}
        state = None if self.state is None else self.state.tolist()
        body = {"images": images, "state": state, "prompt": PROMPT, "seed": index}
        return json.dumps(body | shape).encode()


def _file(image: np.ndarray, kind: str | None) -> bytes:
    if kind is None:
        return image.tobytes()
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def transports(server: Server, observations: Observations) -> dict[str, Ask]:
    client = WebsocketClientPolicy(server.host, server.port)
    connection = http.client.HTTPConnection(server.host, server.port)

    def websocket(index: int) -> float:
        return float(client.infer(observations.message(index))["server_timing"]["infer_ms"])

    def post(body: bytes, kind: str) -> bytes:
        connection.request("POST", "/predict", body, {"Content-Type": kind, "Accept": kind})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(content.decode(errors="replace"))
        return content

    def msgpack(index: int) -> float:
        body = wire.pack(observations.message(index))
        return float(wire.unpack(post(body, "application/msgpack"))["latency_ms"])

    def as_json(kind: str | None) -> Ask:
        bodies = [observations.json(index, kind) for index in range(len(observations.frames))]
        return lambda index: float(
            json.loads(post(bodies[index % len(bodies)], "application/json"))["latency_ms"]
        )

    return {
        "websocket (openpi-client)": websocket,
        "HTTP msgpack": msgpack,
        "HTTP JSON, raw": as_json(None),
        "HTTP JSON, JPEG": as_json("JPEG"),
    }


def measure(ask: Ask, requests: int) -> dict[str, float]:
    """Milliseconds: p50 of the whole call and of the model, p50, p95 and p99 of the difference."""
    for index in range(5):
        ask(index)
    walls, models = [], []
    for index in range(requests):
        began = time.perf_counter()
        models.append(ask(index))
        walls.append((time.perf_counter() - began) * 1e3)
    beyond = np.array(walls) - np.array(models)
    quantiles = {f"overhead_p{share}_ms": float(np.percentile(beyond, share)) for share in (50, 95, 99)}
    return {"wall_p50_ms": float(np.median(walls)), "model_p50_ms": float(np.median(models)), **quantiles}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny random policy")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--hardware", default="auto")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or make_checkpoint(Path(folder) / "tiny", preset="demo_arm")
        options = ["--views", str(args.views), "--hardware", args.hardware]
        with Server(checkpoint, options) as server:
            observations = Observations(server.about)
            rows = {
                name: measure(ask, args.requests)
                for name, ask in transports(server, observations).items()
            }
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    about = f"{server.about['policy']} {server.about['precision']}, {args.requests} requests"
    print(f"| {about} | wall p50 | model p50 | overhead p50 | p95 | p99 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f} ms" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
