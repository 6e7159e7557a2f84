"""Does this checkpoint fit this robot? Compared once at configure; every disagreement is one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from .contract_model import RobotContract
from .contract_yaml import YamlPath
from .errors import PolicyMismatchError
from .timing import NS_PER_S, to_s

RATE_TOLERANCE = 0.01  # relative; separates 30 from 29.97 Hz recordings' rounding, not from 25 or 50 Hz


class PolicySpecLike(Protocol):
    """What a loaded policy says about itself (flashrt_runtime.PolicySpec), duck-typed.

    Optional: action_representation (None: unsaid; without the attribute: absolute) and optional_views.
    """

    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def state_dim(self) -> int | None: ...
    @property
    def action_dim(self) -> int | None: ...
    @property
    def state_names(self) -> tuple[str, ...] | None: ...
    @property
    def action_names(self) -> tuple[str, ...] | None: ...
    @property
    def action_rate_hz(self) -> float | None: ...
    @property
    def checkpoint(self) -> str: ...


def check_policy(contract: RobotContract, spec: PolicySpecLike) -> None:
    """Compare views, state and action widths, names, representation and rate where the checkpoint has them.

    Raises PolicyMismatchError with one `file:line: text` per disagreement.
    """
    problems = [
        contract.source.problem(path, f"{text} (checkpoint {spec.checkpoint})")
        for path, text in _disagreements(contract, spec)
    ]
    if problems:
        raise PolicyMismatchError(sorted(problems, key=lambda problem: problem.line))


def _disagreements(contract: RobotContract, spec: PolicySpecLike) -> Iterator[tuple[YamlPath, str]]:
    yield from _check_views(contract, spec)
    state_path: YamlPath = ("state", "joints") if len(contract.state.sources) == 1 else ("state",)
    state_names = [name for source in contract.state.sources for name in source.joints]
    yield from _check_vector(contract, "state", state_path, state_names, spec.state_dim, spec.state_names)
    yield from _check_vector(
        contract, "action", ("action", "joints"), contract.action.joints, spec.action_dim, spec.action_names
    )
    ours, theirs = str(contract.action.representation), getattr(spec, "action_representation", "absolute")
    if theirs is not None and ours != theirs:
        yield ("action", "representation"), f"action.representation is {ours}, the checkpoint's is {theirs}"
    rate, policy_rate = NS_PER_S / contract.action.period, spec.action_rate_hz
    if policy_rate is not None and abs(rate - policy_rate) > RATE_TOLERANCE * policy_rate:
        period = to_s(contract.action.period)
        text = f"action.period {period:g} s is {rate:.4g} Hz, the checkpoint's actions {policy_rate:.4g} Hz"
        yield ("action", "period"), text


def _check_views(contract: RobotContract, spec: PolicySpecLike) -> Iterator[tuple[YamlPath, str]]:
    wanted = ", ".join(spec.views)
    served = {stream.view: stream for stream in contract.image_streams}
    maskable: Sequence[str] = getattr(spec, "optional_views", ())
    for view in spec.views:
        stream = served.get(view)
        if stream is None:
            have = ", ".join(contract.views)
            yield ("streams",), f"no stream serves the checkpoint's view {view}; the contract has {have}"
        elif stream.optional and view not in maskable:
            text = f"stream {stream.name} is optional, but the checkpoint needs its view {view} every time"
            yield ("streams", stream.name, "optional"), text
    for stream in contract.image_streams:
        if stream.view not in spec.views:
            text = f"view {stream.view} is not among the checkpoint's ({wanted}): rename or remove the stream"
            yield ("streams", stream.name, "view"), text


def _check_vector(
    contract: RobotContract, what: str, path: YamlPath, names: Sequence[str], width: int | None,
    policy_names: Sequence[str] | None,
) -> Iterator[tuple[YamlPath, str]]:
    if width is None:
        yield path, f"the checkpoint has no statistics of its {what} (norm_stats), so its width is unknown"
        return
    if len(names) != width:
        have = f"{what} has {len(names)} joints ({', '.join(names)})"
        yield path, f"{have}, the checkpoint's {what} has width {width}"
        return
    if policy_names is None:
        return
    ours = [contract.joints[name].policy_name for name in names]
    pairs = zip(ours, policy_names, strict=False)
    wrong = [index for index, (mine, theirs) in enumerate(pairs) if mine != theirs]
    if wrong or len(policy_names) != width:
        first = f", first at index {wrong[0]}" if wrong else ""
        text = f"{what} joints are {', '.join(ours)}; the checkpoint's are {', '.join(policy_names)}{first}"
        yield path, f"{text}: put them in that order, or give joints a policy_name"
