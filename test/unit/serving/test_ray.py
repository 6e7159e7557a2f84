"""The Ray Serve example with real Ray on this CPU: it grows to two replicas and answers as predict does."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_support import HOME, VIEWS, Served, picture, request_body, wait_for

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'flashrt-runtime[server,ray]'")
serve = pytest.importorskip("ray.serve", reason="ray is installed without [serve]")

ROOT = Path(__file__).resolve().parents[3]
PORT = 8642
CLIENTS = 16

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def application(checkpoint):
    """One replica that may become two."""
    sys.path.insert(0, str(ROOT))
    from examples.ray_serve.policy import Arguments, build

    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        arguments = Arguments(checkpoint=str(checkpoint), hardware="cpu", gpus=0, max_replicas=2)
        serve.run(build(arguments), name="policy", route_prefix="/", blocking=False)
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client:
            wait_for(lambda: client.get("/healthz").is_success, 120)
            yield Served("127.0.0.1", PORT, client)
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.path.remove(str(ROOT))


def running() -> int:
    """Replicas that answer."""
    (deployment,) = serve.status().applications["policy"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def load(server: Served, until: threading.Event) -> tuple[Counter, Counter, list[float]]:
    """Clients that ask again and again: statuses, replicas, milliseconds."""
    statuses, replicas, times = Counter(), Counter(), []

    def client(number: int) -> None:
        with httpx.Client(base_url=f"http://{server.host}:{server.port}", timeout=60) as http:
            while not until.is_set():
                began = time.perf_counter()
                answer = http.post("/predict", json=request_body(seed=number))
                statuses[answer.status_code] += 1
                if answer.is_success:
                    replicas[answer.headers["x-replica"]] += 1
                    times.append((time.perf_counter() - began) * 1e3)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    until.wait()
    for thread in threads:
        thread.join()
    return statuses, replicas, times


@contextlib.contextmanager
def loaded(server: Served):
    """The load in the background; its result is in the list when the block has been left."""
    until, result = threading.Event(), []
    thread = threading.Thread(target=lambda: result.append(load(server, until)))
    thread.start()
    try:
        yield result
    finally:
        until.set()
        thread.join()


def test_one_replica_answers_as_predict_does(application, policy):
    pictures = [picture(index, (48, 64)) for index in range(2)]
    answer = application.http.post("/predict", json=request_body())
    assert answer.status_code == 200, answer.text
    expected = policy.predict(pictures, "pick up the block", np.array(HOME, np.float32), seed=3)
    np.testing.assert_array_equal(np.array(answer.json()["actions"], np.float32), expected)
    wrong = application.http.post("/predict", json=request_body(state=[1.0]))
    assert (wrong.status_code, wrong.json()["error"]) == (422, "invalid_observation")


def test_openpis_client_through_ray(application, policy):
    client_module = pytest.importorskip("openpi_client.websocket_client_policy")
    client = client_module.WebsocketClientPolicy("127.0.0.1", PORT)
    images = {view: picture(index) for index, view in enumerate(VIEWS)}
    sent = {"images": images, "state": np.array(HOME, np.float32), "prompt": "pick", "seed": 5}
    expected = policy.predict(list(images.values()), "pick", sent["state"], seed=5)
    np.testing.assert_array_equal(client.infer(sent)["actions"], expected)
    client._ws.close()


def test_under_load_a_second_replica_comes_and_both_answer(application):
    with loaded(application) as result:
        wait_for(lambda: running() == 2, 180)
        time.sleep(15)
    statuses, replicas, times = result[0]
    print(dict(statuses), dict(replicas), f"p50 {np.median(times):.0f} p99 {np.percentile(times, 99):.0f} ms")
    assert set(statuses) == {200}, statuses
    assert len(replicas) == 2
    assert min(replicas.values()) > 10


def test_a_replica_that_dies_is_replaced(application):
    wait_for(lambda: running() == 2, 60)
    before = {application.http.get("/health").headers["x-replica"] for _ in range(40)}
    name = next(entry["name"] for entry in ray.util.list_named_actors(True) if "REPLICA" in entry["name"])
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
    wait_for(lambda: application.http.post("/predict", json=request_body()).is_success, 120)

    def replaced() -> bool:
        seen = {application.http.get("/health").headers.get("x-replica") for _ in range(20)}
        return running() == 2 and len(seen - before) >= 1

    wait_for(replaced, 180)
