"""Which family rules a checkpoint follows: chosen from its layout and configuration, overridable one by one.

Sources: openpi `transforms.py`, `tokenizer.py`, `image_tools.py`; LeRobot `normalize_processor.py`,
`processor_pi05.py`, `processor_pi0.py`, `vla_utils.py` (0.6). Only the formulas are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from ..config import FamilyRules, NormalizationMode, PolicyName
from ..errors import OptionError


def openpi_rules(policy: PolicyName, state_in_prompt: bool | None = None) -> FamilyRules:
    """Rules of checkpoints trained with openpi.

    pi0 normalises by mean and standard deviation, every other policy by quantiles. Absent views are black
    pixels.
    """
    mode: NormalizationMode = "mean_std" if policy == "pi0" else "quantile"
    return FamilyRules(
        family="openpi",
        state_mode=mode,
        action_mode=mode,
        quantile_eps=1e-6,
        std_eps=1e-6,
        std_eps_inverse=1e-6,
        zero_range_eps=0.0,
        resize="antialias_uint8",
        clean_underscores=True,
        state_in_prompt=policy != "pi0" if state_in_prompt is None else state_in_prompt,
        accumulate_time=True,
        show_absent_views=policy == "pi0fast",
        lowercase=policy == "pi0fast",
        skip_position=policy == "pi0fast",
    )


def lerobot_rules(policy: PolicyName, eps: float = 1e-8) -> FamilyRules:
    """Rules of checkpoints trained with LeRobot; `eps` is the normaliser step's own setting.

    The normalisation modes are the policy's defaults here; the reader puts in what the checkpoint says.
    """
    mode: NormalizationMode = "quantile" if policy == "pi05" else "mean_std"
    return FamilyRules(
        family="lerobot",
        state_mode=mode,
        action_mode=mode,
        quantile_eps=0.0,
        std_eps=eps,
        std_eps_inverse=0.0,
        zero_range_eps=eps,
        resize="bilinear_float",
        clean_underscores=policy != "pi0",
        state_in_prompt=policy != "pi0",
        end_with_bos=policy == "pi0fast",
    )


def override_rules(rules: FamilyRules, changes: Mapping[str, object]) -> FamilyRules:
    """`rules` with single fields replaced. Raises OptionError for an unknown name or a value of another
    type."""
    hints = get_type_hints(FamilyRules)
    names = [entry.name for entry in fields(FamilyRules)]
    for name, value in changes.items():
        if name not in names:
            raise OptionError(f"unknown rule {name!r}: expected one of {', '.join(names)}")
        choices = get_args(hints[name])
        if choices and value not in choices:
            raise OptionError(f"rule {name!r} is {value!r}: expected one of {', '.join(map(repr, choices))}")
        if not choices and not _is_a(value, hints[name]):
            raise OptionError(f"rule {name!r} is {value!r}: expected a {hints[name].__name__}")
    return replace(rules, **changes)  # type: ignore[arg-type]


def parse_rules(assignments: Sequence[str]) -> dict[str, object]:
    """Overrides written as "name=value", for `override_rules`. Raises OptionError for anything else."""
    hints = get_type_hints(FamilyRules)
    changes: dict[str, object] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in hints:
            raise OptionError(f"rule {assignment!r}: expected name=value with a name of {', '.join(hints)}")
        try:
            changes[name] = _parsed(text, hints[name])
        except ValueError as error:
            raise OptionError(f"rule {assignment!r}: expected a {hints[name].__name__}") from error
    return changes


def _parsed(text: str, kind: Any) -> object:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return float(text) if kind is float else text


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)
