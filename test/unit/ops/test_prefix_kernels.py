"""Kernels of the vision tower and the prefix against their torch definitions: fresh random inputs, poisoned
outputs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import prefix, reference
from flashrt_runtime.processing.images import prepare_image

EPS = 1e-6
ROWS = [1, 3, 64, 560]
WIDTHS = [2048, 1152, 1028, 77]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


def scale_for(x: torch.Tensor, margin: float = 1.0) -> torch.Tensor:
    return (x.float().abs().amax() * margin / ops.E4M3_MAX).reshape(())


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for the last place, where sums in another order or exp may round the other way."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype != ops.E4M3:
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(got.dtype).eps + 4e-6, atol=1e-5)
        return
    a, b = got.float(), want.float()
    assert torch.isfinite(a).all()
    # neighbours in e4m3 are 1/8 apart at most, or one subnormal step
    assert ((a - b).abs() <= b.abs() / 8 + 2**-9).all()
    assert (a != b).sum() <= max(1, 0.01 * a.numel())  # of few values one alone is more than 1 %


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
class TestNorm:
    def test_rms(self, rows: int, width: int, dtype: torch.dtype, quantised: bool) -> None:
        x, residual = torch.randn(2, rows, width, device="cuda").to(dtype)
        weight = torch.randn(width, device="cuda") * 0.3
        plain = reference.add_rms_norm(x, residual, weight, EPS)[0]
        scale = scale_for(plain, 0.5) if quantised else None  # half: saturation is met too
        want, want_total = reference.add_rms_norm(x, residual, weight, EPS, scale)
        got, total = prefix.norm(x, residual, weight, None, EPS, scale)
        assert torch.equal(total, want_total)
        check(got, want)
        check(prefix.norm(x, None, weight, None, EPS, scale)[0], reference.rms_norm(x, weight, EPS, scale))

    @pytest.mark.parametrize("each", [False, True])
    def test_ada(self, rows: int, width: int, dtype: torch.dtype, quantised: bool, each: bool) -> None:
        """One style, or one for each row."""
        x, residual = torch.randn(2, rows, width, device="cuda").to(dtype)
        before, style = torch.randn(2, 3, *((rows,) if each else ()), width, device="cuda") * 0.5
        plain = reference.gated_add_ada_rms_norm(x, residual, before[2], style, EPS)[0]
        scale = scale_for(plain, 0.5) if quantised else None
        want, want_total = reference.gated_add_ada_rms_norm(x, residual, before[2], style, EPS, scale)
        got, total = ops.gated_add_ada_rms_norm(x, residual, before[2], style, EPS, scale)
        assert torch.equal(total, want_total)
        check(got, want)
        check(ops.ada_rms_norm(x, style, EPS, scale), reference.ada_rms_norm(x, style, EPS, scale))

    def test_layer(self, rows: int, width: int, dtype: torch.dtype, quantised: bool) -> None:
        x, residual = torch.randn(2, rows, width, device="cuda").to(dtype) + 3  # a mean to take away
        weight, bias = torch.randn(2, width, device="cuda")
        plain = reference.add_layer_norm(x, residual, weight, bias, EPS)[0]
        scale = scale_for(plain) if quantised else None
        want, want_total = reference.add_layer_norm(x, residual, weight, bias, EPS, scale)
        got, total = prefix.norm(x, residual, weight, bias, EPS, scale)
        assert torch.equal(total, want_total)
        check(got, want)
        check(
            prefix.norm(x, None, weight, bias, EPS, scale)[0],
            reference.layer_norm(x, weight, bias, EPS, scale),
        )


def test_ada_norm_refuses_what_does_not_fit() -> None:
    x, style = torch.randn(4, 64, device="cuda"), torch.randn(3, 64, device="cuda")
    for broken in (style[:2], style[:, :60].contiguous(), torch.randn(3, 5, 64, device="cuda")):
        with pytest.raises(ValueError, match="expected a style of 3 rows"):
            prefix.ada_norm(x, None, None, broken, EPS, None)
    with pytest.raises(ValueError, match="expected a style of 3 rows"):
        prefix.ada_norm(x, x, None, style, EPS, None)  # a residual without its gate
    with pytest.raises(ValueError, match="contiguous float32"):
        prefix.ada_norm(x, None, None, style.half(), EPS, None)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (3, 77), (64, 4304), (560, 1024)])
def test_activations(shape: tuple[int, int], dtype: torch.dtype, quantised: bool) -> None:
    x = (torch.randn(*shape, device="cuda") * 3).to(dtype)
    double = (torch.randn(shape[0], 2 * shape[1], device="cuda") * 3).to(dtype)
    scale = torch.tensor(4.0 / ops.E4M3_MAX, device="cuda")
    chosen = scale if quantised else None
    check(prefix.gelu(x, chosen), reference.store(reference.gelu(x.float()), dtype, chosen))
    check(prefix.geglu(double, chosen), reference.store(reference.geglu(double.float()), dtype, chosen))
    assert torch.equal(prefix.quantise(x, scale).float(), reference.quantise(x, scale).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_broken_activations_show(value: float) -> None:
    x = torch.full((2, 32), value, device="cuda", dtype=torch.bfloat16)
    scale = torch.tensor(1.0, device="cuda")
    got = prefix.quantise(x, scale).float()
    assert got.isnan().all() if value != value else (got == ops.E4M3_MAX).all()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 256), (4, 2, 64), (3, 1, 10)])
@pytest.mark.parametrize("tokens", [1, 17, 560])
def test_split_qkv_rope(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, on_device: bool
) -> None:
    capacity, start = tokens + 40, 13
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    cos, sin = (
        table[start : start + tokens] for table in rope_tables(capacity, head_dim, torch.device("cuda"))
    )
    caches = torch.full((4, capacity, kv_heads, head_dim), float("nan"), device="cuda").to(dtype)
    slots = torch.arange(start, start + tokens, device="cuda") if on_device else slice(start, start + tokens)
    want = reference.split_qkv_rope(qkv, cos, sin, heads, caches[0], caches[1], slots)
    got = prefix.split_qkv_rope(qkv, cos.contiguous(), sin.contiguous(), heads, caches[2], caches[3], slots)
    check(got, want)
    check(caches[2][start : start + tokens], caches[0][start : start + tokens])
    assert torch.equal(caches[3][start : start + tokens], caches[1][start : start + tokens])
    outside = torch.cat((caches[2:, :start], caches[2:, start + tokens :]), dim=1)
    assert outside.isnan().all(), "wrote beyond its slots"


def cameras(sizes: list[tuple[int, int]]) -> tuple[list[np.ndarray], torch.Tensor, torch.Tensor]:
    """Random images of these heights and widths, their bytes on the device, and where each lies."""
    rng = np.random.default_rng()
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    offsets = np.cumsum([0] + [image.size for image in images])
    frames = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])).cuda()
    views = torch.tensor(
        [[offset, *image.shape[:2]] for offset, image in zip(offsets, images, strict=False)]
    ).cuda()
    return images, frames, views


@pytest.mark.parametrize("rule", ["antialias_uint8", "bilinear_float"])
@pytest.mark.parametrize(
    "sizes", [[(480, 640), (224, 224)], [(100, 37)], [(720, 1280), (1, 224), (225, 223)]]
)
def test_camera_patches(sizes: list[tuple[int, int]], rule: str) -> None:
    images, frames, views = cameras(sizes)
    got = prefix.camera_patches(frames, views, 224, 14, rule == "antialias_uint8")
    pixels = torch.stack([prepare_image(image, 224, rule) for image in images])
    want = reference.patchify(pixels, 14).cuda()
    # the definition resizes 8-bit images in fixed point: within one level of 255
    tolerance = 2 / 255 + 1e-5 if rule == "antialias_uint8" else 2e-5
    assert (got - want).abs().max() <= tolerance
    if rule == "antialias_uint8":
        assert ((got - want).abs() > 1e-5).float().mean() < 0.02


@pytest.mark.parametrize("sizes", [[(480, 640), (224, 224)], [(100, 37)]])
def test_levels_are_the_patches_pixels(sizes: list[tuple[int, int]]) -> None:
    _, frames, views = cameras(sizes)
    patches = prefix.camera_patches(frames, views, 224, 14, True)
    levels = prefix.camera_patches(frames, views, 224, 14, True, True).float()
    assert torch.equal(levels[..., :588], ((patches.double() + 1) * 127.5).round().float() - 128)
    assert not levels[..., 588:].any()


@pytest.mark.hopper
@pytest.mark.parametrize(("width", "depth"), [(1152, 588), (144, 588), (16, 27)])
@pytest.mark.parametrize(("views", "tokens"), [(1, 1), (1, 256), (2, 256), (3, 256), (2, 77)])
def test_embed_levels(views: int, tokens: int, width: int, depth: int) -> None:
    weight, bias = torch.randn(width, depth, device="cuda") * 0.05, torch.randn(width, device="cuda")
    position = torch.randn(tokens, width, device="cuda")
    weights = ops.LevelWeights.of(weight, bias, position)
    pixels = torch.randint(0, 256, (views, tokens, depth), device="cuda")
    levels = torch.zeros(views, tokens, weights.split.shape[1], dtype=torch.float16, device="cuda")
    levels[..., :depth] = pixels - 128
    patches = pixels.double() / 255 * 2 - 1
    exact = patches @ weight.double().T + bias.double() + position.double()
    got = ops.embed_levels(levels, weights)
    assert got.dtype == torch.bfloat16
    want = exact.bfloat16()
    assert ((got.float() - want.float()).abs() <= want.float().abs() / 128 + 1e-5).all()
    assert torch.equal(got, ops.embed_levels(levels, weights)), "not the same twice"
    for view in range(views):  # with the result taken away its error is left, which bfloat16 can show
        rest = dataclasses.replace(weights, table=(weights.table.double() - exact[view]).float())
        error = ops.embed_levels(levels, rest)[view].double()
        product = exact[view] - bias.double() - position.double()
        assert error.norm() / product.norm() < 3e-6, "float32 products: 2e-7 to 4e-7"
        print(f"embed_levels: {error.norm() / product.norm():.1e}")


def test_embed_levels_refuses_other_shapes() -> None:
    weights = ops.LevelWeights.of(*(torch.randn(*s, device="cuda") for s in ((32, 27), (32,), (4, 32))))
    for shape in ((1, 4, 27), (1, 5, 32)):
        with pytest.raises(ValueError, match="expected contiguous float16"):
            ops.embed_levels(torch.zeros(shape, dtype=torch.float16, device="cuda"), weights)


def test_embed_tokens() -> None:
    for dtype in DTYPES:
        for width in (2048, 77):
            table = torch.randn(500, width, device="cuda").to(dtype)
            ids = torch.randint(0, 500, (48,), device="cuda")
            out = torch.full((50, width), float("nan"), device="cuda").to(dtype)
            prefix.embed_tokens(table, ids, width**0.5, out[1:-1])
            torch.testing.assert_close(out[1:-1], reference.embed_tokens(table, ids, width**0.5))
            assert out[[0, -1]].isnan().all()


def test_scaled_linear_against_definition() -> None:
    for rows, n, k in [(1, 64, 64), (17, 3456, 1152), (560, 2048, 16384)]:
        x, weight = torch.randn(rows, k, device="cuda"), torch.randn(n, k, device="cuda") / k**0.5
        bias = torch.randn(n, device="cuda").bfloat16()
        x_scale, w_scale = scale_for(x), scale_for(weight)
        operands = reference.quantise(x, x_scale), reference.quantise(weight, w_scale), x_scale, w_scale, bias
        got = ops.scaled_linear(*operands, torch.bfloat16).float()
        want = reference.scaled_linear(*operands, torch.float32)
        assert (got - want).norm() / want.norm() < 5e-3


@pytest.mark.hopper
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("keys", "valid"),
    [
        *[(1, None), (64, None), (65, 65), (128, None)],  # one tile a block, then several in turn
        *[(129, 129), (193, 193), (200, 129), (385, 385), (560, 530), (816, 809), (1600, 1555)],
        *[(560, 1), (560, 63), (560, 64), (824, 17)],  # blocks without a key
    ],
)
@pytest.mark.parametrize("tokens", [1, 10, 77, 560, 816])
def test_attention(tokens: int, keys: int, valid: int | None, quantised: bool) -> None:
    q = (torch.randn(tokens, 8, 256, device="cuda") * 2).bfloat16()
    k, v = torch.randn(2, keys, 1, 256, device="cuda").bfloat16()
    if valid is not None:  # what is not attended may be anything
        k[valid:], v[valid:] = float("nan"), float("nan")
    attended = slice(valid)
    want = reference.attention(q.float(), k[attended].float(), v[attended].float())
    scale = scale_for(want) if quantised else None
    length = None if valid is None else torch.tensor(valid, dtype=torch.int32, device="cuda")
    got = prefix.attention(q, k, v, length, scale)
    assert torch.equal(got.float(), prefix.attention(q, k, v, length, scale).float()), "not the same twice"
    assert torch.isfinite(got.float()).all()
    plain = got.float() if scale is None else got.float() * scale
    # probabilities and the result are rounded to bfloat16, or the result to e4m3
    bound = 0.07 if quantised else 1e-2
    assert ((plain - want).abs() <= bound * want.abs() + 0.01 * want.abs().amax()).all()
    assert (plain - want).norm() / want.norm() < (4e-2 if quantised else 6e-3)


@pytest.mark.hopper
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("keys", [77, 192, 560])
def test_attention_to_nothing_is_zero(keys: int, quantised: bool) -> None:
    q = torch.randn(77, 8, 256, device="cuda").bfloat16()
    k, v = torch.randn(2, keys, 1, 256, device="cuda").bfloat16()
    nothing, scale = torch.zeros((), dtype=torch.int32, device="cuda"), torch.ones((), device="cuda")
    out = torch.full((77, 2048), float("nan"), device="cuda", dtype=torch.bfloat16)
    del out  # its memory is the result's next
    assert not prefix.attention(q, k, v, nothing, scale if quantised else None).float().any()


@pytest.mark.hopper
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("broken", ["q", "k", "v"])
def test_broken_attention_shows(broken: str, quantised: bool) -> None:
    """NaN among what is attended is NaN in what comes of it, and nowhere else."""
    q, k, v = (torch.randn(200, heads, 256, device="cuda").bfloat16() for heads in (8, 1, 1))
    {"q": q, "k": k, "v": v}[broken].view(200, -1)[130, 5] = float("nan")
    scale = torch.ones((), device="cuda") if quantised else None
    got = prefix.attention(q, k, v, None, scale).float().isnan().view(200, 8, 256)
    want = torch.zeros_like(got)
    if broken == "q":
        want[130, 0] = True
    elif broken == "k":
        want[:] = True
    else:
        want[..., 5] = True
    assert torch.equal(got, want)


@pytest.mark.hopper
def test_attention_behind_the_kernel_that_writes_its_operands() -> None:
    """Launched while that one still runs, it waits for what it reads: as with all launched one by one."""
    tokens, rounds = 560, 20
    qkv = torch.randn(rounds, tokens, 2560, device="cuda").bfloat16()
    tables = rope_tables(tokens, 256, qkv.device)

    def run(wait: bool) -> list[torch.Tensor]:
        k, v = (torch.zeros(tokens, 1, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        found = []
        for each in qkv:
            q = prefix.split_qkv_rope(each, *tables, 8, k, v, slice(0, tokens))
            if wait:
                torch.cuda.synchronize()
            found.append(prefix.attention(q, k, v, None, None))
            if wait:
                torch.cuda.synchronize()
        return found

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_vision_attention(views: int, heads: int, quantised: bool) -> None:
    qkv = torch.randn(views, 256, 3 * heads * 72, device="cuda").bfloat16()
    if not prefix.vision_attention_supported(qkv, heads):
        pytest.skip("compiled for compute capability 9.0 only")
    qkv[..., : heads * 72] *= 2
    want = reference.vision_attention(qkv.float(), heads)
    scale = scale_for(want) if quantised else None
    got = prefix.vision_attention(qkv, heads, scale)
    assert torch.equal(got.float(), prefix.vision_attention(qkv, heads, scale).float()), "not the same twice"
    assert torch.isfinite(got.float()).all()
    plain = got.float() if scale is None else got.float() * scale
    bound = 0.07 if quantised else 1e-2
    assert ((plain - want).abs() <= bound * want.abs() + 0.01 * want.abs().amax()).all()
    assert (plain - want).norm() / want.norm() < (4e-2 if quantised else 6e-3)


def test_scales_may_be_columns_of_a_table() -> None:
    """As the fused expert's are; cuBLASLt takes a scale on a 16-byte address only."""
    table = torch.rand(3, 2, device="cuda") / 100
    x, weight = torch.randn(10, 4096, device="cuda"), torch.randn(1024, 4096, device="cuda")
    for scale in table.flatten():
        operands = reference.quantise(x, scale), reference.quantise(weight, scale), scale, scale, None
        got = ops.scaled_linear(*operands, torch.bfloat16).float()
        want = reference.scaled_linear(*operands, torch.float32)
        assert (got - want).norm() / want.norm() < 5e-3


def test_refuses_what_does_not_fit() -> None:
    x, weight = torch.randn(4, 64, device="cuda"), torch.randn(64, device="cuda")
    for bad in (x.cpu(), x.double(), x.t()):
        with pytest.raises(ValueError, match="expected a contiguous CUDA tensor"):
            prefix.norm(bad, None, weight, None, EPS, None)
    with pytest.raises(ValueError, match="weight must be contiguous float32"):
        prefix.norm(x, None, weight.half(), None, EPS, None)
    with pytest.raises(ValueError, match="residual must be"):
        prefix.norm(x, x[:2], weight, None, EPS, None)
    cache, tables = torch.zeros(3, 1, 16, device="cuda"), torch.zeros(4, 8, device="cuda")
    with pytest.raises(ValueError, match="do not fit together"):
        prefix.split_qkv_rope(x, tables, tables, 2, cache, cache, slice(0, 4))
