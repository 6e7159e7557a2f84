"""Rounding a weight to e4m3 so that its errors cancel in what the projection gives.

Nearest rounding keeps each weight's own error small. What counts is the error behind the product,
E |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T) with H = E[x x^T], the second moments of the projection's input.
With H = U D U^T, U unit upper triangular and D diagonal, that is sum_k D_k |((W - Q) U)_k|^2, and column k of
(W - Q) U is w_k - q_k + sum_{j<k} U_jk (w_j - q_j). So columns are rounded one after the other: q_k is the
nearest value to w_k + sum_{j<k} U_jk (w_j - q_j), which takes up what the columns before it left. This is the
rule of GPTQ (Frantar et al., arXiv:2210.17323) in the form without an inverse (LDLQ, Chee et al.,
arXiv:2307.13304). H is damped by a share of its mean diagonal: it is known from few observations, and errors
pushed into directions that those do not show would come back with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .. import ops
from ..errors import CalibrationError
from .fp8 import Fp8Linear

BLOCK = 128  # columns whose errors are spread at once over all that follow
DAMPING = 0.1  # of the mean diagonal
MOST_DAMPING = 10.0


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    """Each value of weight: (out, in) float32 by itself; scale: float32 scalar. Returns (out, in) e4m3."""
    return ops.quantise(weight, scale)


def output_error(weight: Tensor, rounded: Tensor, scale: Tensor, moments: Tensor) -> float:
    """rms of (W - Q) x over rms of W x, for inputs of these second moments; 0 where W x is."""
    difference = weight - rounded.float() * scale
    error, size = (float((each @ moments).mul_(each).sum().clamp_min(0)) for each in (difference, weight))
    return (error / size) ** 0.5 if size > 0 else 0.0


class Rounder:
    """Rounds weights; what it has captured for a number of rows serves the next weight of as many."""

    def __init__(self, damping: float = DAMPING) -> None:
        self.damping = damping
        self._blocks: dict[tuple[int, torch.device], _Block] = {}

    @torch.inference_mode()
    def __call__(self, weight: Tensor, scale: Tensor, moments: Tensor, name: str = "weights") -> Tensor:
        """weight: (out, in) float32; scale: float32 scalar, of value = e4m3 * scale; moments: (in, in)
        float32, symmetric, of what the projection sees, singular or not. Returns (out, in) e4m3.

        The rounding that gives the smaller error by `moments`, this one or the nearest: where nothing was
        seen, the nearest. Columns go by decreasing moment, so that what is left falls on inputs that are
        small. Raises CalibrationError, with the name, for moments that are not finite. `rounding_memory`
        says what it needs.
        """
        plain = nearest(weight, scale)
        diagonal = moments.diagonal()
        if not bool(torch.isfinite(diagonal.sum())):
            raise CalibrationError(f"{name}: cannot be rounded by inputs that are not finite")
        if not bool(diagonal.any()):
            return plain
        order = diagonal.argsort(descending=True, stable=True)
        factor = feedback(moments, order, self.damping)
        if factor is None:
            return plain
        columns = (weight * scale.reciprocal()).T[order].contiguous()
        found = self._rounded(columns, factor).view(torch.uint8)
        rounded = found[order.argsort()].T.contiguous().view(ops.E4M3)
        better = output_error(weight, rounded, scale, moments) < output_error(weight, plain, scale, moments)
        return rounded if better else plain

    def clear(self) -> None:
        """Give back what was captured."""
        self._blocks.clear()

    def _rounded(self, columns: Tensor, factor: Tensor) -> Tensor:
        """columns: (in, out) float32 in units of the scale; factor: `feedback`'s. Returns (in, out) e4m3."""
        width, rows = columns.shape
        key = rows, columns.device
        block = self._blocks.get(key) or self._blocks.setdefault(key, _Block(rows, columns.device))
        errors, found = torch.empty_like(columns), torch.empty_like(columns, dtype=ops.E4M3)
        for start in range(0, width, BLOCK):
            part = slice(start, min(start + BLOCK, width))
            target = columns[part]
            if start:
                target = torch.addmm(target, factor[:start, part].T, errors[:start])
            found[part], errors[part] = block(columns[part], target, factor[part, part])
        return found


def feedback(moments: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """The unit upper triangular U of moments + damping * mean diagonal = U D U^T: (in, in) float32.

    order: (in,) int64, of the columns. Damped more, up to ten times the mean, where rounding errors make it
    indefinite; None if that fails too. Two matrices of that size, beside the moments, are held at once.
    """
    mean = moments.diagonal().mean()
    backwards = order.flip(0)
    while damping <= MOST_DAMPING:
        # reversed in both directions, the lower triangular factor that libraries have is an upper one
        damped = moments[backwards[:, None], backwards]
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed):
            upper: Tensor = lower.flip(0, 1)
            del lower
            return upper.div_(upper.diagonal().clone())
        damping *= 10
    return None


def rounding_memory(rows: int, width: int) -> int:
    """Bytes that rounding a weight of (rows, width) takes at most beside its moments: five matrices as large
    as those (an H100's library with its workspaces), and six as large as the float32 weight.
    """
    return 20 * width**2 + 24 * rows * width


class _Block:
    """Up to 128 columns one after the other; on a GPU one graph, since a column is a few small kernels."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.columns, self.target, self.errors = (torch.zeros(BLOCK, rows, device=device) for _ in range(3))
        self.factor = torch.zeros(BLOCK, BLOCK, device=device)
        self.found = torch.zeros(BLOCK, rows, dtype=ops.E4M3, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # libraries allocate their workspaces outside the capture
                self._run(BLOCK)
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                self._run(BLOCK)

    def __call__(self, columns: Tensor, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """columns, target: (n, rows) float32, target with the errors of earlier blocks; factor: (n, n).
        Returns (n, rows) e4m3 and the errors, until the next call.
        """
        count = columns.shape[0]
        self.columns[:count], self.target[:count] = columns, target
        self.factor[:count, :count] = factor.T
        if self.graph is None:
            self._run(count)
        else:  # rows beyond `count` hold what was there, and nothing reads them
            self.graph.replay()
        return self.found[:count], self.errors[:count]

    def _run(self, count: int) -> None:
        for index in range(count):
            target = self.target[index]
            if index:
                target = torch.addmv(target, self.errors[:index].T, self.factor[index, :index])
            value = target.clamp(-ops.E4M3_MAX, ops.E4M3_MAX).to(ops.E4M3)
            self.found[index] = value
            torch.sub(self.columns[index], value.float(), out=self.errors[index])


class SecondMoments:
    """H = X^T X / n of the inputs of projections, (in, in) float32 each, over all that passes through."""

    def __init__(self, linears: Mapping[str, Fp8Linear]) -> None:
        self._sums = {
            name: torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
            for name, linear in linears.items()
        }
        self._rows = dict.fromkeys(self._sums, 0)

    @torch.inference_mode()
    def add(self, name: str, x: Tensor) -> None:
        """x: (..., in) floating, what the projection `name` takes."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._sums[name].addmm_(rows.T, rows)
        self._rows[name] += rows.shape[0]

    def clear(self) -> None:
        """Give their memory back."""
        self._sums.clear()

    @torch.inference_mode()
    def take(self, name: str) -> Tensor:
        """The moments of one projection, zeros where it saw nothing; its memory is the caller's."""
        return self._sums.pop(name).div_(max(self._rows[name], 1))


def moments_memory(linear: Fp8Linear) -> int:
    """Bytes of the moments of one projection."""
    return 4 * linear.in_features**2


def within_memory(linears: Mapping[str, Fp8Linear], limit: int) -> Iterator[dict[str, Fp8Linear]]:
    """The projections in groups whose moments take up to `limit` bytes, in their order; one at least each."""
    group: dict[str, Fp8Linear] = {}
    used = 0
    for name, linear in linears.items():
        size = moments_memory(linear)
        if group and used + size > limit:
            yield group
            group, used = {}, 0
        group[name] = linear
        used += size
    if group:
        yield group
