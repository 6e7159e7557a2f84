"""Which of the known layouts a checkpoint directory has; refuses with what was looked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, CheckpointNotFoundError, OptionError
from .base import Layout
from .safetensors_store import INDEX_FILE, WEIGHTS_FILE
from .stats import read_json_object

LOOKED_FOR = (
    f"{WEIGHTS_FILE} or {INDEX_FILE} (openpi PyTorch; LeRobot when config.json has a `type`), "
    'or params/ (openpi Orbax, framework="jax")'
)


def _is_orbax(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("manifest.ocdbt", "_METADATA"))


def orbax_params(directory: Path) -> Path | None:
    """The Orbax parameter folder: `params/` of a checkpoint directory, or the directory itself."""
    if _is_orbax(directory / "params"):
        return directory / "params"
    return directory if _is_orbax(directory) else None


def detect_layout(path: Path, framework: str) -> Layout:
    """The layout of the checkpoint at `path`.

    Raises CheckpointNotFoundError when nothing is there, CheckpointError when there is nothing of a known
    layout, OptionError when the layout needs the other framework.
    """
    if framework not in ("torch", "jax"):
        raise OptionError(f'framework is {framework!r}: expected "torch" or "jax"')
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint directory. Looked for {LOOKED_FOR}. "
            "A random one to try things with: flashrt make-checkpoint --size tiny --out DIR"
        )
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a checkpoint directory, found a file; give the directory that holds it"
        )
    weights = (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()
    orbax = orbax_params(path)
    if framework == "jax":
        if orbax is None:
            hint = '; it holds safetensors, use framework="torch"' if weights else ""
            raise CheckpointNotFoundError(
                f"{path}: no Orbax parameters (params/_METADATA or manifest.ocdbt){hint}"
            )
        return "openpi-orbax"
    if not weights:
        if orbax is not None:
            raise CheckpointNotFoundError(
                f'{path}: an openpi Orbax checkpoint; use framework="jax" to read it'
            )
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointNotFoundError(f"{path}: no checkpoint here. Looked for {LOOKED_FOR}; found {found}")
    config = path / "config.json"
    if config.is_file() and "type" in read_json_object(config):
        return "lerobot"
    return "openpi-pytorch"
