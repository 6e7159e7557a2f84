"""The unmodified openpi-client drives the server, for each of openpi's robots."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("openpi_client", reason="openpi-client is not installed")

from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_support import DIGEST, HOME, VIEWS, Shared, picture, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flashrt_runtime.loading import load_model

PROMPT = "pick up the block"
MAX_OVERHEAD_MS = 3.0


def observation(index: int = 0) -> dict:
    """Our own keys, with images as a robot's cameras change them."""
    images = {view: picture(2 * index + number) for number, view in enumerate(VIEWS)}
    state = np.array(HOME, np.float32) + np.float32(0.001 * index)
    return {"images": images, "state": state, "prompt": PROMPT, "seed": index}


def compare(served, policy, count: int) -> list[float]:
    """Every answer equals predict's, bit for bit; gives the milliseconds beyond the model's own."""
    client = WebsocketClientPolicy(served.host, served.port)
    assert client.get_server_metadata()["views"] == list(VIEWS)
    beyond = []
    for index in range(count):
        sent = observation(index)
        began = time.perf_counter()
        answer = client.infer(sent)
        beyond.append((time.perf_counter() - began) * 1e3 - answer["server_timing"]["infer_ms"])
        expected = policy.predict(list(sent["images"].values()), PROMPT, sent["state"], seed=index)
        assert answer["seed"] == index
        assert answer["actions"].dtype == np.float32
        np.testing.assert_array_equal(answer["actions"], expected)
    assert answer["server_timing"]["prev_total_ms"] > 0
    client._ws.close()
    return beyond


def test_answers_of_another_process_equal_predict_bit_for_bit(command_server, policy):
    compare(command_server, policy, 12)


@pytest.mark.slow
def test_two_hundred_answers_and_the_time_they_cost(command_server, policy):
    beyond = compare(command_server, policy, 200)
    assert np.median(beyond) <= MAX_OVERHEAD_MS, np.percentile(beyond, [5, 50, 95])


def test_without_a_seed_the_server_draws_one(served, policy):
    client = WebsocketClientPolicy(served.host, served.port)
    sent = observation()
    del sent["seed"]
    answers = [client.infer(sent) for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    images = list(sent["images"].values())
    for answer in answers:
        expected = policy.predict(images, PROMPT, sent["state"], seed=answer["seed"])
        np.testing.assert_array_equal(answer["actions"], expected)


def test_the_actions_can_be_written_to(served):
    """Robots edit the chunk in place; openpi's client gives arrays over the message's bytes."""
    client = WebsocketClientPolicy(served.host, served.port)
    actions = np.array(client.infer(observation())["actions"])
    actions[:] = 0


def test_an_error_is_raised_by_the_client_and_the_connection_lives_on(served, policy):
    client = WebsocketClientPolicy(served.host, served.port)
    wrong = observation() | {"state": np.full(7, np.nan)}
    with pytest.raises(RuntimeError, match=r"values at \[0, 1, 2, 3, 4, 5, 6\] are not finite"):
        client.infer(wrong)
    sent = observation(5)
    expected = policy.predict(list(sent["images"].values()), PROMPT, sent["state"], seed=5)
    np.testing.assert_array_equal(client.infer(sent)["actions"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images: expected a map of base_0_rgb, left_wrist_0_rgb"),
        ({"images": {VIEWS[0]: picture(0)}}, "expected images for the views"),
        ({"images": {view: picture(0)[..., :2] for view in VIEWS}}, "expected an image"),
        ({"images": {view: picture(0).astype(np.int32) for view in VIEWS}}, "expected uint8 pixels"),
        ({"images": {view: picture(0) * 1.0 for view in VIEWS}}, "values from 0 to 1"),
        ({"images": dict.fromkeys(VIEWS, "top.png")}, "expected an image"),
        ({"state": np.zeros((2, 7))}, "state: expected a list of numbers"),
        ({"state": "zero"}, "state: expected a list of numbers"),
        ({"state": np.zeros(6)}, "state: expected shape"),
        ({"prompt": 7}, "prompt: every request needs a text"),
        ({"seed": "seven"}, "seed: expected a whole number"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"deadline_ms": -1}, "deadline_ms: expected a number above 0"),
    ],
)
def test_mistakes_are_text_frames(served, changes, message):
    client = WebsocketClientPolicy(served.host, served.port)
    with pytest.raises(RuntimeError, match="Error in inference server") as raised:
        client.infer(observation() | changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "frame",
    [
        "text",
        b"",
        b"\xc1",
        b"\x91" * 2000 + b"\x90",
        msgpack_numpy.packb({b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": [0]}),
        msgpack_numpy.packb({b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [2**40]}),
        msgpack_numpy.packb({b"__ndarray__": True, b"data": b"", b"dtype": "<f4,<f4", b"shape": [0]}),
        msgpack_numpy.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "|V8"}),
    ],
    ids=["text", "empty", "no msgpack", "deep", "objects", "too large", "record", "void scalar"],
)
def test_frames_that_cannot_be_read_end_the_connection(served, frame):
    with connect(f"ws://{served.host}:{served.port}", compression=None) as socket:
        socket.recv()
        socket.send(frame)
        assert socket.recv().startswith("malformed_message")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        assert closed.value.rcvd.code == 1007


def test_a_token_as_openpi_sends_it(policy, serve):
    server = serve(Shared(policy), token="a-long-secret")
    with pytest.raises(InvalidStatus, match="401"):
        WebsocketClientPolicy(server.host, server.port)
    with pytest.raises(InvalidStatus, match="401"):
        WebsocketClientPolicy(server.host, server.port, api_key="another-secret")
    client = WebsocketClientPolicy(server.host, server.port, api_key="a-long-secret")
    assert client.infer(observation())["actions"].shape == (50, 7)


def test_a_page_of_another_site_cannot_connect(served):
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://{served.host}:{served.port}", origin="http://example.com")


def test_connections_are_bounded(policy, serve):
    server = serve(Shared(policy), max_connections=3)
    clients = [WebsocketClientPolicy(server.host, server.port) for _ in range(3)]
    with pytest.raises(InvalidStatus, match="429"):
        WebsocketClientPolicy(server.host, server.port)
    clients[0]._ws.close()
    wait_for(lambda: server.metric("flashrt_websocket_connections") == 2)
    assert WebsocketClientPolicy(server.host, server.port).infer(observation())["seed"] == 0


def test_a_message_over_the_limit_is_cut_off(policy, serve):
    server = serve(Shared(policy), max_body_bytes=100_000)
    with connect(f"ws://{server.host}:{server.port}", compression=None) as socket:
        socket.recv()
        socket.send(bytes(1_000_000))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv()
        assert closed.value.rcvd.code == 1009


# As the examples of openpi's policies make them; random pixels and numbers.
def libero() -> dict:
    return {
        "observation/image": picture(0),
        "observation/wrist_image": picture(1),
        "observation/state": np.linspace(-0.3, 0.3, 8),
        "prompt": PROMPT,
        "seed": 4,
    }


def droid() -> dict:
    return {
        "observation/exterior_image_1_left": picture(0),
        "observation/wrist_image_left": picture(1),
        "observation/joint_position": np.linspace(-0.3, 0.2, 7),
        "observation/gripper_position": np.array([0.3]),
        "prompt": PROMPT,
        "seed": 4,
    }


def test_liberos_observations(libero_checkpoint, serve):
    policy = load_model(libero_checkpoint, hardware="cpu")
    server = serve(policy)
    client = WebsocketClientPolicy(server.host, server.port)
    expected = policy.predict([picture(0), picture(1)], PROMPT, np.linspace(-0.3, 0.3, 8), seed=4)
    np.testing.assert_array_equal(client.infer(libero())["actions"], expected)
    nested = {"observation": {key.partition("/")[2]: value for key, value in libero().items() if "/" in key}}
    answer = client.infer(nested | {"prompt": PROMPT, "seed": 4})
    np.testing.assert_array_equal(answer["actions"], expected)


def test_droids_observations(libero_checkpoint, serve):
    """Eight values of state as LIBERO has: the random policy serves both."""
    policy = load_model(libero_checkpoint, hardware="cpu")
    server = serve(policy, layout="droid")
    client = WebsocketClientPolicy(server.host, server.port)
    state = np.append(np.linspace(-0.3, 0.2, 7), 0.3)
    expected = policy.predict([picture(0), picture(1)], PROMPT, state, seed=4)
    np.testing.assert_array_equal(client.infer(droid())["actions"], expected)
    scalar_gripper = droid() | {"observation/gripper_position": 0.3}
    np.testing.assert_array_equal(client.infer(scalar_gripper)["actions"], expected)
    with pytest.raises(RuntimeError, match="layout droid needs it"):
        client.infer(libero())


def test_images_with_channels_first_and_as_floats(libero_checkpoint, serve):
    policy = load_model(libero_checkpoint, hardware="cpu")
    client_of = serve(policy)
    client = WebsocketClientPolicy(client_of.host, client_of.port)
    plain = client.infer(libero())["actions"]
    first = libero() | {"observation/image": np.moveaxis(picture(0), -1, 0)}
    np.testing.assert_array_equal(client.infer(first)["actions"], plain)
    floats = libero() | {"observation/image": (picture(0) + 0.25) / 256}
    truncated = (255 * ((picture(0) + 0.25) / 256)).astype(np.uint8)
    expected = policy.predict([truncated, picture(1)], PROMPT, np.linspace(-0.3, 0.3, 8), seed=4)
    np.testing.assert_array_equal(client.infer(floats)["actions"], expected)


def test_metadata_names_the_digest_and_the_layout(served):
    metadata = WebsocketClientPolicy(served.host, served.port).get_server_metadata()
    assert metadata["checkpoint"] == DIGEST
    assert metadata["layout"] == "auto"
    assert metadata["action_horizon"] == 50
