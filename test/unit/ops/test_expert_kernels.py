"""The action expert's fused kernels against the torch definitions, on fresh random inputs with poisoned
outputs."""

from __future__ import annotations

import pytest
import torch

from flashrt_runtime.layers.rope import rope_tables
from flashrt_runtime.ops import expert, reference
from flashrt_runtime.ops.expert import Epilogue, PackedLinear

EPS = 1e-6
ROWS = (1, 10, 16, 17, 32, 50, 64)


def test_packing_is_a_permutation() -> None:
    weight = torch.arange(32 * 128, dtype=torch.int16).view(torch.bfloat16).view(32, 128)
    packed = expert.pack_tiles(weight).view(torch.int16)
    assert sorted(packed.tolist()) == list(range(32 * 128))
    # tile 1, k block 2, feature 3, element 5 of the block
    assert packed[((1 * 4 + 2) * 8 + 3) * 32 + 5] == (1 * 8 + 3) * 128 + 2 * 32 + 5


def test_orders_pair_the_right_features() -> None:
    geglu = expert.geglu_order(16)
    assert geglu[:16].tolist() == [*range(8), *range(16, 24)]
    rope = expert.rope_order(heads=2, head_dim=32)
    assert rope[:16].tolist() == [*range(8), *range(16, 24)]
    assert sorted(rope.tolist()) == list(range(64))


def quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-expert.E4M3_MAX, expert.E4M3_MAX).to(torch.float8_e4m3fn)


class Case:
    """One linear of random weights, its packed form, and the exact (dequantised) float32 weight."""

    def __init__(self, n: int, k: int, fp8: bool, order: torch.Tensor | None = None) -> None:
        weight = torch.randn(n, k, device="cuda") / k**0.5
        if fp8:
            scale = weight.abs().max() / expert.E4M3_MAX
            stored = quantise(weight, scale)
            self.weight = stored.float() * scale
            self.input_scale: torch.Tensor | None = torch.tensor(5.0 / expert.E4M3_MAX, device="cuda")
            packed = expert.pack_tiles(stored.cpu(), order).cuda()
            self.linear = PackedLinear(packed, n, k, scale.reshape(()), self.input_scale)
        else:
            stored = weight.bfloat16()
            self.weight = stored.float()
            self.input_scale = None
            self.linear = PackedLinear(expert.pack_tiles(stored.cpu(), order).cuda(), n, k)

    def see(self, x: torch.Tensor) -> torch.Tensor:
        """x as the tensor cores see it, in float32."""
        if self.input_scale is None:
            return x.bfloat16().float()
        return quantise(x, self.input_scale).float() * self.input_scale

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16() if self.input_scale is None else quantise(x, self.input_scale)


def close(out: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (out.float() - want).norm() / want.norm()
    assert torch.isfinite(out.float()).all()
    assert error < tolerance, f"relative error {error:.2e}"


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, float("nan"), device="cuda").to(dtype)


@pytest.fixture
def norm() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(torch.seed() % 2**31)
    return torch.randn(1024, device="cuda") * 0.3, torch.randn(1024, device="cuda") * 0.3


Norm = tuple[torch.Tensor, torch.Tensor | None]


def input_of(x: torch.Tensor, norm: Norm, fp8: bool) -> tuple[torch.Tensor, Norm | None]:
    """What a product reads, and the norm that it applies: more rows than it can are normed before."""
    if x.shape[0] <= expert.MAX_NORM_ROWS:
        return x, norm
    out = poisoned(*x.shape, dtype=torch.float16 if fp8 else torch.bfloat16)
    return expert.norm_rows(x, norm, EPS, out), None


def normed(x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    shift = norm[1] if norm[1] is not None else torch.zeros_like(norm[0])
    return reference.ada_rms_norm(x, torch.stack((norm[0], shift, shift)), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", ROWS)
class TestSkinnyGemm:
    def test_store(self, rows: int, fp8: bool) -> None:
        case = Case(1024, 2048, fp8)
        x, bias = torch.randn(rows, 2048, device="cuda").bfloat16(), torch.randn(1024, device="cuda")
        out = expert.skinny_gemm(case.cast(x), case.linear, Epilogue.STORE, poisoned(rows, 1024), bias=bias)
        close(out, case.see(x) @ case.weight.T + bias, 4e-3)

    def test_residual(self, rows: int, fp8: bool) -> None:
        case = Case(1024, 4096, fp8)
        x, gate = torch.randn(rows, 4096, device="cuda").bfloat16(), torch.randn(1024, device="cuda")
        residual = torch.randn(rows, 1024, device="cuda").bfloat16()
        want = residual.float() + gate * (case.see(x) @ case.weight.T)
        close(
            expert.skinny_gemm(case.cast(x), case.linear, Epilogue.RESIDUAL, residual, gate=gate), want, 4e-3
        )

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_geglu(
        self, rows: int, fp8: bool, adaptive: bool, norm: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        case = Case(8192, 1024, fp8, expert.geglu_order(4096))
        x = torch.randn(rows, 1024, device="cuda").bfloat16() * 3
        chosen = (norm[0], norm[1] if adaptive else None)
        scale = torch.tensor(8.0 / expert.E4M3_MAX, device="cuda")
        out = (
            poisoned(rows, 4096)
            if not fp8
            else torch.zeros(rows, 4096, device="cuda").to(torch.float8_e4m3fn)
        )
        if fp8:
            out.view(torch.uint8).fill_(0x7F)
        rows_in, norm_left = input_of(x, chosen, fp8)
        expert.skinny_gemm(
            rows_in, case.linear, Epilogue.GEGLU, out, norm=norm_left, out_scale=scale if fp8 else None
        )
        want = reference.geglu(normed(x, chosen).float() @ case.weight.T)
        got = out.float() * scale if fp8 else out
        close(got, want.clamp(-8, 8) if fp8 else want, 3e-2 if fp8 else 6e-3)

    def test_rope(self, rows: int, fp8: bool, norm: tuple[torch.Tensor, torch.Tensor]) -> None:
        case = Case(2560, 1024, fp8, expert.rope_order(10, 256))
        x = torch.randn(rows, 1024, device="cuda").bfloat16()
        cos, sin = rope_tables(800, 256, torch.device("cuda"))
        start = int(torch.randint(1, 700, ()))
        k, v, q = poisoned(800, 1, 256), poisoned(800, 1, 256), poisoned(rows, 8, 256)
        rows_in, norm_left = input_of(x, norm, fp8)
        expert.skinny_gemm(
            rows_in, case.linear, Epilogue.ROPE, q, norm=norm_left, rope=(cos, sin),
            prefix_length=torch.tensor(start, dtype=torch.int32, device="cuda"), k_cache=k, v_cache=v,
            heads=8, kv_heads=1, head_dim=256,
        )  # fmt: skip
        angles = cos[start : start + rows], sin[start : start + rows]
        heads = (normed(x, norm).float() @ case.weight.T).view(rows, 10, 256)
        q_want, k_want = (reference.apply_rope(part, *angles) for part in (heads[:, :8], heads[:, 8:9]))
        v_want = heads[:, 9:]
        close(q, q_want, 6e-3)
        close(k[start : start + rows], k_want, 6e-3)
        close(v[start : start + rows], v_want, 6e-3)
        untouched = torch.cat((k[:start], k[start + rows :], v[:start], v[start + rows :]))
        assert untouched.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_norm_rows(rows: int, adaptive: bool, norm: tuple[torch.Tensor, torch.Tensor]) -> None:
    """As the definition norms them; in fp16 the values that bf16 holds."""
    x = torch.randn(rows, 1024, device="cuda").bfloat16() * 3
    chosen = norm[0], norm[1] if adaptive else None
    want = normed(x, chosen).float()
    plain = expert.norm_rows(x, chosen, EPS, poisoned(rows, 1024))
    wide = expert.norm_rows(x, chosen, EPS, poisoned(rows, 1024, dtype=torch.float16))
    torch.testing.assert_close(plain.float(), want, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-5)
    assert torch.equal(wide, plain.half())


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_a_product_norms_up_to_16_rows(fp8: bool, norm: tuple[torch.Tensor, torch.Tensor]) -> None:
    case = Case(8192, 1024, fp8, expert.geglu_order(4096))
    x, scale = torch.randn(17, 1024, device="cuda").bfloat16(), torch.ones((), device="cuda")
    out = torch.empty(17, 4096, device="cuda", dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        expert.skinny_gemm(x, case.linear, Epilogue.GEGLU, out, norm=norm, out_scale=scale)


@pytest.mark.hopper
@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [1, 17, 300, 560, 710, 955])
@pytest.mark.parametrize("rows", ROWS)
def test_expert_attention(rows: int, prefix: int) -> None:
    capacity = 1019  # three views, a full prompt, a chunk of 50
    k, v = (torch.randn(capacity, 1, 256, device="cuda").bfloat16() for _ in range(2))
    k[prefix + rows :], v[prefix + rows :] = float("nan"), float("nan")
    q = (torch.randn(rows, 8, 256, device="cuda") * 2).bfloat16()
    length = torch.tensor(prefix, dtype=torch.int32, device="cuda")
    keys, values = k[: prefix + rows, 0].float(), v[: prefix + rows, 0].float()
    want = ((q.float().transpose(0, 1) @ keys.T / 16).softmax(-1) @ values).transpose(0, 1).reshape(rows, -1)
    close(expert.expert_attention(q, k, v, length, poisoned(rows, 2048)), want, 6e-3)
    scale = torch.tensor(4.0 / expert.E4M3_MAX, device="cuda")
    out = torch.empty(rows, 2048, device="cuda", dtype=torch.float8_e4m3fn)
    out.view(torch.uint8).fill_(0x7F)
    close(expert.expert_attention(q, k, v, length, out, scale).float() * scale, want, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix", [0, 1, 17, 300, 560, 955])
@pytest.mark.parametrize("rows", ROWS)
def test_expert_attention_without_clusters(rows: int, prefix: int) -> None:
    """As GPUs without them run it; the scratch is left for calls with other rows and slots."""
    capacity = 1019
    k, v = (torch.randn(capacity, 1, 256, device="cuda").bfloat16() for _ in range(2))
    k[prefix + rows :], v[prefix + rows :] = float("nan"), float("nan")
    q = (torch.randn(rows, 8, 256, device="cuda") * 2).bfloat16()
    length = torch.tensor(prefix, dtype=torch.int32, device="cuda")
    keys, values = k[: prefix + rows, 0].float(), v[: prefix + rows, 0].float()
    want = ((q.float().transpose(0, 1) @ keys.T / 16).softmax(-1) @ values).transpose(0, 1).reshape(rows, -1)
    scratch = expert.attention_scratch(64, 8, capacity, q.device)
    outs = [
        expert.expert_attention(q, k[:slots], v[:slots], length, poisoned(rows, 2048), scratch=scratch)
        for slots in (capacity, prefix + rows, capacity)
    ]
    for out in outs:
        close(out, want, 6e-3)
    assert torch.equal(outs[0], outs[2])
    scale = want.abs().amax() / expert.E4M3_MAX  # of one key the result is as large as a value
    quantised = torch.empty(rows, 2048, device="cuda", dtype=torch.float8_e4m3fn)
    quantised.view(torch.uint8).fill_(0x7F)
    expert.expert_attention(q, k, v, length, quantised, scale, scratch)
    close(quantised.float() * scale, want, 3e-2)


@pytest.mark.gpu
def test_expert_attention_refuses_what_it_would_get_wrong() -> None:
    q, k = torch.zeros(1, 8, 256, device="cuda").bfloat16(), torch.zeros(64, 2, 256, device="cuda").bfloat16()
    length = torch.zeros((), dtype=torch.int32, device="cuda")
    scratch = expert.attention_scratch(1, 8, 64, q.device)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        expert.expert_attention(q, k, k, length, poisoned(1, 2048), scratch=scratch)  # two kv heads


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
def test_action_step(rows: int) -> None:
    hidden = torch.randn(rows, 1024, device="cuda").bfloat16()
    scale, shift = torch.randn(2, 1024, device="cuda") * 0.3
    w_out, b_out = torch.randn(32, 1024, device="cuda") / 32, torch.randn(32, device="cuda")
    w_in, b_in = torch.randn(1024, 32, device="cuda") / 6, torch.randn(1024, device="cuda")
    x, following = torch.randn(rows, 32, device="cuda"), poisoned(rows, 1024)
    style = torch.stack((scale, shift, shift))
    want_x = x.double() - 0.1 * (
        reference.ada_rms_norm(hidden, style, EPS).double() @ w_out.double().T + b_out.double()
    )
    expert.action_step(
        x,
        following,
        hidden=hidden,
        norm=(scale, shift),
        eps=EPS,
        out=(w_out, b_out),
        dt=-0.1,
        project=(w_in, b_in),
    )
    close(x, want_x.float(), 1e-5)
    close(following, (want_x @ w_in.double().T + b_in.double()).float(), 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
def test_guided_action_step(rows: int) -> None:
    """Corrected as `reference.guide_velocity` does; rows of weight zero as without a guide, bit for bit."""
    hidden, norm = torch.randn(rows, 1024, device="cuda").bfloat16(), torch.zeros(1024, device="cuda")
    out = torch.randn(32, 1024, device="cuda") / 32, torch.randn(32, device="cuda")
    start, target = torch.randn(2, rows, 32, device="cuda")
    weight, gain = torch.rand(rows, device="cuda"), torch.tensor(1.3, device="cuda")
    weight[::3] = 0
    target[::3] = float("nan")

    def step(guide: expert.StepGuide | None) -> torch.Tensor:
        x = start.clone()
        expert.action_step(
            x, poisoned(rows, 1024), hidden=hidden, norm=(norm, None), eps=EPS, out=out, dt=-0.1,
            project=None, guide=guide,
        )  # fmt: skip
        return x

    plain, guided = step(None), step(expert.StepGuide(target, weight, gain, 0.7))
    velocity = (start - plain) * 10
    want = start - 0.1 * reference.guide_velocity(velocity, start, target, weight, gain, 0.7)
    torch.testing.assert_close(guided, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(guided[::3], plain[::3])
    if rows > 1:
        assert not torch.equal(guided[1], plain[1])
