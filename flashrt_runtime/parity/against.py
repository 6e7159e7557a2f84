"""The runs that a drift report compares: ours, the float64 reference, LeRobot in its own environment."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .. import models
from ..checkpoints.base import Checkpoint
from ..errors import ParityError
from ..models.weights import load_weights
from ..options import Target
from .capture import capture
from .reference import ReferencePolicy
from .stages import Inputs, Stages

WORKER = Path(__file__).with_name("lerobot_worker.py")
ENVIRONMENT = "FLASHRT_PARITY_PYTHON"
INSTALL = f"run `make parity-env` in the source tree, or set {ENVIRONMENT} to a Python with lerobot==0.6.1"


def our_stages(checkpoint: Checkpoint, inputs: Inputs, target: Target) -> Stages:
    """Our model's stages at the given device and precision; its memory is free again afterwards."""
    config = checkpoint.config
    model = models.build(
        config,
        len(inputs.images),
        target.dtype,
        checkpoint.rules.rope_bf16,
        checkpoint.rules.accumulate_time,
    )
    load_weights(model, config, checkpoint, target.device)
    assert isinstance(model, models.FlowPolicy)
    model.eval()
    model.prepare(target.device)
    try:
        return capture(model, inputs)
    finally:
        del model
        gc.collect()


def reference_stages(checkpoint: Checkpoint, inputs: Inputs) -> Stages:
    """The float64 reference's stages, on the CPU."""

    def tensor(key: str) -> NDArray[np.generic]:
        stored = checkpoint.tensor(key)
        return (stored.float() if stored.dtype == torch.bfloat16 else stored).numpy()

    rules = checkpoint.rules
    reference = ReferencePolicy(
        checkpoint.config, tensor, rope_bf16=rules.rope_bf16, accumulate_time=rules.accumulate_time
    )
    return reference.run(inputs)


def lerobot_python() -> Path:
    """The interpreter that has LeRobot. Raises ParityError when there is none."""
    named = os.environ.get(ENVIRONMENT)
    python = Path(named) if named else Path(__file__).resolve().parents[2] / ".venv-parity" / "bin" / "python"
    if not python.is_file():
        raise ParityError(f"{python}: no such interpreter, so there is no LeRobot to compare with: {INSTALL}")
    return python


def lerobot_stages(checkpoint: Checkpoint, inputs: Inputs) -> Stages:
    """LeRobot's stages in float32 on the CPU, in a process of its own.

    Raises ParityError when LeRobot is not installed or its run fails; the message ends with its last words.
    """
    python, config = lerobot_python(), checkpoint.config
    with tempfile.TemporaryDirectory(prefix="flashrt-parity-") as folder:
        inputs_file, out, job = (Path(folder) / name for name in ("inputs.npz", "stages.npz", "job.json"))
        np.savez(inputs_file, **inputs.arrays())  # type: ignore[arg-type]
        content = {
            "policy": config.policy,
            "dims": {
                "prefix": asdict(config.prefix),
                "expert": asdict(config.expert),
                "vision": asdict(config.vision),
                "vocab_size": config.vocab_size,
            },
            "horizon": config.horizon,
            "action_dim": config.action_dim,
            "num_steps": config.num_steps,
            "files": [str(file.resolve()) for file in checkpoint.store.files],
            "keys": dict(checkpoint.stored_keys),
            "inputs": str(inputs_file),
            "out": str(out),
        }
        job.write_text(json.dumps(content))
        # -P: not the directory of the worker first, whose neighbours are no modules of LeRobot's environment
        command = [str(python), "-P", str(WORKER), str(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=_clean_environment(), check=False)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise ParityError(f"LeRobot's run failed with status {done.returncode} ({python}):\n{last}")
        with np.load(out) as arrays:
            return Stages.from_arrays(arrays)


def _clean_environment() -> dict[str, str]:
    """This process's environment without what points Python at our packages."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
