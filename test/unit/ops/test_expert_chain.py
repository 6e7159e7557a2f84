"""The chain of kernels in place of the expert's loop: the same actions, in clusters of blocks and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_model import (
    DEPTH,
    PREFIX,
    calibrate,
    check_guided,
    config,
    float32_twin,
    guide,
    random_model,
    with_prefix,
)

from flashrt_runtime.engine import expert_chain, expert_ways
from flashrt_runtime.engine.expert_chain import ExpertChain
from flashrt_runtime.engine.packed_layer import PROJECTIONS
from flashrt_runtime.models import FlowPolicy
from flashrt_runtime.ops import native
from flashrt_runtime.quantization.fp8 import fp8_linears

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["clusters", "parts"])
def clusters(request: pytest.FixtureRequest) -> bool:
    """Attention in clusters, where the GPU has them, and as smaller GPUs run it."""
    wanted = bool(request.param)
    if wanted and not native.load().expert_attention_in_clusters(64, 1019):
        pytest.skip("no clusters")
    return wanted


def ready_model(horizon: int, policy: str, fp8: bool) -> tuple[FlowPolicy, torch.Tensor]:
    """A calibrated model behind a prefix of random keys and values, and noise."""
    torch.manual_seed(horizon)
    model = random_model(config(horizon, policy), fp8, "cuda")
    for cache in (model.cache.k, model.cache.v):
        cache.normal_()
    with_prefix(model)
    noise = torch.randn(horizon, 32, device="cuda")
    if fp8:
        calibrate(model, noise)
    return model, noise


def chained(model: FlowPolicy, clusters: bool) -> ExpertChain:
    chain = ExpertChain(model, CUDA, clusters)  # type: ignore[arg-type]
    assert chain.ready()
    model.fused_expert = chain
    return chain


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
@pytest.mark.parametrize("horizon", [1, 10, 16, 17, 50, 64])
def test_same_actions_as_the_loop(fp8: bool, policy: str, horizon: int, clusters: bool) -> None:
    """No further from the model in float32 than the model's own loop; each dimension alike in sign."""
    model, noise = ready_model(horizon, policy, fp8)
    exact_model = float32_twin(model, config(horizon, policy), "cuda")
    with_prefix(exact_model)
    exact, loop, chain = (noise.clone() for _ in range(3))
    exact_model.integrate(exact)
    model.integrate(loop)
    chained(model, clusters)
    model.integrate(chain)
    loop_error, error = (((x - exact).norm() / (exact - noise).norm()).item() for x in (loop, chain))
    worst, its = ((x - exact).abs().amax().item() for x in (chain, loop))
    assert error < 1.5 * loop_error + 1e-3, f"relative error {error:.2e}, of the loop {loop_error:.2e}"
    assert error < (8e-2 if fp8 else 3e-2), f"relative error {error:.2e}"
    assert worst < 2 * its + 5e-3, f"largest error {worst:.2e}, of the loop {its:.2e}"
    cosine = F.cosine_similarity(chain, exact, dim=0)
    assert cosine.amin() > 0.99 or horizon == 1, f"dimension {int(cosine.argmin())}: {cosine.amin():.4f}"
    sure = exact.abs() > 2 * its + 5e-3  # nearer to zero the loop's own sign is an accident
    assert sure.float().mean() > 0.5
    assert torch.equal(chain[sure].sign(), exact[sure].sign())


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
@pytest.mark.parametrize("horizon", [10, 50])
def test_a_graph_replays_bit_for_bit(fp8: bool, policy: str, horizon: int, clusters: bool) -> None:
    """State token and steps, eager and replayed, over prefixes of a length that only the device knows."""
    model, noise = ready_model(horizon, policy, fp8)
    chained(model, clusters)
    state = torch.randn(32, device="cuda")
    length, out = torch.zeros((), dtype=torch.int32, device="cuda"), torch.empty_like(noise)

    def work() -> None:
        model.prefix_length.copy_(length)
        model.cache.length, model.prefix_bound = None, PREFIX
        model.generate(state if policy == "pi0" else None, noise, out)

    work()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        work()
    seen, before = [], (model.cache.k.clone(), model.cache.v.clone())
    for valid in (PREFIX, 77, 1, PREFIX):
        length.fill_(valid)
        for cache, old in zip((model.cache.k, model.cache.v), before, strict=True):
            cache.copy_(old)  # what is behind a shorter prefix
        work()
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out.view(torch.int32), eager.view(torch.int32)), f"{valid} keys"
        seen.append(eager)
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])


@torch.inference_mode()
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
@pytest.mark.parametrize("horizon", [1, 10, 50])
def test_guided_as_the_loop_is(policy: str, horizon: int) -> None:
    model, noise = ready_model(horizon, policy, False)
    given = guide(horizon)

    def put_chain() -> None:
        model.fused_expert = ExpertChain(model, CUDA)  # type: ignore[arg-type]

    check_guided(model, noise, given, put_chain)


@torch.inference_mode()
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("prefix", [1, PREFIX])
def test_state_token_as_the_loop_leaves_it(fp8: bool, prefix: int, clusters: bool) -> None:
    """Keys and values no further from the model in float32 than the loop's; nothing else is written."""
    torch.manual_seed(prefix)
    model, state = random_model(config(10, "pi0"), fp8, "cuda"), torch.randn(32, device="cuda")
    for cache in (model.cache.k, model.cache.v):
        cache.normal_()
    if fp8:
        with_prefix(model, length=prefix)
        calibrate(model, torch.randn(10, 32, device="cuda"), state)
    exact = float32_twin(model, config(10, "pi0"), "cuda")
    before = model.cache.k.clone(), model.cache.v.clone()

    def extend(policy: FlowPolicy) -> tuple[torch.Tensor, torch.Tensor]:
        for cache, old in zip((policy.cache.k, policy.cache.v), before, strict=True):
            cache.copy_(old)
        with_prefix(policy, length=prefix)
        policy.extend_prefix(state)
        assert policy.prefix_length.item() == policy.cache.length == prefix + 1
        return policy.cache.k.clone(), policy.cache.v.clone()

    wanted, loop = extend(exact), extend(model)
    chained(model, clusters)
    got = extend(model)
    for mine, slow, true, old in zip(got, loop, wanted, before, strict=True):
        rest = torch.arange(old.shape[1], device="cuda") != prefix
        assert torch.equal(mine[:, rest], old[:, rest])
        for layer in range(DEPTH):
            target = true[layer, prefix]
            loop_error, error = (
                ((each[layer, prefix].float() - target).norm() / target.norm()).item()
                for each in (slow, mine)
            )
            assert error < 1.5 * loop_error + 2e-3, f"layer {layer}: {error:.1e}, loop {loop_error:.1e}"


@torch.inference_mode()
def test_other_weights_reach_the_kernels_in_place() -> None:
    """What a captured graph reads is what kernels packed anew would."""
    model, _ = ready_model(10, "pi05", True)
    chain = chained(model, clusters=False)

    def tensors(of: ExpertChain) -> list[torch.Tensor]:
        return [getattr(packed, name).data for packed in of.layers for name in PROJECTIONS]

    where, before = [each.data_ptr() for each in tensors(chain)], [each.clone() for each in tensors(chain)]
    for linear in fp8_linears(model).values():
        linear.overwrite(linear.weight.flip(0))
    model.weights_changed()
    assert [each.data_ptr() for each in tensors(chain)] == where
    fresh = tensors(ExpertChain(model, CUDA))  # type: ignore[arg-type]
    for now, new, old in zip(tensors(chain), fresh, before, strict=True):
        assert torch.equal(now.view(torch.uint8), new.view(torch.uint8))
        assert not torch.equal(now.view(torch.uint8), old.view(torch.uint8))


@torch.inference_mode()
def test_until_calibrated_the_loop_runs() -> None:
    model = random_model(config(), True, "cuda")
    assert expert_chain.attach(model, CUDA) is None
    assert isinstance(model.fused_expert, ExpertChain)
    assert not model.fused_expert.ready()
    with_prefix(model)
    calibrate(model, torch.randn(10, 32, device="cuda"))
    assert model.fused_expert.ready()
    scale = model.expert.layers[0].out.activation_scale
    assert model.fused_expert.layers[0].out.input_scale is scale


@torch.inference_mode()
def test_another_width_than_the_published_experts() -> None:
    """Where the persistent kernel refuses, "auto" takes the chain, and it is right."""
    small = config(10)
    sizes = {**vars(small.expert), "width": 512, "mlp_dim": 1088, "num_heads": 4}
    small = type(small)(**{**vars(small), "expert": type(small.expert)(**sizes)})
    torch.manual_seed(0)
    model = random_model(small, False, "cuda")
    for cache in (model.cache.k, model.cache.v):
        cache.normal_()
    with_prefix(model)
    noise = torch.randn(10, 32, device="cuda")
    loop, chain = noise.clone(), noise.clone()
    model.integrate(loop)
    choice = expert_ways.attach(model, CUDA)
    assert choice.way == "chain"
    assert "not by one persistent kernel: it" in str(choice)
    model.integrate(chain)
    assert ((chain - loop).norm() / (loop - noise).norm()).item() < 3e-2
