"""pi0-FAST on this GPU: milliseconds of the prefill and of a token, in both decode modes.

    python -m benchmarks.bench_fast --out fast.json

Weights are random, of the published dimensions, drawn on the GPU (see `random_policy`); such a policy does
not stop, so every chunk has --tokens tokens. In the same run: whether both modes give the same tokens, the
layers in place of the skinny kernels, and the pruned head against the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.bench_policy import PROMPTS, Example, commit
from benchmarks.random_policy import random_checkpoint
from flashrt_runtime.engine import Engine
from flashrt_runtime.engine.fused_decode import FusedDecode
from flashrt_runtime.loading import Settings, build_policy
from flashrt_runtime.models.pi0_fast import Pi0Fast, score
from flashrt_runtime.ops import expert
from flashrt_runtime.ops.expert import Epilogue
from flashrt_runtime.options import PRECISIONS, Target
from flashrt_runtime.policy import Policy


def calibrate(policy: Policy, example: Example) -> None:
    """Scales from two observations; a random policy's tokens are no chunk, so not by `predict`."""
    if policy.precision == "fp8":
        policy.calibrate(
            {"images": example.images(), "state": example.state(), "prompt": prompt} for prompt in PROMPTS[:2]
        )


def generated(engine: Engine, policy: Policy, example: Example, seed: int) -> np.ndarray:
    """One observation's tokens."""
    example.rng = np.random.default_rng(seed)
    inputs = policy._encode(example.images(), PROMPTS[0], example.state())
    return engine.run(inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy())


def behind_the_prompt(model: Pi0Fast) -> None:
    """Back to where the second token is to be generated."""
    model.slot.copy_(model.prefix_length)
    model.step.fill_(1)
    model.stopped.zero_()


def per_token(engine: Engine, model: Pi0Fast, replays: int) -> dict[str, float]:
    """Milliseconds a token behind the first: device time, the host's launches and questions included."""
    repeats = engine.repeats
    assert repeats is not None
    steps = len(engine.actions) - 1

    def run() -> None:
        behind_the_prompt(model)
        repeats.run()

    with torch.inference_mode(), torch.cuda.stream(engine.stream):
        times = timing.replay_times(run, replays, warm=3)
    return {name: value / steps for name, value in timing.summary(times).items()}


def prefix_time(engine: Engine, model: Pi0Fast, bucket: int) -> float:
    """Milliseconds of images and prompt into K and V, as a graph of its own."""
    tokens = engine.staging.tokens[:bucket]
    with torch.inference_mode(), torch.cuda.stream(engine.stream):

        def prefill() -> None:
            model.prefill_padded(engine.encode_images(), tokens)

        return timing.graph_time(prefill)


def step_times(engine: Engine, model: Pi0Fast) -> dict[str, float]:
    """Milliseconds of one step's parts, as graphs of their own; by the kernels, and by the layers."""
    kernel, noise, scoring = model.fused, engine.staging.noise, model.scoring()
    hidden = torch.ones(1, model.paligemma.width, dtype=model.dtype, device=model.token.device)
    model.cache.length = None
    with torch.inference_mode(), torch.cuda.stream(engine.stream):

        def step() -> None:
            behind_the_prompt(model)
            model.repeat(noise, engine.actions)

        found = {"step": timing.graph_time(step)}
        found["head"] = timing.graph_time(lambda: score(hidden, scoring.rows))
        if kernel is not None:
            model.fused = None
            found["step_by_layers"] = timing.graph_time(step, 20)
            model.fused = kernel
        found["whole_vocabulary"] = timing.graph_time(lambda: score(hidden, model.head_rows), 20)
    return found


def kernel_times(model: Pi0Fast) -> dict[str, float]:
    """Microseconds of each skinny kernel, the weights of all layers in turn."""
    fused = model.fused
    if not isinstance(fused, FusedDecode):
        return {}
    x = torch.ones(1, model.paligemma.width, dtype=torch.bfloat16, device=model.token.device)
    normed = torch.ones(1, model.paligemma.width, device=model.token.device).to(torch.float8_e4m3fn)
    gemm, cache, slots, heads = expert.skinny_gemm, model.cache, fused.slots, model.config.prefix
    calls = {
        "norm": lambda i, layer: layer.layer.input_norm(x, None, layer.qkv.input_scale),
        "qkv": lambda i, layer: gemm(
            normed, layer.qkv, Epilogue.ROPE, fused.q, rope=model.rope, prefix_length=model.slot,
            k_cache=cache.k[i], v_cache=cache.v[i], heads=heads.num_heads, kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
        ),
        "attention": lambda i, layer: expert.expert_attention(
            fused.q, cache.k[i, :slots], cache.v[i, :slots], model.slot, fused.attended, layer.out.input_scale
        ),
        "out": lambda i, layer: gemm(fused.attended, layer.out, Epilogue.RESIDUAL, x),
        "gate_up": lambda i, layer: gemm(
            normed, layer.gate_up, Epilogue.GEGLU, fused.activated, out_scale=layer.down.input_scale
        ),
        "down": lambda i, layer: gemm(fused.activated, layer.down, Epilogue.RESIDUAL, x),
    }  # fmt: skip
    found = {}
    with torch.inference_mode():
        for name, call in calls.items():

            def every(call: Any = call) -> None:
                for index, layer in enumerate(fused.layers):
                    call(index, layer)

            found[name] = timing.graph_time(every) / len(fused.layers) * 1e3
    return found


def pruned_against_full(policy: Policy, model: Pi0Fast, example: Example, steps: int) -> dict[str, Any]:
    """Scores of the tokens that can occur, by the pruned head and out of the whole vocabulary's."""
    ids = model.scoring().ids
    assert ids is not None
    worst, same = 0.0, True
    inputs = policy._encode(example.images(), PROMPTS[0], example.state())
    states: list[torch.Tensor] = []
    hidden = model.hidden
    object.__setattr__(model, "hidden", lambda gap: states.append(hidden(gap)) or states[-1])
    try:
        policy._eager(model, inputs)
    finally:
        object.__delattr__(model, "hidden")
    with torch.inference_mode():
        for state in states[:steps]:
            pruned, full = score(state, model.scoring().rows), score(state, model.head_rows)[:, ids]
            worst = max(worst, float((pruned - full).abs().max()))
            same = same and bool((pruned.argmax() == full.argmax()).item())
    return {"steps": len(states[:steps]), "ids": len(ids), "max_abs": worst, "same_choice": same}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON object."""
    device = torch.device("cuda", torch.cuda.current_device())
    started = time.perf_counter()
    checkpoint = random_checkpoint("pi0fast", args.views, args.chunk, 10, device, args.size)
    settings = Settings(args.views, None, 3, False, False, decode_graph_steps=args.tokens)
    policy = build_policy(checkpoint, Target(device, args.precision), settings)
    stepwise, model = policy._engine, policy._model
    assert stepwise is not None
    assert isinstance(model, Pi0Fast)
    example = Example(args.views, checkpoint.state_dim or 0)
    calibrate(policy, example)
    before = time.perf_counter()
    whole = Engine(model, checkpoint.rules, device, 1, whole=True)
    whole.capture()
    captured = time.perf_counter() - before
    load_s = time.perf_counter() - started
    pairs = [[generated(engine, policy, example, seed) for engine in (stepwise, whole)] for seed in range(4)]
    tokens = len(policy._encode(example.images(), PROMPTS[0], example.state()).tokens)
    bucket = stepwise.bucket_of(tokens)
    with torch.cuda.stream(stepwise.stream):
        first = timing.replay_times(lambda: stepwise.replay(bucket), args.replays)
    result = {
        "gpu": torch.cuda.get_device_name(device),
        "commit": args.commit or commit(),
        "precision": args.precision,
        "views": args.views,
        "tokens": args.tokens,
        "prompt_tokens": tokens,
        "kernels": model.fused is not None,
        "prefill_ms": prefix_time(stepwise, model, bucket),
        "prefill_and_first_token_ms": timing.summary(first),
        "ms_per_token_default": per_token(stepwise, model, args.replays // 10),
        "ms_per_token_one_graph": per_token(whole, model, args.replays // 10),
        "parts_ms": step_times(stepwise, model),
        "kernels_us": kernel_times(model),
        "same_tokens_in_both_modes": all(np.array_equal(*pair) for pair in pairs),
        "distinct_tokens": len(np.unique(pairs[0][0])),
        "pruned_head": pruned_against_full(policy, model, example, 16),
        "one_graph_captured_in_s": captured,
        "load_s": load_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    policy.close()
    return result


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = {
        "prefill": f"{result['prefill_ms']:.2f} ms",
        "a token, one graph per step": f"{result['ms_per_token_default']['p50']:.3f} ms",
        "a token, the whole decode as one graph": f"{result['ms_per_token_one_graph']['p50']:.3f} ms",
        "the same tokens in both modes": str(result["same_tokens_in_both_modes"]),
        "pruned against full scoring": f"max-abs {result['pruned_head']['max_abs']:.1e}, same choice "
        f"{result['pruned_head']['same_choice']}, {result['pruned_head']['ids']} ids",
        "peak of the GPU's memory": f"{result['peak_gib']:.2f} GiB",
    }
    lines = [
        f"{result['gpu']}, commit {result['commit']}, {result['precision']}, {result['views']} views, "
        f"{result['tokens']} tokens, prompt of {result['prompt_tokens']}; random weights, published size.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "- `python -m benchmarks.bench_fast`",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--precision", default="fp8", choices=tuple(PRECISIONS))
    parser.add_argument("--tokens", type=int, default=80, help="decode_graph_steps")
    parser.add_argument("--chunk", type=int, default=10, help="actions per chunk")
    parser.add_argument("--size", default="full", choices=("tiny", "small", "full"))
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--commit", help="of the measured sources, where they are no checkout")
    parser.add_argument("--out", type=Path, help="JSON file; a .md beside it holds the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_fast needs a CUDA GPU")
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
        args.out.with_suffix(".md").write_text(markdown(json.loads(text)))


if __name__ == "__main__":
    main()
