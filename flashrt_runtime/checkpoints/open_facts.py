"""What a checkpoint's files may leave open, as text that a user gives: on the command line, to the node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import OptionError
from .rules import parse_rules

TRUTH = {"true": True, "false": False}


def how_to_give(name: str) -> str:
    """For messages: where an argument of `load_model` is given."""
    option = name.replace("_", "-")
    return f"{name}= in Python, --{option} on the command line, parameter {name} of the node"


def given(
    asset_id: str | None = None,
    action_horizon: int | None = None,
    delta_actions: str | None = None,
    rules: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of `load_model` and `open_checkpoint`; what is None is left to the files.

    delta_actions: true or false for each action, separated by commas; rules: name=value each. Raises
    OptionError.
    """
    return {
        "asset_id": asset_id,
        "action_horizon": action_horizon,
        "delta_actions": None if delta_actions is None else parse_delta_actions(delta_actions),
        "rules": parse_rules(rules),
    }


def parse_delta_actions(text: str) -> tuple[bool, ...]:
    """ "true,true,false" as flags. Raises OptionError."""
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word in TRUTH for word in words):
        raise OptionError(
            f"delta_actions is {text!r}: expected true (an offset to the state) or false for each action, "
            "such as true,true,false"
        )
    return tuple(TRUTH[word] for word in words)
