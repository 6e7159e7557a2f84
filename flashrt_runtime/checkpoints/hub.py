"""Checkpoints named by a Hugging Face hub id, where `huggingface_hub` is installed."""

from __future__ import annotations

import logging
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError

LOG = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors", "assets/**", "*.model"]
# Names of error types, some of which are those of libraries that need not be installed.
UNREACHABLE = {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException", "Timeout"}


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` can only be an "owner/name" or a relative path of two parts.

    What is written as a path never is: ./a/b, ../a, ~/a, /a, a/b/, a/b/c, and any `Path`, which has lost how
    it was written.
    """
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def local_directory(name: str | Path) -> Path:
    """The directory `name` (~ is the home directory), or the hub's snapshot of that id, fetched when it is
    not cached. Nothing that exists here, or that is no hub id, is asked for over the network.

    Raises CheckpointNotFoundError when a hub id is no directory here, and the hub does not have it, cannot be
    reached, or `huggingface_hub` is not installed.
    """
    path = Path(os.path.expanduser(name))  # unlike Path's own, this leaves an unknown user's as it is
    if path.exists() or not is_hub_id(name):
        return path
    missing = f"{name}: no such checkpoint directory (in {Path.cwd()})"
    if find_spec("huggingface_hub") is None:
        raise CheckpointNotFoundError(f"{missing}; to have it fetched as a hub id, install huggingface_hub")
    hub: Any = import_module("huggingface_hub")
    LOG.info("%s: no such directory, asking the hub", name)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub's own types, of many versions
        said = _what_the_hub_said(error)
        raise CheckpointNotFoundError(f"{missing}, and as the hub id {name}: {said}") from error


def _what_the_hub_said(error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if UNREACHABLE & {kind.__name__ for kind in type(error).__mro__}:
        return f"the hub cannot be reached: {reason}"
    if getattr(error, "response", None) is not None:
        return f"the hub answered: {reason}"
    return f"it could not be fetched: {reason}"
