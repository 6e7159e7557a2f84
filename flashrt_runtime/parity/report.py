"""The drift report: one observation through our model and another implementation, compared stage by stage."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from ..checkpoints import open_checkpoint
from ..config import PolicyConfig
from ..errors import NotSupportedYetError, ObservationError
from ..options import MAX_STEPS, Target, check_range
from .against import lerobot_python, lerobot_stages, our_stages, reference_stages
from .drift import Drift, Gates, compare, default_gates
from .stages import Inputs, random_inputs

Against = Literal["lerobot", "reference"]
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Report:
    """What was compared and how it came out; `failures` is empty when every bound holds."""

    checkpoint: str
    policy: str
    against: Against
    precision: str
    device: str
    inputs: str
    gates: Gates
    drifts: tuple[Drift, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self) | {"passed": self.passed}


def drift_report(
    checkpoint: str | Path,
    against: Against,
    target: Target,
    *,
    framework: Literal["torch", "jax"] = "torch",
    num_steps: int | None = None,
    views: int = 2,
    tokens: int = 24,
    seed: int = 0,
    inputs_file: str | Path | None = None,
    max_abs: float | None = None,
    relative_l2: float | None = None,
    **facts: Any,
) -> Report:
    """Run `checkpoint` here and in the other implementation on the same model-space inputs.

    Inputs come from `inputs_file` (.npz with the arrays of `Inputs`) or are drawn from `seed`: `views` images
    of noise and a prompt of `tokens` random tokens. The bounds are `default_gates`; max_abs replaces the one
    on the actions' max-abs, relative_l2 those on relative L2. facts: other arguments of `open_checkpoint`.
    The other implementation runs first and is gone before our weights are loaded: the peak is one model.
    Raises CheckpointError, OptionError, ObservationError (inputs that do not fit), NotSupportedYetError or
    ParityError.
    """
    if target.precision not in PRECISIONS:
        raise NotSupportedYetError(
            f"parity is measured in {', '.join(PRECISIONS)}, not yet in {target.precision}"
        )
    if num_steps is not None:
        check_range("num_steps", num_steps, 1, MAX_STEPS)
    if against == "lerobot":
        lerobot_python()  # before a checkpoint of gigabytes is opened
    with open_checkpoint(checkpoint, framework=framework, **facts) as opened:
        if opened.config.policy == "pi0fast":
            raise NotSupportedYetError("a drift report is of a flow's stages: pi0fast has none, only tokens")
        opened.config = opened.config.with_steps(num_steps)
        inputs, origin = _inputs(opened.config, views, tokens, seed, inputs_file)
        inputs.check(opened.config)
        if against == "lerobot":  # which rounds 1 - k/N, whatever the checkpoint's own family does
            opened.rules = replace(opened.rules, accumulate_time=False)
        theirs = (lerobot_stages if against == "lerobot" else reference_stages)(opened, inputs)
        ours = our_stages(opened, inputs, target)
        policy = opened.config.policy
    drifts = tuple(compare(ours, theirs))
    bounds = default_gates(policy, target.precision, against)
    if max_abs is not None:
        bounds = replace(bounds, actions_max_abs=max_abs)
    if relative_l2 is not None:
        bounds = replace(bounds, relative_l2=relative_l2, actions_relative_l2=relative_l2)
    return Report(
        checkpoint=str(checkpoint),
        policy=policy,
        against=against,
        precision=target.precision,
        device=str(target.device),
        inputs=origin,
        gates=bounds,
        drifts=drifts,
        failures=tuple(bounds.failures(drifts)),
    )


def _inputs(
    config: PolicyConfig, views: int, tokens: int, seed: int, file: str | Path | None
) -> tuple[Inputs, str]:
    if file is None:
        return random_inputs(config, views, tokens, seed), f"{views} views, {tokens} tokens, seed {seed}"
    return read_inputs(file), str(file)


def read_inputs(file: str | Path) -> Inputs:
    """The arrays of an .npz file as `Inputs`.

    Raises ObservationError when one is missing or mistyped, or the file is another; OSError where there is
    none.
    """
    kinds = {
        "images": "f4",
        "image_mask": "?",
        "tokens": "i8",
        "token_mask": "?",
        "state": "f4",
        "noise": "f4",
    }
    try:
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, NpzFile):
            raise ValueError("one array")
        with stored:
            missing = sorted(set(kinds) - set(stored.files))
            arrays = {name: stored[name] for name in kinds if name not in missing}
    except (ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise ObservationError(f"{file}: expected an .npz file, as np.savez writes it: {error}") from error
    if missing:
        raise ObservationError(f"{file}: expected the arrays {sorted(kinds)}; missing {missing}")
    for name, kind in kinds.items():
        if arrays[name].dtype != np.dtype(kind):
            raise ObservationError(f"{file}: {name}: expected {np.dtype(kind)}, got {arrays[name].dtype}")
    return Inputs(**arrays)
