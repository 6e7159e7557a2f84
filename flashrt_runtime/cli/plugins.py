"""Commands that other packages add to `flashrt`. The runtime imports none of them unless asked by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import typer

from ..errors import OptionError

# Name -> module with a function `command`, and one line of help where that module is not installed.
PLUGINS = {
    "replay": ("flashrt_ros.cli.replay", "Evaluate a policy offline on a bag (needs flashrt_ros)."),
}


def add_plugins(app: typer.Typer) -> None:
    """Add every command of PLUGINS; one whose package is not installed says so when it is called."""
    for name, (module, help_line) in PLUGINS.items():
        try:
            command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            settings = {"ignore_unknown_options": True, "allow_extra_args": True}
            missing = _missing(name, error.name or module)
            app.command(name, help=help_line, context_settings=settings, add_help_option=False)(missing)
        else:
            app.command(name)(command)


def _missing(name: str, module: str) -> Callable[[], Any]:
    def command() -> None:
        raise OptionError(
            f"`flashrt {name}` is part of the ROS package flashrt_ros, and {module} cannot be imported: "
            "build the workspace and source its setup script first"
        )

    return command
