#!/usr/bin/env python
"""Runs LeRobot's RTCProcessor on the cases of `rtc_cases.py` and writes its numbers. Needs `make parity-env`.

    .venv-parity/bin/python test/parity/oracles/rtc_oracle.py --out test/data/goldens

One file, `lerobot_rtc.npz`: `weights/<schedule>` (masks, 50) and `<case>` (horizon, width), the chunk at t
= 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from lerobot.configs import RTCAttentionSchedule  # noqa: E402
from lerobot.policies.common.flow_matching import euler_integrate  # noqa: E402
from lerobot.policies.rtc.configuration_rtc import RTCConfig  # noqa: E402
from lerobot.policies.rtc.modeling_rtc import RTCProcessor  # noqa: E402
from lerobot_oracle import load_worker, versions  # noqa: E402
from rtc_cases import FIELDS, MASKS, MODELS, SCHEDULES, RtcCase  # noqa: E402


def processor(schedule: str, weight: float = 10.0) -> RTCProcessor:
    """LeRobot's, with one schedule."""
    kind = RTCAttentionSchedule[schedule.upper()]
    return RTCProcessor(RTCConfig(prefix_attention_schedule=kind, max_guidance_weight=weight))


def weights(schedule: str) -> np.ndarray:
    """(masks, 50): the weights of every mask of MASKS, zeros behind the shorter ones."""
    rows = np.zeros((len(MASKS), 50), np.float32)
    for row, (delay, end, total) in zip(rows, MASKS, strict=True):
        row[:total] = processor(schedule).get_prefix_weights(delay, end, total)[:total].numpy()
    return rows


@torch.no_grad()
def run_field(case: RtcCase) -> np.ndarray:
    """LeRobot's guided loop over the synthetic velocity."""
    matrix, bias = (torch.from_numpy(array) for array in case.field())
    chunk = euler_integrate(
        lambda x, time: torch.tanh(x @ matrix + time[:, None, None] * bias),
        torch.from_numpy(case.noise())[None],
        case.steps,
        rtc_processor=processor(case.schedule, case.weight),
        rtc_enabled=True,
        inference_delay=case.delay,
        prev_chunk_left_over=torch.from_numpy(case.target()),
        execution_horizon=case.end,
    )
    return chunk[0].numpy()


@torch.no_grad()
def run_model(worker, case: RtcCase) -> np.ndarray:
    """LeRobot's policy with guidance."""
    own = case.model
    model = worker.build(own.policy, own.dims, own.horizon, own.views)
    worker.load(model, own.weights())
    model.config.rtc_config = RTCConfig()
    model.rtc_processor = processor(case.schedule, case.weight)
    batch = {name: torch.from_numpy(np.array(value))[None] for name, value in own.inputs().items()}
    state = (batch["state"],) if own.policy == "pi0" else ()
    chunk = model.sample_actions(
        list(batch["images"].unbind(1)),
        list(batch["image_mask"].unbind(1)),
        batch["tokens"],
        batch["token_mask"],
        *state,
        noise=batch["noise"],
        num_steps=case.steps,
        inference_delay=case.delay,
        prev_chunk_left_over=torch.from_numpy(case.target()),
        execution_horizon=case.end,
    )
    return chunk[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    worker = load_worker()
    entries = {f"weights/{schedule}": weights(schedule) for schedule in SCHEDULES}
    entries |= {case.name: run_field(case) for case in FIELDS}
    entries |= {case.name: run_model(worker, case) for case in MODELS}
    path = out / "lerobot_rtc.npz"
    np.savez_compressed(path, **{name: np.asarray(value, np.float32) for name, value in entries.items()})
    print(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()[:12])
    print(json.dumps(versions()))


if __name__ == "__main__":
    main()
