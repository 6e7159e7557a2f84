"""Clients that ask as fast as they are answered, in a process of their own: the probe is not slowed.

    python load_client.py HOST PORT CLIENTS SECONDS BODY_FILE

Prints one JSON object: answers by status, and milliseconds of the successful ones. A refused client waits as
long as Retry-After says.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
from pathlib import Path


async def ask(reader, writer, request: bytes) -> tuple[int, float]:
    """Status and Retry-After of one answer on a kept connection."""
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    await reader.readexactly(int(headers["content-length"]))
    return int(lines[0].split()[1]), float(headers.get("retry-after", 0))


async def client(host, port, request, until, statuses, times) -> None:
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 22)
    while time.monotonic() < until:
        began = time.monotonic()
        status, pause = await asyncio.wait_for(ask(reader, writer, request), 30)
        statuses[status] += 1
        if status == 200:
            times.append((time.monotonic() - began) * 1e3)
        await asyncio.sleep(min(pause, max(until - time.monotonic(), 0)))
    writer.close()


async def main(host: str, port: int, clients: int, seconds: float, body: bytes) -> None:
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    statuses: collections.Counter[int] = collections.Counter()
    times: list[float] = []
    until = time.monotonic() + seconds
    await asyncio.gather(
        *(client(host, port, request, until, statuses, times) for _ in range(clients))
    )
    print(json.dumps({"statuses": statuses, "times_ms": times}))


if __name__ == "__main__":
    host, port, clients, seconds, file = sys.argv[1:]
    asyncio.run(main(host, int(port), int(clients), float(seconds), Path(file).read_bytes()))
