"""Loads the CUDA kernels of `native_kernels/`; every operation here has its definition in `reference`.

Importing this module needs neither a GPU nor the compiled kernels: `available()` tells, and
`unavailable_reason()` says what is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import HardwareError

MODULE = "flashrt_runtime._native"
# Directory of a `_native` module to use instead of the installed one.
DIRECTORY_VARIABLE = "FLASHRT_NATIVE_DIR"
# kInterfaceVersion of native_kernels/flashrt_native.h.
INTERFACE_VERSION = 11
SMALL_CAPABILITY = (8, 9)
BUILD_COMMANDS = "colcon build (make kernels in a source checkout)"

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def available() -> bool:
    """Whether the compiled kernels and a GPU that they were built for can be used."""
    return unavailable_reason() is None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot be used here, in one line; None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        module = load()
    except HardwareError as error:
        return str(error)
    try:
        module.check_device()
    except RuntimeError as error:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        return f"{error} ({module.__file__} on compute capability {capability}): build it on this machine"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability by which kernels are chosen: the GPU's; 8.9 in a build for tests of small ones."""
    if available() and load().as_small_gpu:
        return SMALL_CAPABILITY
    return torch.cuda.get_device_capability(device)


@functools.cache
def load() -> ModuleType:
    """Import the compiled module. Works without a GPU.

    It is looked for in $FLASHRT_NATIVE_DIR (then nowhere else), beside the installed package, and in the
    build directories of a source checkout (the newest). Raises HardwareError when there is none or it was
    built from other sources.
    """
    module = _import_native()
    version = getattr(module, "interface_version", None)
    if version != INTERFACE_VERSION:
        raise HardwareError(
            f"the native kernels in {module.__file__} have interface version {version}, this package needs "
            f"{INTERFACE_VERSION}: build them again with {BUILD_COMMANDS}"
        )
    return module


def _import_native() -> ModuleType:
    directory = os.environ.get(DIRECTORY_VARIABLE)
    if directory:
        return _import_from(Path(directory))
    if importlib.util.find_spec(MODULE) is not None:
        try:
            return importlib.import_module(MODULE)
        except ImportError as error:
            raise HardwareError(f"the native kernels cannot be loaded: {error}") from error
    build = Path(__file__).resolve().parents[2] / "build"
    # `make kernels` and colcon's build
    directories = [build / "kernels", build / "flashrt_ros" / "native_kernels"]
    built = [path for directory in directories for path in directory.glob("_native*.so")]
    return _import_from(max(built, key=lambda path: path.stat().st_mtime).parent if built else directories[0])


def _import_from(directory: Path) -> ModuleType:
    candidates = sorted(directory.glob("_native*.so"))
    if len(candidates) != 1:
        raise HardwareError(
            f"expected one compiled module _native*.so in {directory}, found {len(candidates)}: put a CUDA "
            f"compiler on PATH and run {BUILD_COMMANDS}, or name its directory in {DIRECTORY_VARIABLE}"
        )
    spec = importlib.util.spec_from_file_location(MODULE, candidates[0])
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise HardwareError(f"the native kernels in {candidates[0]} cannot be loaded: {error}") from error
    return module


def launch(kernel: str, device: torch.device, *arguments: Any) -> None:
    """Call a kernel's binding on the current stream of `device`, whichever GPU is current in this thread.

    arguments: the binding's, a tensor (None: 0) for each address; the stream comes last by itself.
    """
    plain = [
        each.data_ptr() if isinstance(each, Tensor) else 0 if each is None else each for each in arguments
    ]
    with torch.cuda.device(device):
        getattr(load(), kernel)(*plain, torch.cuda.current_stream(device).cuda_stream)


def image_upload(host: Tensor, device: Tensor, threads: int = 0) -> Any:
    """Threads that copy images into `host`, pinned uint8, and on to `device`, of the same size; 0: as many as
    half of the processors, four at most.

    `expect()`: images come in a moment, so that threads wake up. `begin(images, offsets, graph, raw_graph,
    stream)`: images (H, W, 3) uint8 whose rows lie together, and where each goes, behind one another; what
    lies in front of an image goes along to the device; behind them a graph and its executable's address, or
    None and 0. Keeps images and graph alive; returns at once. `finish()`: waits until all is queued on the
    stream, raises RuntimeError when a part was refused.
    """
    addresses = host.data_ptr(), device.data_ptr()
    return load().ImageUpload(host, device, *addresses, device.device.index or 0, threads)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm, as one kernel on the current stream; see `reference.add_rms_norm`.

    x, residual: (..., width) contiguous CUDA tensors, one dtype of float32, float16, bfloat16; weight:
    (width,) of that dtype or float32. out and residual_out, when given, receive the two results (out may be
    x, residual_out may be residual). Raises ValueError for tensors of another kind and RuntimeError when the
    launch fails.
    """
    _check_rows("add_rms_norm", x=x, residual=residual, weight=weight, out=out, residual_out=residual_out)
    out = torch.empty_like(x) if out is None else out
    residual_out = torch.empty_like(x) if residual_out is None else residual_out
    width = x.shape[-1]
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype]
    rows = x.numel() // width
    launch("add_rms_norm", x.device, x, residual, weight, out, residual_out, rows, width, eps, *codes)
    return out, residual_out


def _check_rows(operation: str, *, x: Tensor, weight: Tensor, **others: Tensor | None) -> None:
    """Refuse what a kernel reading raw pointers would read or write out of bounds."""
    usable = x.is_cuda and x.dtype in DTYPE_CODES and x.is_contiguous()
    if not usable or x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"{operation}: x must be a contiguous CUDA tensor (..., width) of float32, float16 or bfloat16; "
            f"got {_describe(x)}"
        )
    for name, tensor in others.items():
        if tensor is None:
            continue
        same = tensor.shape == x.shape and tensor.dtype == x.dtype and tensor.device == x.device
        if not same or not tensor.is_contiguous():
            raise ValueError(f"{operation}: {name} must be like x, {_describe(x)}; got {_describe(tensor)}")
    fits = weight.shape == x.shape[-1:] and weight.device == x.device and weight.is_contiguous()
    if not fits or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{operation}: weight must be a contiguous ({x.shape[-1]},) tensor of {x.dtype} or torch.float32 "
            f"on {x.device}; got {_describe(weight)}"
        )


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}{layout}"
