"""Clients that leave, dawdle or send too much: each is bounded, told clearly and logged once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_support import (
    HOME,
    VIEWS,
    Gate,
    Shared,
    picture,
    request_body,
    served_by_command,
    text,
    wait_for,
)
from websockets.sync.client import connect

from flashrt_runtime.errors import OptionError
from flashrt_runtime.serving import listen, wire

GIGABYTE = 1 << 30
MEBIBYTE = 1 << 20


@pytest.fixture
def gate(policy):
    slow = Gate(Shared(policy))
    yield slow
    slow.open.set()


def raw_request(body: bytes, *headers: str) -> bytes:
    lines = ["POST /predict HTTP/1.1", "Host: server", "Content-Type: application/json", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def connected(served) -> socket.socket:
    return socket.create_connection((served.host, served.port), timeout=30)


def answer_of(stream: socket.socket) -> bytes:
    """One whole answer with a length; the connection may stay open."""
    content = b""
    while True:
        head, _, body = content.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if length is not None and len(body) >= int(length[1]):
            return content
        piece = stream.recv(1 << 16)
        assert piece, content
        content += piece


def rest_of(stream: socket.socket) -> bytes:
    """What comes until the server closes."""
    content = b""
    while True:
        try:
            piece = stream.recv(1 << 16)
        except ConnectionResetError:
            return content
        if not piece:
            return content
        content += piece


def lines(caplog, word: str) -> list[str]:
    return [record.message for record in caplog.records if word in record.message]


def test_a_client_that_leaves_takes_its_observation_with_it(gate, serve, caplog):
    server = serve(gate, queue_size=4)
    body = json.dumps(request_body()).encode()
    first = connected(server)
    first.sendall(raw_request(body))
    assert gate.entered.acquire(timeout=30)
    second = connected(server)
    second.sendall(raw_request(body))
    wait_for(lambda: server.service.worker.waiting == 1)
    second.close()
    wait_for(lambda: server.service.worker.waiting == 0)
    wait_for(lambda: server.metric('flashrt_requests_total{outcome="disconnected",transport="http"}') == 1)
    gate.open.set()
    assert b'"actions"' in answer_of(first)
    first.close()
    assert gate.calls == 1
    assert len(lines(caplog, "the client left")) == 1


def test_a_client_that_leaves_in_the_middle_of_its_body(gate, serve, caplog):
    server = serve(gate)
    stream = connected(server)
    stream.sendall(raw_request(b"{" * 100, "Content-Length: 1000"))
    time.sleep(0.05)
    stream.close()
    wait_for(lambda: lines(caplog, "the client left"))
    assert len(lines(caplog, "the client left")) == 1
    assert gate.calls == 0


def test_a_deadline_while_another_is_computed(gate, serve):
    server = serve(gate)
    stream = connected(server)
    stream.sendall(raw_request(json.dumps(request_body()).encode()))
    assert gate.entered.acquire(timeout=30)
    began = time.monotonic()
    answer = server.http.post("/predict", json=request_body(deadline_ms=200))
    assert 0.15 < time.monotonic() - began < 5
    assert answer.status_code == 504
    assert answer.json() == {"error": "deadline", "detail": "no actions within 200 ms: ask less often"}
    wait_for(lambda: server.service.worker.waiting == 0)
    gate.open.set()
    stream.close()


def test_a_full_queue_is_429_with_a_time_to_try_again(gate, serve):
    server = serve(gate, queue_size=1)
    streams = [connected(server) for _ in range(2)]
    body = json.dumps(request_body()).encode()
    streams[0].sendall(raw_request(body))
    assert gate.entered.acquire(timeout=30)
    streams[1].sendall(raw_request(body))
    wait_for(lambda: server.service.worker.waiting == 1)
    answer = server.http.post("/predict", json=request_body())
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"] == "queue_full"
    assert server.http.get("/health").json()["waiting"] == 1
    gate.open.set()
    for stream in streams:
        assert b"200 OK" in answer_of(stream)
        stream.close()


def test_health_while_the_model_is_stuck(gate, serve):
    server = serve(gate, stuck_after_s=0.2)
    stream = connected(server)
    stream.sendall(raw_request(json.dumps(request_body()).encode()))
    assert gate.entered.acquire(timeout=30)
    wait_for(lambda: server.http.get("/health").status_code == 503)
    assert "has been running for" in server.http.get("/health").json()["problem"]
    assert server.http.get("/healthz").status_code == 503
    gate.open.set()
    answer_of(stream)
    wait_for(lambda: server.http.get("/health").status_code == 200)
    stream.close()


def test_headers_sent_slowly_are_cut_off(policy, serve, caplog):
    server = serve(Shared(policy), receive_timeout_s=0.5)
    stream = connected(server)
    began = time.monotonic()
    stream.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n")
    while time.monotonic() - began < 10:
        try:
            stream.sendall(b"X-A: b\r\n")
        except OSError:
            break
        time.sleep(0.1)
    assert time.monotonic() - began < 5
    assert len(lines(caplog, "no complete request within 0.5 s")) == 1


def test_a_silent_connection_and_a_slow_second_request_are_cut_off(policy, serve):
    server = serve(Shared(policy), receive_timeout_s=0.5)
    silent, second = connected(server), connected(server)
    second.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"OK" in answer_of(second)
    second.sendall(b"GET /healthz HT")
    began = time.monotonic()
    assert rest_of(silent) == b""
    assert rest_of(second) == b""
    assert time.monotonic() - began < 5


def test_a_body_sent_slowly_is_408(policy, serve, caplog):
    server = serve(Shared(policy), receive_timeout_s=0.5)
    stream = connected(server)
    stream.sendall(raw_request(b"{", "Content-Length: 1000"))
    began = time.monotonic()
    answer = rest_of(stream)
    assert time.monotonic() - began < 5
    assert b"408 Request Timeout" in answer
    assert b"1 bytes of the body after 0.5 s" in answer
    assert len(lines(caplog, "408 body_timeout")) == 1


def test_an_announced_gigabyte_is_413_before_it_is_sent(policy, serve, caplog):
    server = serve(Shared(policy))
    stream = connected(server)
    stream.sendall(raw_request(b"", f"Content-Length: {GIGABYTE}"))
    assert b"413 " in answer_of(stream)
    stream.close()
    assert len(lines(caplog, "413 body_too_large")) == 1


def test_what_is_refused_early_is_not_drained(policy, serve):
    """A body that nobody wants could go on for ever: the answer ends the connection."""
    server = serve(Shared(policy), token="a-long-secret")
    for headers in ([f"Content-Length: {GIGABYTE}"], ["Transfer-Encoding: chunked"]):
        with connected(server) as stream:
            stream.sendall(raw_request(b"", *headers))
            answer = rest_of(stream)
            assert b"401 Unauthorized" in answer
            assert b"connection: close" in answer.lower()
    with connected(server) as stream:  # a body of a usual size is, so that the connection can be kept
        for _ in range(2):
            stream.sendall(raw_request(bytes(100_000)))
            assert b"connection: close" not in answer_of(stream).lower()


def test_a_robot_that_drops_its_websocket_during_an_inference(gate, serve, caplog):
    server = serve(gate)
    message = wire.pack({"images": dict.fromkeys(VIEWS, picture(0)), "state": HOME, "prompt": "a", "seed": 1})
    with connect(f"ws://{server.host}:{server.port}", compression=None) as websocket:
        websocket.recv()
        websocket.send(message)
        assert gate.entered.acquire(timeout=30)
        websocket.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake: the cable was pulled
    gate.open.set()
    wait_for(lambda: server.metric("flashrt_websocket_connections") == 0)
    wait_for(lambda: server.service.budget.used == 0)
    assert not [record for record in caplog.records if record.exc_info], "a traceback for a client that left"
    assert server.http.post("/predict", json=request_body()).status_code == 200


def test_messages_in_work_are_bounded(gate, serve):
    server = serve(gate, max_body_bytes=400_000, max_buffered_bytes=700_000)
    message = wire.pack({"images": dict.fromkeys(VIEWS, picture(0)), "state": HOME, "prompt": "a", "seed": 1})
    sockets = [connect(f"ws://{server.host}:{server.port}", compression=None) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for socket_ in sockets:
            stack.enter_context(socket_).recv()
        for socket_ in sockets[:2]:
            socket_.send(message)
        assert gate.entered.acquire(timeout=30)
        wait_for(lambda: server.service.budget.used == 2 * len(message))
        sockets[2].send(message)
        assert sockets[2].recv().startswith("memory_full")
        gate.open.set()
        for socket_ in sockets[:2]:
            assert wire.unpack(socket_.recv())["seed"] == 1
    wait_for(lambda: server.service.budget.used == 0)


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_streamed_gigabyte_is_cut_at_the_limit(command_server):
    """Chunked, so that no length tells; the default limit is 32 MiB."""
    before = resident(command_server.pid)
    chunk = b"%x\r\n" % MEBIBYTE + bytes(MEBIBYTE) + b"\r\n"
    sent = 0
    with connected(command_server) as stream:
        stream.sendall(raw_request(b"", "Transfer-Encoding: chunked"))
        try:
            while sent < GIGABYTE:
                stream.sendall(chunk)
                sent += MEBIBYTE
        except OSError:
            pass
    assert 30 * MEBIBYTE <= sent < 48 * MEBIBYTE
    assert resident(command_server.pid) - before < 100 * MEBIBYTE
    assert command_server.http.get("/healthz").is_success


def test_bodies_together_are_bounded(policy, serve):
    server = serve(Shared(policy), max_body_bytes=2 * MEBIBYTE, max_buffered_bytes=3 * MEBIBYTE)
    streams = [connected(server) for _ in range(3)]
    for stream in streams:
        stream.sendall(raw_request(bytes(MEBIBYTE + 4096), f"Content-Length: {2 * MEBIBYTE}"))
    answers = []
    for stream in streams:
        stream.settimeout(0.3)
        try:
            answers.append(answer_of(stream))
        except TimeoutError:
            answers.append(b"")
        stream.close()
    assert sum(b"memory_full" in answer for answer in answers) == 1
    wait_for(lambda: server.http.post("/predict", json=request_body()).status_code == 200)


@pytest.mark.parametrize("junk", [b"\x00" * 200, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00" + bytes(100)])
def test_what_is_no_http_is_answered_400(served, junk):
    with connected(served) as stream:
        stream.sendall(junk + b"\r\n\r\n")
        assert b"400 Bad Request" in rest_of(stream)
    assert served.http.get("/healthz").is_success


def test_a_decompression_bomb_is_refused_by_its_header(served):
    """A PNG of a few kilobytes that would be 25 megapixels."""
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 5_000, 5_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(1000)))
    answer = served.http.post("/predict", json=request_body(images=[text(bomb)] * 2))
    assert answer.status_code == 422
    assert "5000x5000 is more than" in answer.json()["detail"]


@pytest.mark.slow
def test_the_command_ends_on_sigterm_with_a_request_under_way(checkpoint):
    with served_by_command(checkpoint) as server:
        body = json.dumps(request_body()).encode()
        stream = connected(server)
        stream.sendall(raw_request(body))
        time.sleep(0.01)
    stream.close()  # served_by_command asserts a clean end within its time


def test_the_answer_of_a_port_in_use_names_it(served):
    with pytest.raises(OptionError, match=f"127.0.0.1:{served.port} cannot be listened on"):
        listen("127.0.0.1", served.port)


def test_clients_that_come_and_go_leave_nothing(served):
    before = served.service.worker.waiting
    for _ in range(5):
        with httpx.Client(base_url=f"http://{served.host}:{served.port}") as client:
            assert client.get("/healthz").is_success
    assert served.service.worker.waiting == before
    assert np.isfinite(served.metric("flashrt_queue_length"))
