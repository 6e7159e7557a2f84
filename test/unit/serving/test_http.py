"""POST /predict and the pages around it: what comes back, and what a mistake is answered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from serving_support import DIGEST, HOME, VIEWS, Shared, encoded, picture, request_body, text

from flashrt_runtime.loading import load_model
from flashrt_runtime.serving import wire
from flashrt_runtime.untrained import make_checkpoint

PROMPT = "pick up the block"


def expected(policy, images, **changes):
    arguments = {"prompt": PROMPT, "state": np.array(HOME, np.float32), "seed": 3} | changes
    return policy.predict(images, **arguments)


@pytest.fixture(scope="module")
def pictures():
    return {view: picture(index, (48, 64)) for index, view in enumerate(VIEWS)}


def test_png_images_give_what_predict_gives(served, policy, pictures):
    answer = served.http.post("/predict", json=request_body())
    content = answer.json()
    assert answer.status_code == 200, answer.text
    actions = np.array(content["actions"], np.float32)
    np.testing.assert_array_equal(actions, expected(policy, pictures))
    assert content["shape"] == list(actions.shape)
    assert (content["seed"], content["checkpoint"], content["rate_hz"]) == (3, DIGEST, 50.0)
    assert content["action_names"] == list(policy.spec.action_names)
    assert 0 < content["latency_ms"] < 60_000


@pytest.mark.parametrize("shape", [[48, 64, 3], [[48, 64, 3]] * 2, {view: [48, 64, 3] for view in VIEWS}])
def test_raw_pixels_with_their_shape(served, policy, pictures, shape):
    raw = {view: text(pixels.tobytes()) for view, pixels in pictures.items()}
    answer = served.http.post("/predict", json=request_body(images=raw, image_shape=shape))
    np.testing.assert_array_equal(
        np.array(answer.json()["actions"], np.float32), expected(policy, pictures)
    )


def test_images_as_a_list_are_in_the_policys_order(served, policy, pictures):
    images = [text(encoded(pixels)) for pixels in pictures.values()]
    answer = served.http.post("/predict", json=request_body(images=images)).json()
    np.testing.assert_array_equal(np.array(answer["actions"], np.float32), expected(policy, pictures))


def test_a_camera_that_is_not_there_is_said_to_be(served, policy, pictures):
    images = {VIEWS[0]: text(encoded(pictures[VIEWS[0]])), VIEWS[1]: None}
    answer = served.http.post("/predict", json=request_body(images=images)).json()
    one = {VIEWS[0]: pictures[VIEWS[0]], VIEWS[1]: None}
    np.testing.assert_array_equal(np.array(answer["actions"], np.float32), expected(policy, one))
    body = wire.pack({"images": one, "state": np.array(HOME), "prompt": PROMPT, "seed": 3})
    headers = {"Content-Type": "application/msgpack"}
    packed = served.http.post("/predict", content=body, headers=headers).json()
    assert packed["actions"] == answer["actions"]
    nothing = served.http.post("/predict", json=request_body(images=dict.fromkeys(VIEWS)))
    assert nothing.status_code == 422
    assert "no image of" in nothing.json()["detail"]


def test_jpeg_images(served):
    images = {view: text(encoded(picture(index), "JPEG")) for index, view in enumerate(VIEWS)}
    assert served.http.post("/predict", json=request_body(images=images)).status_code == 200


def test_multipart(served, policy, pictures):
    files = {view: (f"{view}.png", encoded(pixels)) for view, pixels in pictures.items()}
    fields = {"prompt": PROMPT, "state": json.dumps(HOME), "seed": "3"}
    answer = served.http.post("/predict", files=files, data=fields)
    assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(
        np.array(answer.json()["actions"], np.float32), expected(policy, pictures)
    )


def test_msgpack_both_ways(served, policy, pictures):
    body = wire.pack({"images": pictures, "state": np.array(HOME), "prompt": PROMPT, "seed": 3})
    headers = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
    answer = wire.unpack(served.http.post("/predict", content=body, headers=headers).content)
    np.testing.assert_array_equal(answer["actions"], expected(policy, pictures))
    assert answer["actions"].dtype == np.float32


def test_without_a_seed_the_server_draws_one_and_returns_it(served, policy, pictures):
    answers = [served.http.post("/predict", json=request_body(seed=None)).json() for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    for answer in answers:
        np.testing.assert_array_equal(
            np.array(answer["actions"], np.float32), expected(policy, pictures, seed=answer["seed"])
        )


def cut(content: bytes) -> str:
    return text(content[: len(content) // 2])


MISTAKES = {
    "no images": ({"images": None}, "images: Field required"),
    "one image": ({"images": {VIEWS[0]: text(encoded(picture(0)))}}, "expected images for the views"),
    "three images": ({"images": [text(encoded(picture(0)))] * 3}, "expected 2 images"),
    "other view": ({"images": dict.fromkeys(("top", "side"), text(encoded(picture(0))))}, "got ['top'"),
    "bad base64": ({"images": ["%%%", "abc"]}, "images[0]: not base64"),
    "no image file": ({"images": [text(b"hello"), text(b"hello")]}, "neither a JPEG nor a PNG"),
    "cut JPEG": ({"images": [cut(encoded(picture(0), "JPEG"))] * 2}, "damaged image"),
    "cut PNG": ({"images": [cut(encoded(picture(0)))] * 2}, "damaged image"),
    "wrong shape": (
        {"images": [text(b"x" * 30)] * 2, "image_shape": [4, 4, 3]},
        "needs 48 bytes of raw RGB pixels, got 30",
    ),
    "four channels": ({"images": [text(b"x" * 64)] * 2, "image_shape": [4, 4, 4]}, "[height, width, 3]"),
    "huge shape": ({"images": [text(b"x")] * 2, "image_shape": [10**6, 10**6, 3]}, "pixels allowed"),
    "grey and alpha": (
        {"images": [text(encoded(np.zeros((8, 8, 4), np.uint8)))] * 2},
        "pixels of mode RGBA",
    ),
    "no state": ({"state": None}, "sees the robot's state"),
    "short state": ({"state": [0.0, 1.0]}, "state: expected shape (7,), got (2,)"),
    "words as state": ({"state": ["a"] * 7}, "state.0: Input should be a valid number"),
    "no prompt": ({"prompt": None}, "prompt: every request needs a text"),
    "empty prompt": ({"prompt": ""}, "prompt: every request needs a text"),
    "long prompt": ({"prompt": "pick up " * 200}, "tokens"),
    "endless prompt": ({"prompt": "x" * 5000}, "prompt: String should have at most 4096"),
    "negative seed": ({"seed": -1}, "seed: Input should be greater"),
    "seed as text": ({"seed": "abc"}, "seed: Input should be a valid integer"),
    "no deadline": ({"deadline_ms": 0}, "deadline_ms: Input should be greater than 0"),
    "unknown key": ({"observation": 1}, "observation: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_422_and_says_what_was_wrong(served, caplog, name):
    changes, message = MISTAKES[name]
    served_reporter(served).forget()
    answer = served.http.post("/predict", json=request_body(**changes))
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["detail"]
    assert len(answer.json()["detail"]) < 1000
    assert len(lines_of_refusals(caplog)) == 1


@pytest.mark.parametrize(("value", "where"), [("NaN", "[6]"), ("Infinity", "[6]"), ("1e39", "[6]")])
def test_a_state_that_is_not_finite(served, caplog, value, where):
    served_reporter(served).forget()
    body = json.dumps(request_body()).replace("0.02", value)
    answer = served.http.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["detail"] == f"state: values at {where} are not finite"
    assert len(lines_of_refusals(caplog)) == 1


PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\npick'


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        ("application/json", b"{", 422, "Invalid JSON"),
        ("application/json", b"[1]", 422, "should be an object"),
        ("text/plain", b"hello", 415, "expected application/json"),
        ("multipart/form-data", b"hello", 400, "names no boundary"),
        ("multipart/form-data; boundary=x", b"hello", 400, "not a multipart/form-data body"),
        ("multipart/form-data; boundary=x", PART, 400, "it ends before"),
        ("application/msgpack", b"\xc1", 400, "not a msgpack message"),
        ("application/msgpack", b"\x93\x01\x02\x03", 422, "expected a map"),
    ],
)
def test_bodies_that_cannot_be_read(served, content_type, body, status, message):
    answer = served.http.post("/predict", content=body, headers={"Content-Type": content_type})
    assert (answer.status_code, message in answer.json()["detail"]) == (status, True), answer.text


def served_reporter(served):
    """The server's own reporter, whose one-line-a-second memory a test starts anew."""
    return served.service.reporter


def lines_of_refusals(caplog):
    return [record for record in caplog.records if record.name.endswith("serving.refusals")]


def test_health_names_the_policy(served, policy):
    content = served.http.get("/health").json()
    assert content["status"] == "ok"
    assert content["views"] == list(VIEWS)
    assert (content["state_dim"], content["action_horizon"]) == (7, policy.spec.horizon)
    assert content["checkpoint"] == DIGEST
    assert served.http.get("/healthz").text == "OK\n"


def test_metrics(served):
    before = served.metric('flashrt_requests_total{outcome="ok",transport="http"}')
    served.http.post("/predict", json=request_body())
    served.http.post("/predict", json=request_body(state=[1.0]))
    assert served.metric('flashrt_requests_total{outcome="ok",transport="http"}') == before + 1
    assert served.metric('flashrt_requests_total{outcome="invalid_observation",transport="http"}') >= 1
    assert served.metric("flashrt_inference_seconds_count") >= 1
    assert served.metric("flashrt_healthy") == 1
    assert served.metric("process_resident_memory_bytes") > 1e6


def test_openapi_page_describes_predict(served):
    schema = served.http.get("/openapi.json").json()
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data", "application/msgpack"}
    assert "image_shape" in body["application/json"]["schema"]["properties"]
    assert {"422", "429", "504"} < set(schema["paths"]["/predict"]["post"]["responses"])


def test_the_page_needs_no_internet(served):
    page = served.http.get("/docs")
    assert page.status_code == 200
    assert "openapi.json" in page.text
    assert not re.search(r"""(src|href)=["']?(https?:)?//|import\(|@import""", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_token(policy, serve):
    server = serve(Shared(policy), token="a-long-secret")
    for header in ("", "Bearer wrong", "Bearer a-long-secret-and-more", "Basic a-long-secret", "Bearer é"):
        headers = {"Authorization": header.encode("latin-1")}
        answer = server.http.post("/predict", json=request_body(), headers=headers)
        assert answer.status_code == 401, header
        assert answer.json()["error"] == "unauthorised"
        assert server.http.get("/metrics", headers=headers).status_code == 401
    assert server.http.post("/predict", json=request_body()).status_code == 200
    assert server.http.get("/health", headers={"Authorization": ""}).status_code == 200
    assert "bearer" in server.http.get("/openapi.json").json()["components"]["securitySchemes"]


def test_pages_of_other_sites_are_refused(served):
    headers = {"Origin": "http://example.com"}
    assert served.http.post("/predict", json=request_body(), headers=headers).status_code == 403
    own = {"Origin": f"http://{served.host}:{served.port}"}
    assert served.http.post("/predict", json=request_body(), headers=own).status_code == 200


def test_the_default_prompt(policy, serve, pictures):
    server = serve(Shared(policy), default_prompt="push the plate")
    answer = server.http.post("/predict", json=request_body(prompt=None)).json()
    np.testing.assert_array_equal(
        np.array(answer["actions"], np.float32), expected(policy, pictures, prompt="push the plate")
    )


def test_one_clients_prompt_is_never_anothers(served, policy, pictures):
    served.http.post("/predict", json=request_body(prompt="open the drawer"))
    assert served.http.post("/predict", json=request_body(prompt=None)).status_code == 422


def test_a_policy_without_statistics_says_so_and_is_no_clients_mistake(tmp_path, serve):
    path = make_checkpoint(tmp_path / "bare", preset="demo_arm")
    for file in (path / "assets").rglob("norm_stats.json"):
        file.unlink()
    answer = serve(load_model(path, hardware="cpu")).http.post("/predict", json=request_body())
    assert answer.status_code == 500, answer.text
    assert "statistics" in answer.json()["detail"]


# Just enough of a browser: elements that keep their text, and a fetch that gives the schema.
BROWSER = """
const lines = [];
function element() {
  return {
    set textContent(text) { lines.push(text); },
    appendChild(child) { return child; },
  };
}
globalThis.document = { createElement: element, getElementById: element };
globalThis.fetch = async () => ({ json: async () => JSON.parse(process.argv[2]) });
setTimeout(() => console.log(lines.join("\\n")), 50);
"""


def test_the_page_shows_every_route_and_field(served, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no JavaScript here: node is not installed")
    page = served.http.get("/docs").text
    script = tmp_path / "page.js"
    script.write_text(BROWSER + re.search(r"<script>(.*)</script>", page, re.DOTALL)[1])
    schema = served.http.get("/openapi.json").text
    done = subprocess.run([node, script, schema], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert "openapi.json cannot be read" not in done.stdout
    for route in ("POST /predict", "GET /health", "GET /healthz", "GET /metrics"):
        assert route in shown
    for field in ("images", "image_shape", "prompt", "seed", "deadline_ms", *VIEWS):
        assert field in shown
    assert "list of 7: number or null (optional)" in shown
    assert "422: The observation does not fit the policy" in shown
