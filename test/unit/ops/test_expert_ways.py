"""Which way the expert takes on which GPU, and what is said of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from expert_model import config, random_model

import flashrt_runtime
from flashrt_runtime.engine import expert_chain, expert_ways, fused_expert
from flashrt_runtime.engine.gpu import Gpu
from flashrt_runtime.errors import HardwareError, OptionError
from flashrt_runtime.quantization.fp8 import fp8_linears
from flashrt_runtime.untrained import make_checkpoint

KB = 1 << 10
H100 = Gpu("NVIDIA H100", (9, 0), 132, 228 * KB)
THOR = Gpu("NVIDIA Thor", (11, 0), 20, 228 * KB)
RTX_5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 100 * KB)
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 100 * KB)
ORIN = Gpu("Orin", (8, 7), 16, 164 * KB)
TURING = Gpu("Quadro RTX 6000", (7, 5), 72, 64 * KB)
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("gpu", "way", "reason"),
    [
        (H100, "fused", ""),
        (THOR, "chain", "it needs 128 multiprocessors, not 20"),
        (RTX_5090, "chain", "it needs 128 KB of shared memory a multiprocessor, not 100"),
        (RTX_4090, "chain", "it needs compute capability 9.0 or newer, not 8.9"),
        (ORIN, "chain", "it needs compute capability 9.0 or newer, not 8.7"),
        (TURING, "loop", "they need compute capability 8.0 or newer, not 7.5"),
        (replace(H100, no_kernels="not built"), "loop", "no native kernels: not built"),
        (None, "loop", "no GPU"),
    ],
)
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_way_of_a_gpu(gpu: Gpu | None, way: str, reason: str, policy: str) -> None:
    choice = expert_ways.choose(config(policy=policy), BF16, gpu)
    assert choice.way == way
    assert reason in str(choice)
    assert str(choice).startswith(expert_ways.DESCRIPTIONS[way])


@pytest.mark.parametrize(
    ("fp8", "horizon", "limited"), [(True, 50, True), (True, 32, False), (False, 50, False)]
)
def test_who_holds_rows_in_8_bits_says_so(fp8: bool, horizon: int, limited: bool) -> None:
    """Without a GPU there is no kernel to ask: only what it looks at is here."""
    fused = object.__new__(fused_expert.FusedExpert)
    fused.fp8, fused.model = fp8, SimpleNamespace(config=replace(config(), horizon=horizon))  # type: ignore[assignment]
    assert (fused.range_limit is not None) is limited
    assert not limited or "expert='chain'" in str(fused.range_limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_take_the_loop(dtype: torch.dtype) -> None:
    assert expert_ways.choose(config(), dtype, H100).way == "loop"


def test_way_of_a_shape() -> None:
    def way(**sizes: int) -> str:
        policy = config()
        return expert_ways.choose(replace(policy, expert=replace(policy.expert, **sizes)), BF16, H100).way

    assert way(depth=7) == "fused"
    assert way(mlp_dim=2048) == "chain"
    assert way(width=768) == "chain"
    assert way(num_heads=4) == "chain"
    assert way(width=1000) == way(width=2048) == way(mlp_dim=100) == way(head_dim=128) == "loop"
    assert expert_ways.choose(config(horizon=64), BF16, THOR).way == "chain"
    assert expert_ways.choose(config(horizon=65), BF16, THOR).way == "loop"
    assert expert_ways.choose(replace(config(), action_dim=30), BF16, THOR).way == "loop"


def test_on_the_cpu_the_loop_runs_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(config(), True, "cpu")
    with caplog.at_level(logging.INFO):
        choice = expert_ways.attach(model, torch.device("cpu"))
    assert choice.way == "loop"
    assert model.fused_expert is None
    assert "expert by the model's own, slower loop" in caplog.text
    assert "a chain of kernels: they need a GPU" in caplog.text
    weight_only = [linear for linear in fp8_linears(model.expert).values() if not linear.static]
    assert weight_only
    assert all(linear.wide is not None for linear in weight_only)


@pytest.mark.parametrize("way", ["fused", "chain"])
def test_what_was_asked_for_and_does_not_serve_is_an_error(way: expert_ways.ExpertWay) -> None:
    model = random_model(config(), False, "cpu")
    with pytest.raises(HardwareError, match=rf"expert='{way}'.*needs? a GPU.*expert='auto'"):
        expert_ways.attach(model, torch.device("cpu"), way)


def test_the_first_that_a_launch_does_not_refuse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal that only the launcher knows leads on, and stands in the log beside what came of it."""
    monkeypatch.setattr(fused_expert, "attach", lambda *_: "expert_steps: cudaErrorNotSupported")
    monkeypatch.setattr(expert_chain, "attach", lambda *_: None)
    with caplog.at_level(logging.INFO):
        choice = expert_ways.attach(random_model(config(), False, "cpu"), torch.device("cpu"))
    assert choice.way == "chain"
    assert "not by one persistent kernel: expert_steps: cudaErrorNotSupported" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_trained_guidance_takes_the_loop() -> None:
    choice = expert_ways.attach(random_model(config(), False, "cpu"), torch.device("cpu"), "auto", "trained")
    assert (choice.way, choice.reasons) == ("loop", (expert_ways.TRAINED,))


@pytest.mark.parametrize("way", ["fused", "chain"])
@pytest.mark.parametrize(
    ("policy", "fields", "error", "words"),
    [
        ("pi05", {}, HardwareError, "runs on the cpu"),
        ("pi05", {"rtc": "trained"}, OptionError, "rtc='trained'"),
        ("pi0fast", {}, OptionError, "no action expert"),
    ],
)
def test_load_model_refuses_a_way_that_is_not_there(
    way: str, policy: str, fields: dict[str, str], error: type[Exception], words: str, tmp_path: Path
) -> None:
    """Before any weight is read."""
    folder = make_checkpoint(tmp_path / "tiny", size="tiny", preset="demo_arm", policy=policy)
    if "rtc" in fields:
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["flashrt"]["rtc_training_max_delay"] = 4
        file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(error, match=words):
        flashrt_runtime.load_model(folder, config="auto", hardware="cpu", expert=way, **fields)


def test_unknown_way() -> None:
    assert expert_ways.check_way("chain") == "chain"
    with pytest.raises(OptionError, match="expert 'kernel': expected one of auto, fused, chain, loop"):
        expert_ways.check_way("kernel")
