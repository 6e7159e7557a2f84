"""How far two runs of a policy are apart, stage by stage, and which stages exceed their bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import PolicyName
from .stages import AnyFloat, Stages

SIGN_FLOOR = 0.05  # a flip of anything smaller is no decision of the policy


@dataclass(frozen=True)
class Drift:
    """Differences of one stage. `theirs` is the yardstick.

    max_abs: largest |ours - theirs|; relative_l2: |ours - theirs|_2 / |theirs|_2; cosine: of the flattened
    stages; worst_dimension: index along the last axis where max_abs occurs; sign_flips: values with
    |theirs| > 0.05 and another sign in ours.
    """

    stage: str
    kind: str
    max_abs: float
    relative_l2: float
    cosine: float
    worst_dimension: int
    sign_flips: int


@dataclass(frozen=True)
class Gates:
    """Bounds; None bounds nothing.

    actions_max_abs, actions_relative_l2, actions_sign_flips: on the actions; relative_l2: on every other
    stage but the velocities after t = 1, which also see how far x has drifted.
    """

    actions_max_abs: float | None = None
    actions_relative_l2: float | None = None
    actions_sign_flips: int | None = 0
    relative_l2: float | None = None

    def failures(self, drifts: Sequence[Drift]) -> list[str]:
        """One sentence per exceeded bound, in the order of the stages. NaN exceeds any bound."""
        return [sentence for drift in drifts for sentence in self._failures_of(drift)]

    def _failures_of(self, drift: Drift) -> Iterator[str]:
        bounds: tuple[tuple[str, float, float | None], ...] = (
            ("relative L2", drift.relative_l2, self.relative_l2),
        )
        if drift.kind == "actions":
            bounds = (
                ("max-abs", drift.max_abs, self.actions_max_abs),
                ("relative L2", drift.relative_l2, self.actions_relative_l2),
                ("sign flips", drift.sign_flips, self.actions_sign_flips),
            )
        elif drift.kind == "later velocity":
            bounds = ()
        for name, value, bound in bounds:
            if bound is not None and not value <= bound:
                yield f"{drift.stage}: {name} {value:.3g} exceeds {bound:g}"


def default_gates(policy: PolicyName, precision: str, against: str) -> Gates:
    """The project's bounds: fp32 by implementation, reduced precisions by what their rounding costs."""
    if precision != "fp32":
        return Gates(actions_max_abs=0.03, actions_relative_l2=1e-2)
    max_abs = 5e-5 if policy == "pi05" else 5e-4
    return Gates(max_abs, 2e-6 if against == "reference" else None, 0, 1e-5)


def compare(ours: Stages, theirs: Stages) -> list[Drift]:
    """Every stage's drift over the positions that are attended to. Raises ValueError when shapes differ."""
    valid = ours.valid
    if not np.array_equal(valid, theirs.valid):
        raise ValueError("the two runs attend to different prefix positions: their inputs differ")
    views, tokens = ours.vision.shape[:2]
    present = valid[: views * tokens].reshape(views, tokens).any(axis=1)
    found = [
        measure("vision", "vision", ours.vision[present], theirs.vision[present]),
        measure(
            "prefix embeddings", "prefix", ours.prefix_embeddings[valid], theirs.prefix_embeddings[valid]
        ),
    ]
    for layer in range(len(ours.keys)):
        for name, mine, other in (("K", ours.keys, theirs.keys), ("V", ours.values, theirs.values)):
            found.append(measure(f"{name}, layer {layer}", "prefix", mine[layer, valid], other[layer, valid]))
    steps = len(ours.velocities)
    for step, (mine, other) in enumerate(zip(ours.velocities, theirs.velocities, strict=True)):
        kind = "later velocity" if step else "velocity"
        found.append(measure(f"v at t = {1 - step / steps:.3g}", kind, mine, other))
    found.append(measure("actions", "actions", ours.actions, theirs.actions))
    return found


def measure(stage: str, kind: str, ours: AnyFloat, theirs: AnyFloat) -> Drift:
    """The drift of one stage. Raises ValueError when the shapes differ."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{stage}: shapes differ: ours {ours.shape}, theirs {theirs.shape}")
    mine, other = ours.astype(np.float64), theirs.astype(np.float64)
    if not mine.size:  # every view masked: nothing to compare
        return Drift(stage, kind, 0.0, 0.0, 1.0, 0, 0)
    difference = np.abs(mine - other)
    per_dimension = difference.reshape(-1, difference.shape[-1]).max(axis=0)
    flips = (np.abs(other) > SIGN_FLOOR) & (np.sign(mine) != np.sign(other))
    tiny = float(np.finfo(np.float64).tiny)
    return Drift(
        stage=stage,
        kind=kind,
        max_abs=float(difference.max()),
        relative_l2=_norm(difference) / max(_norm(other), tiny),
        cosine=float((mine * other).sum() / max(_norm(mine) * _norm(other), tiny)),
        worst_dimension=int(per_dimension.argmax()),
        sign_flips=int(flips.sum()),
    )


def _norm(x: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(x.ravel()))
