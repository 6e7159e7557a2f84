"""Options of `load_model`: hardware, precision and the older boolean flags, resolved to one device and one
precision.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import HardwareError, NotSupportedYetError, OptionError

logger = logging.getLogger(__name__)

CONFIG_ALIASES = {
    "auto": "auto",
    "pi05": "pi05",
    "pi0": "pi0",
    "pi0fast": "pi0fast",
    "pi0_fast": "pi0fast",
    "groot": "groot",
    "groot_n17": "groot_n17",
    "motus": "motus",
    "wan22_ti2v_5b": "wan22_ti2v_5b",
}
SUPPORTED_CONFIGS = ("pi05", "pi0", "pi0fast")

# precision -> dtype of the activations between the large projections
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
LATER_PRECISIONS = ("nvfp4",)
FP8_CAPABILITY = (8, 9)

# name -> compute capabilities it stands for; "any" takes whatever GPU there is
HARDWARE: dict[str, tuple[tuple[int, int], ...]] = {
    "rtx_sm87": ((8, 7),),
    "rtx_sm89": ((8, 9),),
    "hopper": ((9, 0),),
    "thor": ((10, 1), (11, 0)),
    "rtx_sm120": ((12, 0), (12, 1)),
}
MINIMUM_CAPABILITY = (8, 0)
# Both are there where NVIDIA's driver is loaded and this process may use it: a container that was given no
# GPU has the first alone.
NVIDIA_DRIVER = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"))

MAX_STEPS = 100


@dataclass(frozen=True)
class Target:
    """Where and in which precision a policy runs."""

    device: torch.device
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations, and of weights that are not quantised."""
        return PRECISIONS[self.precision]


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raises OptionError for what is no whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def resolve_config(config: str) -> str:
    """The canonical policy name, or "auto". Raises OptionError (unknown) or NotSupportedYetError."""
    name = CONFIG_ALIASES.get(config)
    if name is None:
        raise OptionError(f"unknown config {config!r}: expected one of auto, {', '.join(SUPPORTED_CONFIGS)}")
    if name != "auto" and name not in SUPPORTED_CONFIGS:
        raise NotSupportedYetError(
            f"config {config!r} is not supported yet: this version runs {', '.join(SUPPORTED_CONFIGS)}"
        )
    return name


def resolve_device(hardware: str) -> torch.device:
    """The device `hardware` names. Raises OptionError (unknown name) or HardwareError (not here).

    "auto" is the CPU only where no GPU is to be expected: one that failed is no reason to go on without it,
    at seconds a chunk.
    """
    names = ("auto", "cpu", "any", *HARDWARE)
    if hardware not in names:
        raise OptionError(f"unknown hardware {hardware!r}: expected one of {', '.join(names)}")
    if hardware == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        expected = _gpu_expected()
        if hardware == "auto" and not expected:
            return torch.device("cpu")
        reason = f", though NVIDIA's driver is here ({NVIDIA_DRIVER[0]})" if expected else ""
        raise HardwareError(
            f"hardware={hardware!r} needs a CUDA GPU and none was found{reason}: look at `nvidia-smi`, and "
            "at `dmesg` for a GPU that failed (Xid); hardware='cpu' runs without one"
        )
    capability = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]})"
    if hardware in HARDWARE and capability not in HARDWARE[hardware]:
        raise HardwareError(
            f"hardware={hardware!r} was asked for but this machine has {found}: use hardware='auto'"
        )
    if capability < MINIMUM_CAPABILITY:
        raise HardwareError(
            f"{found} is not supported: compute capability 8.0 or newer is needed "
            f"({', '.join(HARDWARE)}); use hardware='cpu' to run without it"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _gpu_expected() -> bool:
    """Whether CUDA should find a GPU: torch has CUDA, the driver is here, and nobody hid the GPU from it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return torch.version.cuda is not None and not hidden and all(path.exists() for path in NVIDIA_DRIVER)


def requested_precision(
    precision: str | None, use_fp8: bool | None, use_fp16: bool | None, use_fp4: bool | None
) -> str | None:
    """One precision from the `precision` option and the older flags; None leaves the choice to the device.

    Raises OptionError when two of them contradict each other.
    """
    if precision is not None and precision not in (*PRECISIONS, *LATER_PRECISIONS):
        raise OptionError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    flags = {"fp8": use_fp8, "fp16": use_fp16, "nvfp4": use_fp4}
    wanted = [name for name, flag in flags.items() if flag]
    if len(wanted) > 1:
        raise OptionError(
            f"use_{wanted[0]} and use_{wanted[1]} contradict each other: set one, or precision="
        )
    if precision is None:
        return wanted[0] if wanted else None
    if wanted and wanted[0] != precision:
        raise OptionError(
            f"precision={precision!r} contradicts the flag for {wanted[0]}: drop one of the two"
        )
    if flags.get(precision) is False:
        raise OptionError(
            f"precision={precision!r} contradicts the flag that switches it off: drop one of the two"
        )
    return precision


def default_precision(device: torch.device, allow_fp8: bool = True) -> str:
    """fp8 on a GPU that has it (and where it was not switched off), else bf16; fp32 on the CPU."""
    if device.type == "cpu":
        return "fp32"
    return "fp8" if allow_fp8 and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY else "bf16"


def resolve_target(hardware: str, precision: str | None, allow_fp8: bool = True) -> Target:
    """Device and precision together; None takes `default_precision`, without fp8 unless `allow_fp8`.

    fp8 runs on the CPU too, with the same numerics by float8 casts. Raises NotSupportedYetError for nvfp4 and
    HardwareError for fp16 on the CPU and fp8 on a GPU without it.
    """
    device = resolve_device(hardware)
    if precision in LATER_PRECISIONS:
        raise NotSupportedYetError(
            f"precision {precision!r} is not supported yet: use {', '.join(PRECISIONS)}"
        )
    if precision is None:
        precision = default_precision(device, allow_fp8)
        logger.info("precision: %s, the default of %s", precision, device)
    if precision == "fp16" and device.type == "cpu":
        raise HardwareError("precision 'fp16' needs a GPU: use 'bf16' or 'fp32' on the CPU")
    if precision == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if capability < FP8_CAPABILITY:
            raise HardwareError(
                f"precision 'fp8' needs compute capability 8.9 or newer, {name} has "
                f"{capability[0]}.{capability[1]}: use 'bf16', 'fp16' or 'fp32'"
            )
    return Target(device, precision)
