"""The denoise steps of an action expert as a CUDA graph, each way that this GPU has: milliseconds, and how
far its actions are from the loop's.

    python -m benchmarks.bench_expert_ways --views 2 --chunks 10 50 --precisions fp8 bf16

Weights are random, of the published dimensions; the prefix is of a real prompt's length, its keys and values
are those that the model computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.bench_policy import PROMPTS, Example
from benchmarks.random_policy import random_checkpoint
from flashrt_runtime import ops
from flashrt_runtime.engine import Engine, fused_expert
from flashrt_runtime.engine.expert_chain import ExpertChain
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.models import FlowPolicy, Pi0, Pi05
from flashrt_runtime.models.flow import ExpertKernel
from flashrt_runtime.ops import native
from flashrt_runtime.options import Target


def ways(model: Pi0 | Pi05, device: torch.device) -> Iterator[tuple[str, ExpertKernel | None]]:
    """Name and what stands in for the loop: all that run here."""
    yield "loop", None
    if native.load().expert_attention_in_clusters(model.config.horizon, model.cache.capacity):
        yield "chain", ExpertChain(model, device, clusters=True)
    yield "chain without clusters", ExpertChain(model, device, clusters=False)
    reason = fused_expert.attach(model, device)
    if reason is None:
        yield "fused", model.fused_expert
    else:
        print(f"not by one persistent kernel: {reason}")


def compare(policy: str, precision: str, views: int, chunk: int) -> None:
    """Print one line for each way."""
    device = torch.device("cuda", torch.cuda.current_device())
    checkpoint = random_checkpoint(policy, views, chunk, 10, device, "full")
    settings = Settings(views, None, 0, False, False, expert="loop")
    loaded = build_policy(checkpoint, Target(device, precision), settings)
    example = Example(views, checkpoint.state_dim or 0)
    images, state = example.images(), example.state()
    loaded.predict(images, PROMPTS[0], state, seed=0)
    if precision == "fp8":
        loaded.calibrate({"images": example.images(), "state": example.state(), "seed": i} for i in range(8))
    loaded.predict(images, PROMPTS[0], state, seed=0)  # staged
    bucket = len(loaded._encode(images, state=state, seed=0).tokens)
    model, engine = loaded._model, loaded._engine
    assert isinstance(model, FlowPolicy)
    assert isinstance(model, Pi0 | Pi05)
    assert engine is not None
    noise = torch.randn(model.noise_shape, generator=torch.Generator(device).manual_seed(0), device=device)
    x, wanted = torch.empty_like(noise), None

    def integrate() -> None:
        x.copy_(noise)
        model.integrate(x)

    with torch.inference_mode(), torch.cuda.stream(engine.stream):
        prefill(model, engine, bucket)
        for name, kernel in ways(model, device):
            model.fused_expert = kernel
            assert kernel is None or kernel.ready()
            ms = timing.graph_time(integrate)
            wanted = x.clone() if wanted is None else wanted
            case = f"{policy} {precision} {views} views {chunk:2d} actions"
            print(f"{case}  {name:22s} {ms:7.3f} ms  {distance(x, wanted)}", flush=True)
    loaded.close()
    torch.cuda.empty_cache()


def prefill(model: FlowPolicy, engine: Engine, tokens: int) -> None:
    """What stands in front of the steps in the graph of the prompt's bucket, with what was staged last."""
    ops.assign(model.prefix_length, engine.staging.prefix_length)
    features = model.paligemma.embed_images(engine.images())
    model.prefill_padded(features, engine.staging.tokens[: engine.bucket_of(tokens)])
    model.extend_prefix(engine.staging.state)


def distance(x: Tensor, wanted: Tensor) -> str:
    """Largest difference; smallest cosine of a dimension's actions and of an action's dimensions; signs."""
    worst = (x - wanted).abs().amax().item()
    cosines = (torch.nn.functional.cosine_similarity(x, wanted, dim=dim).amin().item() for dim in (0, 1))
    signs = (x.sign() == wanted.sign()).float().mean().item()
    return "max-abs {:.4f}  cosine {:.5f} {:.5f}  signs {:.4f}".format(worst, *cosines, signs)


def main() -> None:
    """All combinations of the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="pi05", choices=("pi05", "pi0"))
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--chunks", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--precisions", nargs="+", default=["fp8", "bf16"])
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    for precision in args.precisions:
        for chunk in args.chunks:
            compare(args.policy, precision, args.views, chunk)


if __name__ == "__main__":
    main()
