"""Quantised weights on disk, so that a second load reads a quarter of the bytes and quantises nothing.

A file is named by everything its content depends on: the checkpoint's content digest, the policy's
configuration, the precision, this package's version and the format below. Another fine-tune of the same
architecture has another name. Behind that stands the digest of its own bytes, every one of which is read
again when it is loaded: a robot loses its power, and a block of zeros has the shape of weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import __version__
from ..cache import cache_directory, content_digest, remove_abandoned
from ..checkpoints.base import Checkpoint
from . import tensor_files
from .fp8 import Fp8Linear

logger = logging.getLogger(__name__)

FORMAT = 2
KEPT_FILES = 3
SUFFIX = ".safetensors"
UNFINISHED = (".*.part", ".tmp*")  # ours, and those that safetensors made of them in format 1


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
        self.folder, self.key = root / "weights", cache_key(digest, checkpoint.config, precision)

    def files(self) -> list[Path]:
        """Those of this key, the newest first."""
        return sorted(self.folder.glob(f"{self.key}.*{SUFFIX}"), key=_last_use, reverse=True)

    def load(self, model: nn.Module, device: torch.device) -> Path | None:
        """Fill the model from the file; which it was, None where there is none, or none that fits."""
        for path in self.files():
            try:
                # side by side, for both take a second where the pages are in memory
                with ThreadPoolExecutor(1) as pool:
                    whole = pool.submit(tensor_files.holds_what_its_name_says, path, SUFFIX)
                    _fill(model, path, device)
                    if not whole.result():
                        raise ValueError("its bytes are not those that were written")
            except (SafetensorError, OSError, ValueError) as error:
                logger.warning("%s: not usable and made again: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # only keeps it from being pruned first
                os.utime(path)
            return path
        return None

    def save(self, model: nn.Module) -> None:
        """Write the model's weights; a full or read-only disk is a warning, since they can be made again.

        What killed writers left behind, gigabytes each, is removed first once it is an hour old.
        """
        try:
            remove_abandoned(self.folder, *UNFINISHED)
            path, _, _ = tensor_files.write(self.folder, self.key, SUFFIX, _tensors(model))
        except OSError as error:
            logger.warning("%s: quantised weights not kept: %s", self.folder / self.key, error)
            return
        with contextlib.suppress(OSError):  # another process prunes too
            os.utime(path)  # it may have been there, unused for long
            self._prune()

    def _prune(self) -> None:
        """Keep the files used last."""
        for file in sorted(self.folder.glob(f"*{SUFFIX}"), key=_last_use)[:-KEPT_FILES]:
            file.unlink(missing_ok=True)


def _last_use(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # pruned by another process meanwhile
        return 0.0


def _fill(model: nn.Module, path: Path, device: torch.device) -> None:
    """Raises ValueError for a file of other tensors."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        names, wanted = set(file.keys()), _tensors(model)
        if names != set(wanted):
            raise ValueError(f"{len(names ^ set(wanted))} tensors too many or missing")
        for name in wanted:  # in order: a weight comes before its scale, which it resets
            _put(model, name, file.get_tensor(name))


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
