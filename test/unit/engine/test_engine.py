"""Captured graphs on a GPU: same results as the definition, and nothing captured or allocated once loaded."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime.errors import PromptTooLongError
from flashrt_runtime.ops import variants
from flashrt_runtime.policy import Policy
from flashrt_runtime.quantization.calibration import Calibrator
from flashrt_runtime.untrained.random import make_checkpoint

pytestmark = pytest.mark.gpu

STATE = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)
WORDS = [
    "pick",
    "up",
    "the",
    "red",
    "block",
    "and",
    "put",
    "it",
    "into",
    "the",
    "green",
    "bowl",
    "by",
    "me",
    "now",
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {policy: make_checkpoint(root / policy, size="small", policy=policy) for policy in ("pi05", "pi0")}


@pytest.fixture(scope="module", params=["pi05", "pi0"])
def path(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Path:
    return paths[request.param]


@pytest.fixture(scope="module", params=["pi05", "pi0", "pi05 wide", "pi0 wide"])
def every_path(
    request: pytest.FixtureRequest,
    paths: dict[str, Path],
    make_wide: Callable[[Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Also at the widths that the fused expert and the attention kernels serve."""
    policy, _, wide = request.param.partition(" ")
    return make_wide(tmp_path_factory.mktemp("wide") / policy, policy) if wide else paths[policy]


def load(path: Path, precision: str, rtc: str = "off") -> Policy:
    return flashrt_runtime.load_model(
        path, config="auto", hardware="any", precision=precision, weight_cache=False, autotune=1, rtc=rtc
    )


def images(seed: int, shapes: tuple[tuple[int, int], ...] = ((480, 640), (224, 224))) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.mark.parametrize(
    ("precision", "bound"), [("fp32", 2e-4), ("bf16", 3e-2), ("fp16", 1e-2), ("fp8", 0.1)]
)
def test_graph_against_definition(path: Path, precision: str, bound: float) -> None:
    policy = load(path, precision)
    for seed, words in enumerate((2, 9, 14)):
        # of the model's own size: the kernel's and the host's resizing may differ by a level of 255
        pair = images(seed, ((224, 224), (224, 224)))
        inputs = policy._encode(pair, " ".join(WORDS[:words]), STATE, seed=seed)
        assert policy._model is not None
        got = policy._run(policy._model, inputs)
        want = policy._eager(policy._model, inputs).cpu().numpy()
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < bound
        assert np.array_equal(policy._run(policy._model, inputs), got), "a replay differs from the last"
    policy.close()


def test_graph_is_bit_identical_to_eager_with_the_same_kernels(every_path: Path) -> None:
    policy = load(every_path, "fp8")
    policy.predict(images(0), "open the drawer", STATE, seed=0)
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    inputs = policy._encode(images(3), "open the drawer", STATE, seed=1)
    got = policy._run(model, inputs)
    with torch.inference_mode(), torch.cuda.stream(engine.stream):
        engine.generate(engine.encode_images(), engine.bucket_of(len(inputs.tokens)))
    engine.stream.synchronize()
    assert np.array_equal(engine.actions.cpu().numpy(), got)
    policy.close()


def test_changes_neither_capture_nor_allocate(every_path: Path) -> None:
    policy = load(every_path, "fp8")
    policy.predict(images(0), "start", STATE, seed=0)
    engine = policy._engine
    assert engine is not None
    captures = engine.captures
    policy.calibrate([{"images": images(1), "prompt": "start", "state": STATE, "seed": 2}])
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    rng = np.random.default_rng(0)
    results = set()
    for index in range(200):
        words = " ".join(WORDS[: 1 + index % len(WORDS)])
        shapes = ((480, 640), (224, 224)) if index % 2 else ((100, 37), (720, 1280))
        state = (STATE + rng.uniform(-0.1, 0.1, STATE.shape)).astype(np.float32)
        results.add(policy.predict(images(index % 3, shapes), words, state, seed=index).tobytes())
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert engine.captures == captures
    assert len(results) == 200
    policy.close()


def test_new_scales_reach_the_captured_graph(every_path: Path) -> None:
    policy = load(every_path, "fp8")
    one = policy.predict(images(0), "start", STATE, seed=0)
    policy.calibrate([{"images": images(5), "prompt": "stop", "state": STATE, "seed": 9}])
    two = policy.predict(images(0), "start", STATE, seed=0)
    assert not np.array_equal(one, two)
    policy.recalibrate()
    assert np.array_equal(policy.predict(images(0), "start", STATE, seed=0), one)
    policy.close()


def test_a_loaded_calibration_reaches_the_captured_graph(path: Path, tmp_path: Path) -> None:
    policy = load(path, "fp8")
    engine = policy._engine
    assert engine is not None
    observation = {"images": images(5), "prompt": "stop", "state": STATE, "seed": 9}
    report = policy.calibrate([observation, observation | {"images": images(6)}], held_out=1, max_samples=1)
    assert report.held_out_error is not None
    one = policy.predict(images(0), "start", STATE, seed=0)
    file, captures = policy.save_calibration(tmp_path / "scales.safetensors"), engine.captures
    policy.calibrate([observation | {"images": images(7)}], percentile=99)
    assert not np.array_equal(policy.predict(images(0), "start", STATE, seed=0), one)
    policy.load_calibration(file)
    assert np.array_equal(policy.predict(images(0), "start", STATE, seed=0), one)
    assert engine.captures == captures
    policy.close()


def test_nothing_of_the_callers_stream_is_under_way_behind_a_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next observation's first graph does not wait for that stream: whoever writes there what it reads
    (scales, buffers, weights) has waited, also when it fails.
    """
    policy = load(path, "fp8")
    observation = {"images": images(5), "prompt": "stop", "state": STATE, "seed": 9}
    stream = torch.cuda.current_stream()

    def interrupted(*_: object, **__: object) -> torch.Tensor:
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        assert not stream.query()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(policy, "_eager", interrupted)
        with pytest.raises(KeyboardInterrupt):  # uncalibrated: scales are taken from the first observation
            policy.predict(**observation)
        assert stream.query()
        with pytest.raises(KeyboardInterrupt):
            policy.calibrate([observation])
        assert stream.query()
    policy.calibrate([observation])
    file = policy.save_calibration(tmp_path / "scales.safetensors")
    apply = Calibrator.apply

    def slow(*arguments: object) -> None:
        apply(*arguments)  # type: ignore[arg-type]
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        assert not stream.query()

    with monkeypatch.context() as patched:
        patched.setattr(Calibrator, "apply", slow)
        policy.load_calibration(file)
        assert stream.query()
    policy.close()


def test_a_replay_that_got_faster_is_not_slept_through(path: Path) -> None:
    """A capture's time is that of a GPU whose clock was low, or which was shared."""
    policy = load(path, "bf16")
    policy.predict(images(0), "go", STATE, seed=0)
    engine = policy._engine
    assert engine is not None
    bucket = engine.bucket_of(len(policy._encode(images(0), "go", STATE, seed=0).tokens))
    engine.graph_ms[bucket] = 100.0
    for seed in range(60):
        policy.predict(images(0), "go", STATE, seed=seed)
    assert engine.graph_ms[bucket] < 40
    policy.close()


def test_images_seen_early_belong_to_their_observation(path: Path) -> None:
    """Started while the prompt is encoded: the first call, whose scales are set between, and the one behind a
    call that failed between give what a call gives that starts nothing early.
    """
    policy = load(path, "fp8")
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    first = policy.predict(images(0), "go", STATE, seed=0)
    inputs = policy._encode(images(0), "go", STATE, seed=0)
    assert policy._actions is not None
    assert np.array_equal(policy._actions.to_physical(policy._run(model, inputs), STATE), first)
    with pytest.raises(PromptTooLongError):
        policy.predict(images(1), "go " * 500, STATE, seed=0)
    assert engine.begun is not None
    assert np.array_equal(policy.predict(images(0), "go", STATE, seed=0), first)
    assert not np.array_equal(policy.predict(images(1), "go", STATE, seed=0), first)
    policy.close()


def test_what_was_begun_and_given_up_harms_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and graph on their way, the prompt refused: what comes behind gives what it gives alone."""
    policy = load(path, "bf16")
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    small, big = images(0), images(3, ((3000, 4000), (480, 640)))

    def give_up() -> None:
        with pytest.raises(PromptTooLongError):
            policy.predict(images(1), "go " * 500, STATE, seed=0)
        assert engine.begun is not None

    want = policy.predict(small, "go", STATE, seed=0)
    inputs = policy._encode(small, "go", STATE, seed=0)
    eager = policy._eager(model, inputs).cpu().numpy()
    give_up()
    assert np.array_equal(policy._eager(model, inputs).cpu().numpy(), eager)
    give_up()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "capture", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            policy.predict(big, "go", STATE, seed=0)
    assert np.array_equal(policy.predict(small, "go", STATE, seed=0), want)
    give_up()
    larger = policy.predict(big, "go", STATE, seed=0)
    assert np.array_equal(policy.predict(big, "go", STATE, seed=0), larger)
    assert np.array_equal(policy.predict(small, "go", STATE, seed=0), want)
    give_up()
    policy.close()


@pytest.mark.parametrize("where", ["staging.write", "_wait"])
def test_an_interrupt_leaves_nothing_under_way(
    path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the upload and the answer: what runs right behind, on another stream, is undisturbed."""
    policy = load(path, "bf16")
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    want = policy.predict(images(0), "go", STATE, seed=0)
    inputs = policy._encode(images(0), "go", STATE, seed=0)
    eager = policy._eager(model, inputs).cpu().numpy()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    owner, _, name = where.rpartition(".")
    with monkeypatch.context() as patched:
        patched.setattr(getattr(engine, owner) if owner else engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.predict(images(1, ((1000, 900), (48, 64))), "go", STATE, seed=0)
    assert engine.begun is None
    assert engine.stream.query(), "something is still running"
    assert np.array_equal(policy._eager(model, inputs).cpu().numpy(), eager)
    assert np.array_equal(policy.predict(images(0), "go", STATE, seed=0), want)
    policy.close()


def test_any_thread_may_call(path: Path) -> None:
    policy = load(path, "bf16")
    want = [policy.predict(images(seed), "go", STATE, seed=seed) for seed in range(4)]
    got: dict[int, np.ndarray] = {}

    def call(seed: int) -> None:
        got[seed] = policy.predict(images(seed), "go", STATE, seed=seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(np.array_equal(got[seed], want[seed]) for seed in range(4))
    policy.close()


def test_images_larger_than_the_buffer(paths: dict[str, Path]) -> None:
    policy = load(paths["pi05"], "bf16")
    big = images(0, ((3000, 4000), (480, 640)))
    got = policy.predict(big, "go", STATE, seed=0)
    inputs = policy._encode(big, "go", STATE, seed=0)
    assert policy._model is not None
    assert policy._actions is not None
    want = policy._actions.to_physical(policy._eager(policy._model, inputs).cpu().numpy(), STATE)
    np.testing.assert_allclose(got, want, atol=0.05 * np.abs(want).max())
    policy.close()


def guidance(horizon: int, delay: int, schedule: str = "linear") -> flashrt_runtime.Guidance:
    plan = np.random.default_rng(delay).normal(scale=0.1, size=(horizon, 7))
    return flashrt_runtime.Guidance(plan, delay=delay, schedule=schedule)  # type: ignore[arg-type]


@pytest.mark.parametrize("rtc", ["guided", "trained"])
def test_guided_graph_follows_guidance_without_another_capture(path: Path, rtc: str) -> None:
    """Delay, horizon, schedule and plan are read from static buffers; eager is the definition."""
    folder = path.parent / f"{path.name}_{rtc}"
    shutil.copytree(path, folder, dirs_exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    content["flashrt"]["rtc_training_max_delay"] = 5
    (folder / "config.json").write_text(json.dumps(content))
    policy = load(folder, "fp32", rtc=rtc)
    engine, model = policy._engine, policy._model
    assert engine is not None
    assert model is not None
    captures = engine.captures
    results = set()
    pair = images(0, ((224, 224), (224, 224)))
    for delay, schedule in ((0, "linear"), (2, "exp"), (5, "ones"), (3, "zeros")):
        guide = policy._encode_guidance(guidance(policy.spec.horizon, delay, schedule), STATE)
        inputs = policy._encode(pair, "open the drawer", STATE, seed=1)
        got = policy._run(model, inputs, guide)
        want = policy._eager(model, inputs, guide).cpu().numpy()
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-4
        np.testing.assert_array_equal(got[:delay], guide.target[:delay])
        results.add(got.tobytes())
    assert len(results) == 4
    assert engine.captures == captures
    policy.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_guided_graph_without_weight_is_the_plain_graph(path: Path, precision: str) -> None:
    """Bit for bit."""
    chunks = []
    for rtc in ("off", "guided"):
        policy = load(path, precision, rtc=rtc)
        chunks.append(policy.predict(images(0), "open the drawer", STATE, seed=1))
        policy.close()
    assert chunks[0].tobytes() == chunks[1].tobytes()


def test_kernels_are_chosen_once_and_remembered(
    make_wide: Callable[[Path, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second load on a GPU measures nothing and captures the same kernels."""
    path = make_wide(tmp_path / "pi05", "pi05")
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))
    chunks, tables = [], []
    for _ in range(2):
        monkeypatch.setattr(variants, "TABLES", {})
        policy = load(path, "fp8")
        chunks.append(policy.predict(images(0), "open the drawer", STATE, seed=1))
        (table,) = variants.TABLES.values()
        tables.append(table)
        policy.close()
    assert tables[0].timed > 0
    assert tables[1].timed == 0
    assert tables[0].chosen == tables[1].chosen
    assert chunks[0].tobytes() == chunks[1].tobytes()
