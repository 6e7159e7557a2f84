"""Products with a fused epilogue against their torch definitions: fresh random inputs, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.layers.linear import Linear
from flashrt_runtime.ops import prefix, products, reference
from flashrt_runtime.quantization.fp8 import Fp8Linear

EPS = 1e-6
pytestmark = pytest.mark.hopper
ROWS = [1, 64, 127, 192, 256, 304, 340, 512, 560, 816]
# gate_up's widths shrunk; then widths and depths that no tile divides
SIZES = [(1024, 2048), (144, 400), (16, 16), (1040, 1168)]


class Case:
    """Operands of a product with GELU or, `gated`, with GeGLU; their scales, and one for the result."""

    def __init__(self, rows: int, width: int, depth: int, *, gated: bool, device: str = "cuda") -> None:
        wide_x = torch.randn(rows, depth, device=device)
        wide_weight = torch.randn((2 if gated else 1) * width, depth, device=device) / depth**0.5
        self.gated = gated
        self.x_scale, self.weight_scale = ((t.abs().amax() / 448).reshape(()) for t in (wide_x, wide_weight))
        self.x = reference.quantise(wide_x, self.x_scale)
        self.weight = reference.quantise(wide_weight, self.weight_scale)
        self.bias = None if gated else torch.randn(width, device=device).bfloat16()
        self.scale = torch.ones((), device=device)
        self.scale = (self.plain().abs().amax() * 0.9 / 448).reshape(())  # 0.9: saturation is met too

    def sums(self) -> torch.Tensor:
        """The product in float64, as float32."""
        out = self.x.double() @ self.weight.double().T * (self.x_scale * self.weight_scale)
        return (out if self.bias is None else out + self.bias).float()

    def plain(self) -> torch.Tensor:
        return reference.geglu(self.sums()) if self.gated else reference.gelu(self.sums())

    def want(self) -> torch.Tensor:
        operands = self.x, self.weight, self.x_scale, self.weight_scale, self.bias, self.scale
        return reference.linear_geglu(*operands) if self.gated else reference.linear_gelu(*operands)

    def got(self) -> torch.Tensor:
        operands = self.x, self.weight, self.x_scale, self.weight_scale
        if self.gated:
            return products.linear_geglu(*operands, self.scale)
        return products.linear(*operands, self.bias, self.scale)

    def operation(self, dtype: torch.dtype) -> torch.Tensor:
        operands = self.x, self.weight, self.x_scale, self.weight_scale, self.bias, self.scale, dtype
        return ops.linear_geglu(*operands) if self.gated else ops.linear_gelu(*operands)

    def check(self, got: torch.Tensor, differing: float = 0.06) -> None:
        """e4m3 that is equal, but where the sums' precision lets them round to the neighbour.

        The matrix unit keeps 13 bits or so behind the largest of the products that it adds: up to 0.5 % of
        the sums' rms, for the library as for us. Neighbours in e4m3 are 1/8 apart at most, or one subnormal
        step.
        """
        want = self.want()
        assert got.dtype == want.dtype == ops.E4M3
        assert got.shape == want.shape
        sums = self.sums()
        error = 8e-3 * sums.square().mean().sqrt() / self.scale
        slope = 1.13  # of GELU, at most
        if self.gated:
            gate, up = sums.chunk(2, dim=-1)
            allowed = error * (slope * up.abs() + reference.gelu(gate).abs())
        else:
            allowed = error * slope
        a, b = got.float(), want.float()
        assert torch.isfinite(a).all()
        assert ((a - b).abs() <= b.abs() / 8 + 2**-9 + allowed).all()
        expected = differing * a.numel()
        assert (a != b).sum() <= expected + 3 * expected**0.5 + 1, "more than chance of a small case gives"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("width", "depth"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_sweep(poisoned: None, rows: int, width: int, depth: int, gated: bool) -> None:
    case = Case(rows, width, depth, gated=gated)
    got = case.got()
    case.check(got)
    assert same(got, case.got()), "not the same twice"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "width", "depth", "gated"),
    [
        *((rows, 16384, 2048, True) for rows in (304, 352, 560, 816)),
        *((views * 256, 4304, 1152, False) for views in (1, 2, 3)),
    ],
)
def test_full_size(poisoned: None, rows: int, width: int, depth: int, gated: bool) -> None:
    case = Case(rows, width, depth, gated=gated)
    case.check(case.got())


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("width", "depth"), [*SIZES, (1152, 1152), (3456, 1152), (1152, 4304), (2048, 2048), (144, 4112)]
)
@pytest.mark.parametrize("rows", ROWS)
def test_plain(poisoned: None, rows: int, width: int, depth: int, biased: bool) -> None:
    case = Case(rows, width, depth, gated=False)
    case.bias = case.bias if biased else None
    operands = case.x, case.weight, case.x_scale, case.weight_scale, case.bias
    got = products.linear(*operands, None)
    want = case.sums()
    assert got.dtype == torch.bfloat16
    precision = 8e-3 * max(1.0, depth / 2048) ** 0.5  # of the matrix unit's sums: more terms, more error
    assert ((got.float() - want).abs() <= want.abs() / 128 + precision * want.square().mean().sqrt()).all()
    assert (got.float() - want).norm() / want.norm() < (4e-3 if depth <= 2048 else 6e-3)
    assert torch.equal(got, products.linear(*operands, None)), "not the same twice"


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(256, 1152), (512, 1152), (768, 1152), (70, 144)])
def test_split_product_in_a_graph(poisoned: None, rows: int, width: int) -> None:
    """Two or four blocks share k and send each other sums, launched while the kernel in front still runs."""
    case = Case(rows, width, 4304, gated=False)
    values = torch.randn(rows, 4304, device="cuda").bfloat16()

    def forward() -> torch.Tensor:
        for _ in range(4):
            x = prefix.quantise(values, case.x_scale)
            out = products.linear(x, case.weight, case.x_scale, case.weight_scale, case.bias, None)
        return out

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(3):
        values.normal_()
        out.fill_(float("nan"))
        graph.replay()
        first = out.clone()
        assert torch.equal(first, forward()), "not what the same kernels compute eagerly"
        case.x = reference.quantise(values, case.x_scale)
        want = case.sums()
        assert (first.float() - want).norm() / want.norm() < 6e-3
        for _ in range(50):
            graph.replay()
            assert torch.equal(out, first), "not the same at every replay"


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_broken_input_shows(poisoned: None, gated: bool) -> None:
    case = Case(70, 128, 256, gated=gated)
    case.x.view(torch.uint8)[66, 5] = 0x7F  # NaN in e4m3
    got = case.got().float()
    assert got[66].isnan().all()
    assert torch.isfinite(got[torch.arange(70) != 66]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_in_a_graph_behind_the_norm(poisoned: None, gated: bool) -> None:
    """Launched before the norm has ended; reads what the norm writes and scales written between replays."""
    case = Case(560, 1024, 1152, gated=gated)
    rows, weight = torch.randn(560, 1152, device="cuda").bfloat16(), torch.randn(1152, device="cuda") * 0.1
    case.x_scale.fill_(5 / 448)

    def forward() -> torch.Tensor:
        for _ in range(4):  # each writes where the one before last did
            case.x = prefix.norm(rows, None, weight, None, EPS, case.x_scale)[0]
            out = case.got()
        return out

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for factor in (1.0, 0.5, 3.0):
        rows.normal_()
        case.scale.mul_(factor)
        case.weight_scale.mul_(1.1)
        out.view(torch.uint8).fill_(0x7F)
        graph.replay()
        first = out.clone()
        assert same(first, forward()), "not what the same kernels compute eagerly"
        case.check(first)
        for _ in range(20):
            graph.replay()
            assert same(out, first), "not the same at every replay"


@pytest.mark.gpu
def test_refuses_what_does_not_fit(poisoned: None) -> None:
    case = Case(4, 64, 64, gated=True)
    scales = case.x_scale, case.weight_scale, case.scale
    for bad in (case.x.float(), case.x.cpu(), case.x[:, :32], case.x.t()):
        with pytest.raises(ValueError, match="not served"):
            products.linear_geglu(bad, case.weight, *scales)
    with pytest.raises(ValueError, match="not served"):
        products.linear_geglu(case.x, case.weight[:112], *scales)
    with pytest.raises(ValueError, match="scale must be one float32"):
        products.linear_geglu(case.x, case.weight, *scales[:2], case.scale.double())
    with pytest.raises(ValueError, match="bias must be"):
        products.linear(case.x, case.weight, *scales[:2], torch.zeros(64, device="cuda"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 72])  # 72: not served, in two kernels
def test_operation_on_the_gpu(poisoned: None, width: int, gated: bool) -> None:
    case = Case(33, width, 64, gated=gated)
    case.check(case.operation(torch.bfloat16), 0.1)


@pytest.mark.parametrize("gated", [False, True])
def test_operation_without_a_gpu(gated: bool) -> None:
    case = Case(33, 40, 48, gated=gated, device="cpu")
    got = case.operation(torch.float32)
    assert same(got, case.want())
    rounded = case.operation(torch.bfloat16)
    case.check(rounded, 0.1)
    assert not same(rounded, got), "the two kernels' path rounds between them"


def test_projection_takes_the_fused_operation() -> None:
    """In 32 bits both ways round once; not calibrated, observed or without a scale it goes step by step."""
    layer = Fp8Linear(Linear(48, 40, dtype=torch.float32), static=True)
    layer.bias = torch.nn.Parameter(torch.randn(40), requires_grad=False)
    layer.set_weight(torch.randn(40, 48))
    x, scale, seen = torch.randn(33, 48), torch.tensor(0.01), []
    layer.activation_scale.fill_(x.abs().amax() / 448)
    for fused, separate in ((layer.gelu, ops.gelu), (layer.geglu, ops.geglu)):
        for layer.calibrated in (False, True):
            assert same(fused(x, scale), separate(layer(x), scale))
        assert torch.equal(fused(x, None), separate(layer(x), None))
        layer.observer = seen.append
        assert same(fused(x, scale), separate(layer(x), scale))
        layer.observer = None
    assert len(seen) == 4
    assert all(each is x for each in seen)
