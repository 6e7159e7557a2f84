"""Quantised weights on disk, so that a second load reads a quarter of the bytes and quantises nothing.

A file is named by everything its content depends on: the checkpoint's content digest, the policy's
configuration, the precision, this package's version and the format below. Another fine-tune of the same
architecture has another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..cache import cache_directory, content_digest, put_in_place, remove_abandoned
from ..checkpoints.base import Checkpoint
from .fp8 import Fp8Linear

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT_FILES = 3
UNFINISHED = (".*.part", ".tmp*")  # ours, and those that safetensors makes of them


def cache_key(digest: str, config: object, precision: str, version: str = __version__) -> str:
    """Name of a checkpoint's quantised weights; config: a `PolicyConfig`."""
    settings = asdict(config)  # type: ignore[call-overload]
    for unrelated in ("horizon", "num_steps", "prompt_capacity"):  # no weight depends on these
        settings.pop(unrelated, None)
    content = {
        "digest": digest,
        "config": settings,
        "precision": precision,
        "version": version,
        "format": FORMAT,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class WeightCache:
    """The cached file of one checkpoint and precision."""

    def __init__(self, checkpoint: Checkpoint, precision: str, directory: Path | None = None) -> None:
        root = cache_directory() if directory is None else directory
        digest = content_digest(checkpoint.store.files, root / "digests.json")
        self.path = root / "weights" / f"{cache_key(digest, checkpoint.config, precision)}.safetensors"

    def load(self, model: nn.Module, device: torch.device) -> bool:
        """Fill the model from the file; False where there is none, or none that fits."""
        if not self.path.is_file():
            return False
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                names = set(file.keys())
                wanted = _tensors(model)
                if names != set(wanted):
                    raise ValueError(f"{len(names ^ set(wanted))} tensors too many or missing")
                for name in wanted:
                    _put(model, name, file.get_tensor(name))
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("%s: not usable and made again: %s", self.path, error)
            return False
        with contextlib.suppress(OSError):  # only keeps it from being pruned first
            os.utime(self.path)
        return True

    def save(self, model: nn.Module) -> None:
        """Write the model's weights; a full or read-only disk is a warning, since they can be made again.

        What killed writers left behind, gigabytes each, is removed first once it is an hour old.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path.parent, *UNFINISHED)
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model).items()},
                temporary,
            )
            put_in_place(temporary, self.path)  # nobody checks its bytes again
        except (OSError, SafetensorError) as error:
            logger.warning("%s: quantised weights not kept: %s", self.path, error)
        finally:
            with contextlib.suppress(OSError):  # a read-only disk refuses that too
                temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process prunes too
            self._prune()

    def _prune(self) -> None:
        """Keep the files used last."""
        files = sorted(self.path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in files[:-KEPT_FILES]:
            file.unlink(missing_ok=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            tensors[f"{name}.weight_scale"] = module.weight_scale
    return tensors


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    declared = getattr(owner, attribute)
    if declared.shape != tensor.shape or declared.dtype != tensor.dtype:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(declared.shape)}")
    if isinstance(owner, Fp8Linear) and attribute == "weight":
        owner.set_quantised(tensor, torch.zeros((), dtype=torch.float32, device=tensor.device))
    elif isinstance(owner, Fp8Linear) and attribute == "weight_scale":
        owner.weight_scale = tensor
    else:
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
