"""Cases of real-time chunking that LeRobot's RTCProcessor and ours are run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from parity_cases import Case
from parity_formula import uniform

SCHEDULES = ("zeros", "ones", "linear", "exp")
MASKS = [(delay, end, total) for total in (10, 50) for delay in (0, 1, 3, 10) for end in (0, 3, 8, 10, 60)]


@dataclass(frozen=True)
class RtcCase:
    """One guided integration. plan: rows of the plan; end: execution horizon; weight: largest gain.

    model: the policy whose velocity is integrated; None: the synthetic `field`.
    """

    schedule: str
    delay: int = 3
    end: int = 8
    plan: int = 10
    steps: int = 10
    weight: float = 10.0
    horizon: int = 10
    width: int = 32
    model: Case | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique and readable."""
        parts = [self.schedule, f"d{self.delay}", f"e{self.end}", f"p{self.plan}", f"n{self.steps}"]
        parts += [f"b{self.weight:g}", f"h{self.horizon}", f"s{self.seed}"]
        return "-".join(["field" if self.model is None else self.model.name, *parts])

    def target(self) -> np.ndarray:
        """The plan in model space: (plan, width) float32."""
        return self._draw("rtc plan", (self.plan, self.width), 1.5)

    def noise(self) -> np.ndarray:
        """(horizon, width) float32: the flow's start."""
        return self._draw("rtc noise", (self.horizon, self.width), 2.0)

    def field(self) -> tuple[np.ndarray, np.ndarray]:
        """M (width, width) and b (width,) of the synthetic velocity tanh(x M + t b), float32."""
        return self._draw("rtc m", (self.width, self.width), 0.4), self._draw("rtc b", (self.width,), 1.0)

    def _draw(self, name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
        values = uniform(name, int(np.prod(shape)), self.seed).reshape(shape) * 2.0 - 1.0
        return (scale * values).astype(np.float32)


def _fields() -> list[RtcCase]:
    cases = []
    for index, schedule in enumerate(SCHEDULES):
        base = RtcCase(schedule, seed=index)
        cases += [
            base,
            replace(base, delay=0, steps=4),
            replace(base, delay=5, end=25, plan=40, horizon=50),
            replace(base, delay=2, end=10, plan=6, weight=5.0),  # a plan shorter than its horizon
            replace(base, delay=7, end=4, steps=1, weight=1.0),  # a delay beyond the horizon
        ]
    return cases


def _models() -> list[RtcCase]:
    cases = []
    for policy in ("pi05", "pi0"):
        model = Case(policy, text=20, horizon=10, steps=10, seed=6)
        cases += [RtcCase(schedule, delay=2, end=9, plan=9, model=model, seed=7) for schedule in SCHEDULES]
    return cases


FIELDS, MODELS = _fields(), _models()
assert len({case.name for case in (*FIELDS, *MODELS)}) == len(FIELDS) + len(MODELS)
