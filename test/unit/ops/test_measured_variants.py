"""Variants timed on this GPU at the published shapes: both are valid, and a choice is made of them."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.ops import variants

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]  # elsewhere there is one variant


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> variants.Variants:
    monkeypatch.setattr(variants, "TABLES", {})
    return variants.of(torch.device("cuda", torch.cuda.current_device()))


def both(table: variants.Variants, call: object) -> list[torch.Tensor]:
    """The operation's result by each of its candidates, after it was measured."""
    assert callable(call)
    with torch.inference_mode():
        with table.measuring():
            call()
        (operation,) = table.chosen
        times = table.measured[operation]
        assert set(times) == {"own", "library"}
        assert all(0.0 < each < 10.0 for each in times.values())
        results = []
        for name in times:
            table.chosen[operation] = name
            results.append(call().float())
    return results


def test_prefix_attention(table: variants.Variants) -> None:
    q = torch.randn(560, 8, 256, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(560, 1, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    unmasked = ops.Unmasked(560, 560, torch.tensor(553, dtype=torch.int32, device="cuda"))
    own, library = both(table, lambda: ops.attention(q, k, v, unmasked))
    torch.testing.assert_close(own, library, rtol=2e-2, atol=5e-3)


def test_vision_attention(table: variants.Variants) -> None:
    qkv = torch.randn(2, 256, 3 * 1152, device="cuda", dtype=torch.bfloat16)
    own, library = both(table, lambda: ops.vision_attention(qkv, 16))
    torch.testing.assert_close(own, library, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["linear", "linear_gelu", "linear_geglu"])
def test_products(table: variants.Variants, name: str) -> None:
    shape = {"linear": (1152, 1152), "linear_gelu": (4304, 1152), "linear_geglu": (32768, 2048)}[name]
    one, scale = torch.ones((), device="cuda"), torch.tensor(0.05, device="cuda")
    x = ops.quantise(torch.randn(512, shape[1], device="cuda"), one)
    weight = ops.quantise(torch.randn(shape, device="cuda"), one)
    scales = one / shape[1] ** 0.5, one
    calls = {
        "linear": lambda: ops.scaled_linear(x, weight, *scales, None, torch.bfloat16),
        "linear_gelu": lambda: ops.linear_gelu(x, weight, *scales, None, scale, torch.bfloat16),
        "linear_geglu": lambda: ops.linear_geglu(x, weight, *scales, None, scale, torch.bfloat16),
    }
    own, library = both(table, calls[name])
    assert (own - library).norm() / library.norm() < (4e-3 if name == "linear" else 2e-2)
