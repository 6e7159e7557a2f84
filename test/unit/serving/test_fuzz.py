"""Requests made up from our own OpenAPI page, valid and not: never a 500, never a hang."""

from __future__ import annotations

import collections

import hypothesis
import pytest
from hypothesis import strategies
from serving_support import HOME, encoded, picture, text, wait_for

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

# of 2,000 requests; the pages that take no input need fewer
SHARES = {"/predict": 1700, "/health": 100, "/healthz": 100, "/metrics": 100}
TIMEOUT_S = 20


@pytest.mark.slow
def test_two_thousand_requests(command_server):
    base = f"http://{command_server.host}:{command_server.port}"
    images = [text(encoded(picture(index, (24, 32)))) for index in range(4)]
    broken = [images[0][:40], text(b"no image"), "%", ""]
    schemathesis.openapi.format("byte", strategies.sampled_from(images * 4 + broken))
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    statuses: collections.Counter[int] = collections.Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        fuzz(operation, base, SHARES[operation.path], statuses)
    print(dict(statuses))
    assert sum(statuses.values()) >= 2000
    # 504 is what a deadline of a few microseconds asks for
    assert not {status for status in statuses if status >= 500} - {504}, statuses
    assert statuses[422] > 100, "nothing was refused: the fuzzing does not reach the validation"
    assert command_server.metric('flashrt_requests_total{outcome="ok",transport="http"}') > 100
    wait_for(lambda: command_server.http.get("/health").json()["waiting"] == 0)


def towards_the_model(body: dict) -> None:
    """Leaves the state, the seed and the images to chance, so that many requests get as far as the model."""
    for name in ("image_shape", "deadline_ms"):
        body.pop(name, None)
    body["prompt"] = str(body.get("prompt"))[:8] or "pick"
    if not body.get("state"):
        body["state"] = HOME


def fuzz(operation, base: str, count: int, statuses: collections.Counter) -> None:
    """`count` requests, half of them made to break the schema where the operation takes input."""
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body:
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    for mode in modes:
        fuzz_mode(operation, mode, base, count // len(modes), statuses)


def fuzz_mode(operation, mode, base: str, count: int, statuses: collections.Counter) -> None:
    valid = mode is schemathesis.GenerationMode.POSITIVE
    sent = 0

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        nonlocal sent
        sent += 1
        if sent % 2 and valid and isinstance(case.body, dict):
            towards_the_model(case.body)
        answer = case.call(base_url=base, timeout=TIMEOUT_S)
        statuses[answer.status_code] += 1
        if operation.path == "/predict" and answer.status_code != 200:
            content = answer.json()
            assert set(content) <= {"error", "detail"}, content

    send()
    while sent < count:  # a small space of inputs is exhausted early
        statuses[operation.Case().call(base_url=base, timeout=TIMEOUT_S).status_code] += 1
        sent += 1
