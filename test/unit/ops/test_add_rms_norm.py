"""Residual add and RMSNorm: the torch definition against float64, the CUDA kernel against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.ops import native, reference

EPS = 1e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Gemma 2B and its action expert; one element; one vector; a warp; not whole vectors; several vectors a
# thread; more than the registers hold (scalar kernel).
WIDTHS = (2048, 1024, 1, 8, 256, 1030, 1155, 16384, 40960)
ROWS = (1, 3, 10, 50, 64)


def exact(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64, the sum rounded to the element type as the definition says."""
    total = (x + residual).double().numpy()
    scale = 1.0 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + EPS)
    return total * scale * (1.0 + weight.double().numpy()), total


def tensors(
    rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100_003 + width)
    x, residual = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight = torch.randn(width, generator=generator) * 0.3
    return x.to(device, dtype), (4.0 * residual).to(device, dtype), weight.to(device, weight_dtype)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to dtype, and a few of float32."""
    return torch.finfo(dtype).eps / 2 + 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048), (3, 1155), (2, 5, 1024)])
def test_definition_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = tensors(int(np.prod(shape[:-1])), shape[-1], dtype, torch.float32)
    x, residual = x.reshape(shape), residual.reshape(shape)
    want, want_total = exact(x, residual, weight)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert (normed.dtype, total.dtype, normed.shape) == (dtype, dtype, shape)
    np.testing.assert_array_equal(total.double().numpy(), want_total)
    np.testing.assert_allclose(normed.double().numpy(), want, rtol=rounding(dtype), atol=1e-7)


def test_zero_row_stays_finite() -> None:
    zero = torch.zeros(2, 64)
    normed, _ = reference.add_rms_norm(zero, zero, torch.ones(64), EPS)
    assert torch.equal(normed, zero)


@pytest.mark.gpu
class TestKernel:
    @pytest.fixture(autouse=True)
    def _kernels(self) -> None:
        # Not a skip: on a machine with a GPU the kernels have to be there.
        assert native.unavailable_reason() is None

    @pytest.mark.parametrize("weight_dtype", ["same", torch.float32])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("rows", ROWS)
    def test_against_definition(
        self, rows: int, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | str
    ) -> None:
        x, residual, weight = tensors(
            rows, width, dtype, dtype if isinstance(weight_dtype, str) else weight_dtype, "cuda"
        )
        normed, total = guarded(rows, width, dtype), guarded(rows, width, dtype)
        native.add_rms_norm(x, residual, weight, EPS, out=normed[1:-1], residual_out=total[1:-1])
        self.check(normed[1:-1], total[1:-1], x, residual, weight)
        for guard in (normed, total):
            assert guard[[0, -1]].isnan().all(), "wrote beyond its rows"

    @staticmethod
    def check(
        normed: torch.Tensor,
        total: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        want, want_total = reference.add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, want_total)
        # Sums in another order may round the other way: one unit in the last place of dtype.
        torch.testing.assert_close(normed, want, rtol=torch.finfo(x.dtype).eps + 2e-6, atol=1e-7)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tensor", ["x", "residual", "weight", "out", "residual_out"])
    def test_unaligned_addresses(self, tensor: str, dtype: torch.dtype) -> None:
        x, residual, weight = tensors(5, 512, dtype, dtype, "cuda")
        named = {"x": x, "residual": residual, "weight": weight}
        named |= {"out": torch.full_like(x, torch.nan), "residual_out": torch.full_like(x, torch.nan)}
        shifted = torch.empty(named[tensor].numel() + 1, dtype=dtype, device="cuda")[1:]
        named[tensor] = shifted.view(named[tensor].shape).copy_(named[tensor])
        assert named[tensor].data_ptr() % 16 != 0
        native.add_rms_norm(eps=EPS, **named)
        self.check(named["out"], named["residual_out"], x, residual, weight)

    @pytest.mark.parametrize("width", [1024, 1030, 40960])
    def test_in_place(self, width: int) -> None:
        x, residual, weight = tensors(17, width, torch.bfloat16, torch.float32, "cuda")
        normed, total = x.clone(), residual.clone()
        native.add_rms_norm(normed, total, weight, EPS, out=normed, residual_out=total)
        self.check(normed, total, x, residual, weight)

    def test_leading_dimensions_and_no_rows(self) -> None:
        x, residual, weight = tensors(6, 64, torch.bfloat16, torch.float32, "cuda")
        normed, total = ops.add_rms_norm(x.view(2, 3, 64), residual.view(2, 3, 64), weight, EPS)
        assert normed.shape == (2, 3, 64)
        self.check(normed.view(6, 64), total.view(6, 64), x, residual, weight)
        assert native.add_rms_norm(x[:0], residual[:0], weight, EPS)[0].shape == (0, 64)

    def test_captured_in_a_graph(self) -> None:
        x, residual, weight = tensors(10, 1024, torch.bfloat16, torch.float32, "cuda")
        normed, total = torch.empty_like(x), torch.empty_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            native.add_rms_norm(x, residual, weight, EPS, out=normed, residual_out=total)
        x.copy_(torch.randn_like(x))
        graph.replay()
        self.check(normed, total, x, residual, weight)

    def test_refuses_what_does_not_fit(self) -> None:
        x, residual, weight = tensors(4, 64, torch.bfloat16, torch.float32, "cuda")
        for bad in (x.cpu(), x.double(), x.t(), torch.ones((), device="cuda")):
            with pytest.raises(ValueError, match="x must be a contiguous CUDA tensor"):
                native.add_rms_norm(bad, residual, weight, EPS)
        for bad in (residual[:2], residual.float(), residual.t().contiguous().t(), residual.cpu()):
            with pytest.raises(ValueError, match="residual must be like x"):
                native.add_rms_norm(x, bad, weight, EPS)
        for bad in (weight[:3], weight.half(), weight.cpu(), weight.repeat(2)[::2]):
            with pytest.raises(ValueError, match="weight must be a contiguous"):
                native.add_rms_norm(x, residual, bad, EPS)


def guarded(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows + 2, width) of NaN: an output with one guard row before and one after it."""
    return torch.full((rows + 2, width), torch.nan, dtype=dtype, device="cuda")
