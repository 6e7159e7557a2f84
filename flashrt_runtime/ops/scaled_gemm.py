"""FP8 products through cuBLASLt with the algorithm that measured fastest, and GELU + quantisation in the
epilogue.

A shape is tuned once, where `tuning` is in force (an engine's warm-up); its choice is kept on disk by GPU
and library version. Shapes that were not tuned go through torch.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache import cache_directory, write_atomically
from . import native
from .reference import E4M3

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 32 << 20
ROTATED_BYTES = (
    192 << 20
)  # copies of the weights take turns while timing: they come from memory, as in a forward
LAUNCHES = 24
REPLAYS = 7


@dataclass(frozen=True)
class Shape:
    """What a plan is made for: out (m, n) = x (m, k) @ weight (n, k)^T."""

    m: int
    n: int
    k: int
    bias: bool
    gelu: bool
    quantised: bool

    @property
    def name(self) -> str:
        """A line of the tuning file."""
        flags = "".join(flag for flag in ("bias", "gelu", "quantised") if getattr(self, flag))
        return f"{self.m}x{self.n}x{self.k}{flags}"


@dataclass
class Plan:
    """A tuned shape."""

    matmul: Any
    algorithm: int


class Tuner:
    """The plans of this process and their choices on disk."""

    def __init__(self) -> None:
        self.plans: dict[Shape, Plan | None] = {}
        self.active = False
        self.workspaces: dict[torch.device, Tensor] = {}
        self.chosen: dict[str, int] | None = None
        self.changed = False

    def plan(self, shape: Shape, weight: Tensor) -> Plan | None:
        """The plan of a shape; None where there is none and none may be made now, or the library has no
        algorithm.
        """
        if shape not in self.plans and self.active and not torch.cuda.is_current_stream_capturing():
            self.plans[shape] = self._make(shape, weight)
        return self.plans.get(shape)

    def workspace(self, device: torch.device) -> Tensor:
        """Scratch memory of the library, one per device: an engine runs one product at a time."""
        if device not in self.workspaces:
            self.workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self.workspaces[device]

    def _make(self, shape: Shape, weight: Tensor) -> Plan | None:
        make = getattr(native.load(), "LtMatmul", None)
        if make is None:
            return None
        matmul = make(shape.m, shape.n, shape.k, shape.bias, shape.gelu, shape.quantised, WORKSPACE_BYTES)
        count = matmul.count()
        if count == 0:
            return None
        choices = self._choices(weight.device)
        if choices.get(shape.name, count) >= count:
            fastest = self._fastest(shape, matmul, count, weight)
            if fastest is None:
                return None
            choices[shape.name] = fastest
            self.changed = True
        return Plan(matmul, choices[shape.name])

    def _fastest(self, shape: Shape, matmul: Any, count: int, weight: Tensor) -> int | None:
        device = weight.device
        copies = max(1, min(LAUNCHES, ROTATED_BYTES // weight.numel()))
        weights = weight.unsqueeze(0).repeat(copies, 1, 1)
        x = torch.randn(shape.m, shape.k, device=device).to(E4M3)
        one = torch.ones((), dtype=torch.float32, device=device)
        bias = torch.zeros(shape.n, dtype=torch.bfloat16, device=device) if shape.bias else None
        out = torch.empty(shape.m, shape.n, dtype=E4M3 if shape.quantised else torch.bfloat16, device=device)
        times: list[tuple[float, int]] = []
        for algorithm in range(count):
            plan = Plan(matmul, algorithm)
            try:
                _run(plan, x, weights[0], one, one, bias, one, out)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for launch in range(LAUNCHES):
                        _run(plan, x, weights[launch % copies], one, one, bias, one, out)
            except RuntimeError as error:
                logger.debug("%s: algorithm %d not usable: %s", shape.name, algorithm, error)
                continue
            times.append((_replay_time(graph), algorithm))
        if not times:
            logger.info("%s: the library proposes %d algorithms and runs none", shape.name, count)
            return None
        best, first = min(times), times[0]
        if not _agrees(shape, Plan(matmul, best[1]), x, weight, bias):
            logger.warning(
                "%s: algorithm %d gives other numbers than torch and is not used", shape.name, best[1]
            )
            return None
        logger.debug("%s: algorithm %d, %.1f us (first %.1f)", shape.name, best[1], best[0], first[0])
        return best[1]

    def _file(self, device: torch.device) -> Path:
        name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
        return cache_directory() / "autotune" / f"{name}-cublaslt{native.load().lt_version()}.json"

    def _choices(self, device: torch.device) -> dict[str, int]:
        if self.chosen is None:
            try:
                stored = json.loads(self._file(device).read_text(encoding="utf-8"))
                self.chosen = {str(name): int(choice) for name, choice in stored.items()}
            except (OSError, ValueError, AttributeError):
                self.chosen = {}
        return self.chosen

    def keep(self, device: torch.device) -> None:
        """Write new choices; where that fails they are measured again next time."""
        if self.changed and self.chosen:
            try:
                write_atomically(
                    self._file(device), json.dumps(self.chosen, indent=1, sort_keys=True).encode()
                )
                self.changed = False
            except OSError as error:
                logger.warning("tuned products not kept: %s", error)


TUNER = Tuner()


@contextmanager
def tuning(device: torch.device) -> Iterator[None]:
    """Within it, shapes met for the first time are tuned."""
    TUNER.active = True
    try:
        yield
    finally:
        TUNER.active = False
        TUNER.keep(device)


def product(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    gelu: bool = False,
    inverse_out_scale: Tensor | None = None,
) -> Tensor | None:
    """x @ weight^T * scales + bias [, gelu] [, quantised]; None where the shape has no plan.

    x: (..., k) and weight: (n, k) e4m3 on one GPU; bias: (n,) bfloat16; inverse_out_scale: float32 scalar,
    1 / scale of e4m3 output. Returns (..., n) bfloat16 or e4m3.
    """
    n, k = weight.shape
    quantised = inverse_out_scale is not None
    plan = TUNER.plan(Shape(x.numel() // k, n, k, bias is not None, gelu, quantised), weight)
    if plan is None:
        return None
    out = torch.empty(*x.shape[:-1], n, dtype=E4M3 if quantised else torch.bfloat16, device=x.device)
    _run(plan, x, weight, x_scale, weight_scale, bias, inverse_out_scale, out)
    return out


def _run(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    inverse_out_scale: Tensor | None,
    out: Tensor,
) -> None:
    workspace = TUNER.workspace(x.device)
    plan.matmul.run(
        plan.algorithm,
        x.data_ptr(),
        weight.data_ptr(),
        x_scale.data_ptr(),
        weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if inverse_out_scale is None else inverse_out_scale.data_ptr(),
        out.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        torch.cuda.current_stream(x.device).cuda_stream,
    )


def _agrees(shape: Shape, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a plan computes what torch does on random input: rounding apart."""
    one = torch.ones((), dtype=torch.float32, device=weight.device)
    scale = one / shape.k**0.5 / 64
    out = torch.empty(
        shape.m, shape.n, dtype=E4M3 if shape.quantised else torch.bfloat16, device=weight.device
    )
    _run(plan, x, weight, scale, one, bias, one * 8, out)
    want = torch._scaled_mm(x, weight.t(), scale, one, bias=bias, out_dtype=torch.bfloat16).float()
    if shape.gelu:
        want = torch.nn.functional.gelu(want, approximate="tanh")
    got = out.float() / 8 if shape.quantised else out.float()
    return bool((got - want).norm() < (5e-2 if shape.quantised else 1e-2) * want.norm())


def _replay_time(graph: torch.cuda.CUDAGraph) -> float:
    """Median microseconds of one launch."""
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)
