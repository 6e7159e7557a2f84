"""Ask /health every 20 ms until standard input ends: HOST PORT PID. Prints JSON of times, queue and memory.

A process of its own: in one that has run thousands of tests a collection of garbage would be taken for the
server's delay.
"""

import http.client
import json
import select
import sys
import time
from pathlib import Path


def main() -> None:
    host, port, pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    probe = http.client.HTTPConnection(host, port, timeout=30)
    health, waiting, memory = [], [], []
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        began = time.perf_counter()
        probe.request("GET", "/health")
        answer = probe.getresponse()
        content = json.loads(answer.read())
        health.append((time.perf_counter() - began) * 1e3)
        if answer.status != 200:
            sys.exit(f"/health answered {answer.status}: {content}")
        waiting.append(content["waiting"])
        memory.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096)
    print(json.dumps({"health_ms": health, "waiting": waiting, "memory": memory}))


if __name__ == "__main__":
    main()
