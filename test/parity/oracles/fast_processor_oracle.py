#!/usr/bin/env python
"""A FAST processor fitted, saved and run by the published code, as LeRobot ships it. Needs `make parity-env`.

    .venv-parity/bin/python test/parity/oracles/fast_processor_oracle.py --out test/data/fast

The public processor's own vocabulary (hub: physical-intelligence/fast) could not be fetched, so this one is
fitted to synthetic chunks; class, file format and arithmetic are the published ones. Writes tokenizer.json
and processor_config.json, and expected.npz: chunks, their tokens, and what the tokens decode to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer import UniversalActionProcessor

HORIZON, DIM = 10, 7


def chunks(count: int, seed: int, horizon: int = HORIZON, dim: int = DIM) -> np.ndarray:
    """Motions as robots make them: slow waves, a step of the gripper, a little noise; in [-1, 1]."""
    draw = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[:, None]
    phase, speed = draw.uniform(0, 1, (2, count, 1, dim))
    waves = draw.uniform(0.1, 1, (count, 1, dim)) * np.sin(2 * np.pi * (phase + 1.5 * speed * time))
    waves[:, :, -1] = np.where(time[:, 0] < draw.uniform(-0.5, 1.5, (count, 1)), -1.0, 1.0)
    return np.clip(waves + draw.normal(0, 0.01, waves.shape), -1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    processor = UniversalActionProcessor.fit(list(chunks(2000, 0)), scale=10, vocab_size=768)
    processor.bpe_tokenizer.save_pretrained(out)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (out / name).unlink(missing_ok=True)
    config = {
        "action_dim": None,
        "min_token": processor.min_token,
        "processor_class": "UniversalActionProcessor",
        "scale": processor.scale,
        "time_horizon": None,
        "vocab_size": processor.vocab_size,
    }
    (out / "processor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    # random ones too: nothing a robot does, but every coefficient in use
    draw = np.random.default_rng(1)
    given = np.concatenate((chunks(40, 2), draw.uniform(-1, 1, (20, HORIZON, DIM))))
    tokens = processor(given)
    decoded = processor.decode(tokens, time_horizon=HORIZON, action_dim=DIM)
    lengths = np.array([len(each) for each in tokens])
    np.savez_compressed(
        out / "expected.npz", chunks=given, tokens=np.concatenate(tokens), lengths=lengths, decoded=decoded
    )
    print("tokens a chunk", lengths.min(), lengths.max(), "min_token", processor.min_token)
    print("round trip", np.abs(decoded - given).max())


if __name__ == "__main__":
    main()
