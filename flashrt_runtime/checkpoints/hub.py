"""Checkpoints named by a Hugging Face hub id, where `huggingface_hub` is installed."""

from __future__ import annotations

import logging
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CheckpointNotFoundError

LOG = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors", "assets/**", "*.model"]


def local_directory(path: Path) -> Path:
    """`path` if it exists or is no hub id, else the hub's snapshot of that id, fetched when it is not cached.

    Raises CheckpointNotFoundError when the hub does not have it or cannot be reached.
    """
    name = path.as_posix()
    if path.exists() or not HUB_ID.fullmatch(name) or find_spec("huggingface_hub") is None:
        return path
    hub: Any = import_module("huggingface_hub")
    LOG.info("%s: no such directory, asking the hub", name)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub's own types, of many versions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointNotFoundError(
            f"{name}: no such directory, and the hub does not give it: {reason}"
        ) from error
