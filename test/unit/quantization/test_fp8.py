"""FP8 numerics, calibration and the swap of projections, on the CPU by float8 casts."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import flashrt_runtime
from flashrt_runtime import models, ops
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.errors import HardwareError, OptionError
from flashrt_runtime.layers.linear import Linear
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.models.weights import load_weights
from flashrt_runtime.options import requested_precision, resolve_target
from flashrt_runtime.parity.capture import capture
from flashrt_runtime.parity.stages import random_inputs
from flashrt_runtime.quantization import tensor_files
from flashrt_runtime.quantization.calibration import Calibrator, estimate
from flashrt_runtime.quantization.fp8 import Fp8Linear, fp8_linears, swap_linears
from flashrt_runtime.quantization.weight_cache import WeightCache, cache_key
from flashrt_runtime.untrained.random import make_checkpoint

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        policy: make_checkpoint(root / policy, size="tiny", preset="libero", policy=policy)
        for policy in ("pi05", "pi0")
    }


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(params=["pi05", "pi0"])
def path(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[request.param]


def load(path: Path, dtype: torch.dtype = torch.float32, fp8: bool = False) -> FlowPolicy:
    with open_checkpoint(path, config="auto") as opened:
        model = models.build(opened.config, 2, dtype)
        if fp8:
            swap_linears(model)
        model.config = opened.config.with_steps(STEPS)
        load_weights(model, opened.config, opened, CPU)
    model.eval()
    model.prepare(CPU)
    return model


@torch.no_grad()
def round_weights(model: FlowPolicy) -> None:
    """The weights alone as per-tensor FP8, everything else in float32."""
    for module in model.modules():
        if isinstance(module, Linear):
            scale = module.weight.abs().amax() / ops.E4M3_MAX
            module.weight.copy_(ops.quantise(module.weight, scale).float() * scale)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_every_stage_is_as_close_as_rounding_the_weights(path: Path) -> None:
    exact, rounded, fp8 = load(path), load(path), load(path, torch.bfloat16, fp8=True)
    round_weights(rounded)
    samples = [random_inputs(exact.config, views=2, tokens=30, seed=seed) for seed in range(4)]
    calibrator = Calibrator(fp8)
    collector = calibrator.collector()
    for sample in samples[:3]:
        with collector.observe():
            capture(fp8, sample)
    calibrator.apply(estimate(collector, "mse", None)[0])
    want, weights_only, got = (capture(model, samples[3]) for model in (exact, rounded, fp8))
    stages = {"vision": (want.vision, weights_only.vision, got.vision)}
    for layer in range(exact.config.prefix.depth):
        for name in ("keys", "values"):
            stages[f"{name} {layer}"] = tuple(getattr(s, name)[layer] for s in (want, weights_only, got))
    for step in range(exact.config.num_steps):
        stages[f"velocity {step}"] = tuple(s.velocities[step] for s in (want, weights_only, got))
    bound = {name: 1.5 * rms(only, true) for name, (true, only, _) in stages.items()}
    error = {name: rms(ours, true) for name, (true, _, ours) in stages.items()}
    assert all(value > 1e-3 for value in error.values()), "quantisation did not happen"
    # tiny networks (64 wide) average rounding over few terms
    assert {name: value for name, value in error.items() if value > bound[name] + 5e-3} == {}


def test_activation_rule() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.gate_up, self.down = (Linear(16, 16) for _ in range(4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.paligemma = Block(), Block()
            self.action_in = nn.Linear(16, 16)

    model = Model()
    swap_linears(model)
    static = {name: linear.static for name, linear in fp8_linears(model).items()}
    assert static == {
        "expert.qkv": False,
        "expert.out": True,
        "expert.gate_up": False,
        "expert.down": True,
        **{f"paligemma.{name}": True for name in ("qkv", "out", "gate_up", "down")},
    }
    assert not isinstance(model.action_in, Fp8Linear)


def fp8_linear(static: bool = True) -> tuple[Fp8Linear, torch.Tensor]:
    linear = Fp8Linear(Linear(32, 8, bias=False), static=static)
    weight = torch.randn(8, 32)
    linear.set_weight(weight)
    return linear, weight


def test_definition_of_the_product() -> None:
    linear, weight = fp8_linear()
    linear.activation_scale.fill_(4.0 / ops.E4M3_MAX)
    linear.calibrated = True
    x = torch.randn(5, 32)
    seen = ops.quantise(x, linear.activation_scale).double() * linear.activation_scale.double()
    stored = linear.weight.double() * linear.weight_scale.double()
    torch.testing.assert_close(linear(x).double(), seen @ stored.T, rtol=1e-5, atol=1e-5)
    assert (stored - weight).abs().max() <= weight.abs().max() / 16
    # already quantised input is taken as it is
    assert torch.equal(linear(ops.quantise(x, linear.activation_scale)), linear(x))


def test_quantise_saturates_and_keeps_nan() -> None:
    scale = torch.tensor(0.5)
    got = ops.quantise(torch.tensor([0.0, 1.0, 1e9, -1e9, float("nan")]), scale).float()
    assert got[:4].tolist() == [0.0, 2.0, 448.0, -448.0]
    assert got[4].isnan()


def test_calibrator_keeps_the_largest_of_all_samples_and_steps() -> None:
    linear, _ = fp8_linear()
    model = nn.ModuleDict({"layer": linear})
    calibrator = Calibrator(model)
    collector = calibrator.collector()
    with collector.observe():
        for peak in (1.0, 7.0, 3.0):  # a denoise step in the middle holds the maximum
            x = torch.zeros(2, 32)
            x[1, 5] = -peak
            linear(x)
    assert not calibrator.calibrated
    address = linear.activation_scale.data_ptr()
    calibrator.apply(estimate(collector, "max", None)[0])
    assert calibrator.calibrated
    assert float(linear.activation_scale) == pytest.approx(7.0 / ops.E4M3_MAX)
    assert linear.activation_scale.data_ptr() == address, "a captured graph would read the old scale"


def test_calibration_sees_every_denoise_step(checkpoints: dict[str, Path]) -> None:
    """The observed maximum of an expert projection is that of all steps, not of the first or last."""
    model = load(checkpoints["pi05"], torch.bfloat16, fp8=True)
    down = model.get_submodule("expert.layers.0.down")
    peaks: list[float] = []
    hook = down.register_forward_pre_hook(lambda _m, args: peaks.append(float(args[0].abs().amax())))
    collector = Calibrator(model).collector()
    with collector.observe():
        capture(model, random_inputs(model.config, views=2, tokens=20, seed=1))
    hook.remove()
    assert len(peaks) == model.config.num_steps
    assert collector.maxima[0, collector.names.index("expert.layers.0.down")] == max(peaks)
    assert len(set(peaks)) > 1


def observations(count: int) -> Iterator[dict[str, object]]:
    rng = np.random.default_rng(3)
    state = np.array([-0.04, 0.03, 0.76, 2.97, -0.22, -0.13, 0.027, -0.027], np.float32)
    for seed in range(count):
        images = [rng.integers(0, 256, (120, 160, 3), dtype=np.uint8) for _ in range(2)]
        yield {"images": images, "prompt": "pick up the block", "state": state, "seed": seed}


def test_policy_calibrates_itself_once_and_on_request(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    policy = flashrt_runtime.load_model(checkpoints["pi05"], hardware="cpu", precision="fp8", num_steps=STEPS)
    assert policy.precision == "fp8"
    first, *others = observations(3)
    before = policy.predict(**first)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1
    assert np.array_equal(policy.predict(**first), before)
    assert sum("not calibrated" in record.message for record in caplog.records) == 1
    policy.calibrate(others, max_samples=1)
    after = policy.predict(**first)
    assert not np.array_equal(after, before)
    policy.recalibrate()
    assert np.array_equal(policy.predict(**first), before)
    assert sum("not calibrated" in record.message for record in caplog.records) == 2


def test_calibrate_refuses(checkpoints: dict[str, Path]) -> None:
    policy = flashrt_runtime.load_model(checkpoints["pi05"], hardware="cpu", precision="fp8", num_steps=STEPS)
    with pytest.raises(OptionError, match="no observations"):
        policy.calibrate([])
    with pytest.raises(OptionError, match="percentile"):
        policy.calibrate(observations(1), percentile=101.0)
    plain = flashrt_runtime.load_model(checkpoints["pi05"], hardware="cpu", precision="fp32")
    for refused in (lambda: plain.calibrate(observations(1)), plain.recalibrate):
        with pytest.raises(OptionError, match="no activation scales"):
            refused()


def test_precision_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_precision(None, True, None, None) == "fp8"
    assert requested_precision(None, False, True, None) == "fp16"
    assert requested_precision("fp8", None, None, None) == "fp8"
    for precision, fp8, fp16 in (("bf16", True, None), ("fp8", False, None), (None, True, True)):
        with pytest.raises(OptionError):
            requested_precision(precision, fp8, fp16, None)
    assert resolve_target("cpu", None).precision == "fp32"
    assert resolve_target("cpu", "fp8").dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    for capability, default in {(8, 0): "bf16", (8, 7): "bf16", (8, 9): "fp8", (9, 0): "fp8"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert resolve_target("any", None).precision == default
        if default == "bf16":
            with pytest.raises(HardwareError, match=r"8\.9"):
                resolve_target("any", "fp8")


def test_cached_weights_are_those_of_the_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(checkpoints["pi05"], config="auto") as opened:
        cache = WeightCache(opened, "fp8")
        empty = models.build(opened.config, 2, torch.bfloat16)
        swap_linears(empty)
        assert cache.load(empty, CPU) is None
        fresh = models.build(opened.config, 2, torch.bfloat16)
        swap_linears(fresh)
        load_weights(fresh, opened.config, opened, CPU)
        cache.save(fresh)
        (file,) = cache.files()
        assert cache.load(empty, CPU) == file
    want, got = dict(fresh.named_parameters()), dict(empty.named_parameters())
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].float(), tensor.float()), name
    for name, linear in fp8_linears(fresh).items():
        assert torch.equal(empty.get_submodule(name).weight_scale, linear.weight_scale), name
    whole = file.read_bytes()
    again = models.build(opened.config, 2, torch.bfloat16)
    swap_linears(again)
    holes = whole[: len(whole) // 2] + bytes(4096) + whole[len(whole) // 2 + 4096 :]
    for damaged in (whole[:1000], holes):  # made again, not believed
        file.write_bytes(damaged)
        assert cache.load(again, CPU) is None
    cache.save(fresh)
    assert cache.files() == [file]
    assert cache.load(again, CPU) == file


def test_a_read_only_cache_is_a_warning(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a read-only mount only its answer is made here: every change under weights/ fails with EROFS."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with open_checkpoint(checkpoints["pi05"], config="auto") as opened:
        cache = WeightCache(opened, "fp8")
    cache.folder.mkdir(parents=True)
    monkeypatch.setattr(tensor_files, "save_file", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    cache.save(torch.nn.Linear(2, 2))
    assert "quantised weights not kept" in caplog.text


def test_what_killed_writers_left_is_removed(checkpoints: dict[str, Path]) -> None:
    with open_checkpoint(checkpoints["pi05"], config="auto") as opened:
        cache = WeightCache(opened, "fp8")
    folder = cache.folder
    folder.mkdir(parents=True)
    for name in (".KEY.safetensors.12.part", ".tmpAb12Cd", ".KEY.safetensors.13.part"):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (0, 0) if "13" not in name else None)
    cache.save(torch.nn.Linear(2, 2))
    (file,) = cache.files()
    assert {each.name for each in folder.iterdir()} == {file.name, ".KEY.safetensors.13.part"}


def test_cache_key_tells_contents_apart(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(checkpoints["pi05"], config="auto") as opened:
        config = opened.config
        name = WeightCache(opened, "fp8").key
    key = cache_key("digest", config, "fp8", "1.0")
    wider = dataclasses.replace(config, vision=dataclasses.replace(config.vision, depth=3))
    for other in (
        cache_key("another", config, "fp8", "1.0"),
        cache_key("digest", wider, "fp8", "1.0"),
        cache_key("digest", config, "nvfp4", "1.0"),
        cache_key("digest", config, "fp8", "1.1"),
    ):
        assert other != key
    assert cache_key("digest", config.with_steps(5), "fp8", "1.0") == key
    # one changed weight, same size, same header: a fine-tune of the same architecture
    copy = make_checkpoint(tmp_path / "copy", size="tiny", preset="libero", policy="pi05")
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with open_checkpoint(copy, config="auto") as opened:
        assert WeightCache(opened, "fp8").key != name


def test_scales_are_handed_on_aligned() -> None:
    """Views between 16-byte addresses are copied, with what they hold then; others stay what they are."""
    table = torch.zeros(8)
    address = table.data_ptr() % ops.SCALE_ALIGNMENT // 4
    for index in range(8):
        table[index] = index + 1
        got = ops.aligned(table[index])
        assert got.data_ptr() % ops.SCALE_ALIGNMENT == 0
        assert float(got) == index + 1
        assert (got.data_ptr() == table[index].data_ptr()) == ((address + index) % 4 == 0)
