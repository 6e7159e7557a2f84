"""A policy whose GPU is lost: 503 with the reason from then on, and a process that ends to be started again.

Simulated: the policy is told to raise what the runtime raises then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_support import ROOT, Gate, Shared, request_body, wait_for

from flashrt_runtime.errors import DeviceLostError
from flashrt_runtime.serving.worker import ModelWorker, Observation

TEXT = "the GPU is lost to this process (simulated)"


class Losing(Shared):
    """Loses its GPU at the next inference once it is told to."""

    def __init__(self, policy):
        super().__init__(policy)
        self.lose, self.calls, self._predict = threading.Event(), 0, policy.predict
        del self.predict

    def predict(self, *arguments, **options):
        self.calls += 1
        if self.lose.is_set():
            raise DeviceLostError(TEXT)
        return self._predict(*arguments, **options)


def test_it_is_unavailable_with_the_reason_and_the_model_is_not_asked_again(policy, serve):
    losing = Losing(policy)
    server = serve(losing)
    assert server.http.post("/predict", json=request_body()).status_code == 200
    losing.lose.set()
    for _ in range(3):
        answer = server.http.post("/predict", json=request_body())
        assert (answer.status_code, answer.json()) == (503, {"error": "device_lost", "detail": TEXT})
    assert losing.calls == 2
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    assert health.json()["problem"] == TEXT
    assert server.http.get("/healthz").text == f"failing: {TEXT}\n"
    assert server.metric("flashrt_healthy") == 0


def test_those_that_wait_are_told_too(policy, serve):
    losing = Losing(policy)
    gate = Gate(losing)
    server = serve(gate)
    answers = []
    clients = [
        threading.Thread(target=lambda: answers.append(server.http.post("/predict", json=request_body())))
        for _ in range(3)
    ]
    for client in clients:
        client.start()
    wait_for(lambda: server.service.worker.waiting == 2)
    losing.lose.set()
    gate.open.set()
    for client in clients:
        client.join(30)
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["error"] for answer in answers} == {"device_lost"}
    assert losing.calls == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_one_that_met_it_is_answered_whatever_is_done_about_it(policy):
    losing = Losing(policy)
    losing.lose.set()
    worker = ModelWorker(lambda: losing, queue_size=1)

    def fail() -> None:
        raise RuntimeError("the server cannot be told")

    worker.on_lost = fail
    images = [np.zeros((8, 8, 3), np.uint8)] * len(policy.spec.views)
    answer = worker.submit(Observation(images, "wave"), time.monotonic() + 30)
    with pytest.raises(DeviceLostError, match="simulated"):
        answer.result(timeout=10)
    worker.close(10)


SCRIPT = """
from flashrt_runtime import Policy
from flashrt_runtime.errors import DeviceLostError

predict = Policy.predict
calls = []

def losing(self, *arguments, **options):
    calls.append(1)
    if len(calls) > 1:  # the first is the warming up
        raise DeviceLostError("the GPU is lost to this process (simulated)")
    return predict(self, *arguments, **options)

Policy.predict = losing
from flashrt_runtime.cli import main
main()
"""


def test_the_command_says_so_for_a_moment_and_ends_with_a_status_of_its_own(checkpoint: Path):
    command = [sys.executable, "-c", SCRIPT, "serve", "--checkpoint", str(checkpoint), "--hardware", "cpu"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if " at http://" in line)
        address = line.partition(" at ")[2].split()[0]
        with httpx.Client(base_url=address, timeout=30) as client:
            wait_for(lambda: client.get("/healthz").is_success)
            assert client.post("/predict", json=request_body()).status_code == 503
            lost = time.monotonic()
            assert client.get("/health").json()["problem"] == TEXT
        _, errors = process.communicate(timeout=20)
        assert process.returncode == os.EX_TEMPFAIL
        assert time.monotonic() - lost < 10.0
        assert f"flashrt: {TEXT}" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
