#!/usr/bin/env python
"""Runs LeRobot's pi0-FAST on the cases of `fast_cases.py`. Needs `make parity-env`.

    .venv-parity/bin/python test/parity/oracles/lerobot_fast_oracle.py --out test/data/goldens  # the goldens
    .venv-parity/bin/python test/parity/oracles/lerobot_fast_oracle.py --out DIR --full CASE …  # every logit

Writes lerobot_pi0fast.npz with entries `<case>/tokens` and `<case>/logits`; with --full one file per case;
with --save also a policy directory per case as LeRobot writes it.
Decoding is LeRobot's own, greedy with its K/V cache, float32 on the CPU, and its slow one without a cache
must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from fast_cases import FAST_BY_NAME, FAST_CASES, fast_golden  # noqa: E402
from lerobot_oracle import load_worker, versions  # noqa: E402
from parity_formula import shapes  # noqa: E402

LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


class Ids:
    """The two ids that LeRobot's decoding asks its tokenizer for; no token equals the stop."""

    bos_token_id = 2

    def convert_tokens_to_ids(self, _text: str) -> int:
        return -1


def build(worker, case):
    """LeRobot's module with the case's weights."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0_fast import modeling_pi0_fast as module
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    size = case.dims["vision"]["image_size"]
    cameras = {
        f"observation.images.view{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
        for i in range(case.views)
    }
    config = PI0FastConfig(
        input_features=cameras | {"observation.state": PolicyFeature(FeatureType.STATE, (7,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device="cpu",
        dtype="float32",
        chunk_size=case.horizon,
        n_action_steps=case.horizon,
        image_resolution=(size, size),
    )
    module.PiGemmaForCausalLM = None  # the worker resizes an expert, of which there is none here
    with worker.resized(module, case.dims), worker.without_initialisation():
        model = module.PI0FastPytorch(config, paligemma_tokenizer=Ids()).eval()
    weights = case.weights()
    ours = shapes("pi0fast", case.dims, tied=case.tied)
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if case.tied:
        theirs.pop(LM_HEAD, None)
    if ours != theirs:
        raise SystemExit(f"{case.name}: keys or shapes differ: {sorted(set(ours) ^ set(theirs))[:6]}")
    for key, parameter in model.named_parameters():
        own = case.tied and key == LM_HEAD
        parameter.data = torch.from_numpy(weights(EMBEDDING if own else key)).clone()
    return model


def save_policy(model, case, folder: Path) -> None:
    """config.json by LeRobot's own code, and the tensors under the names it saves them by."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config._save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"flashrt_dims": case.dims}
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def run(model, case) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (max_tokens,) and logits (max_tokens, vocabulary) of a case."""
    batch = {name: torch.from_numpy(np.array(value))[None] for name, value in case.prompt().items()}
    arguments = (
        list(batch["images"].unbind(1)),
        list(batch["image_mask"].unbind(1)),
        batch["tokens"],
        batch["token_mask"],
    )
    logits = []
    hook = model.paligemma_with_expert.paligemma.lm_head.register_forward_hook(
        lambda _module, _inputs, output: logits.append(output[0, -1].clone())
    )
    tokens = model.sample_actions_fast_kv_cache(*arguments, max_decoding_steps=case.max_tokens)[0]
    hook.remove()
    slow = model.sample_actions_fast(*arguments, max_decoding_steps=case.max_tokens)[0]
    if not torch.equal(tokens, slow):
        raise SystemExit(f"{case.name}: LeRobot's two decoders disagree")
    return tokens.numpy(), torch.stack(logits).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="keep every logit, one file per case")
    parser.add_argument("--save", action="store_true", help="also save each policy as LeRobot does")
    parser.add_argument("cases", nargs="*", help="names; default: every tiny case")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    worker, kept = load_worker(), {}
    for case in [FAST_BY_NAME[name] for name in arguments.cases] or FAST_CASES:
        model = build(worker, case)
        if arguments.save:
            save_policy(model, case, arguments.out / case.name)
        tokens, logits = run(model, case)
        best = np.sort(logits, axis=-1)[:, -2:]
        distinct, margin = len(set(tokens.tolist())), np.diff(best).min()
        print(case.name, f"distinct {distinct}, margin {margin:.2e}", flush=True)
        if arguments.full:
            np.savez(arguments.out / f"{case.name}.npz", tokens=tokens, logits=logits)
            continue
        kept |= {f"{case.name}/{name}": value for name, value in fast_golden(tokens, logits).items()}
    if kept:
        path = arguments.out / "lerobot_pi0fast.npz"
        np.savez_compressed(path, **kept)
        print(path, path.stat().st_size)
    print(json.dumps(versions()))


if __name__ == "__main__":
    main()
