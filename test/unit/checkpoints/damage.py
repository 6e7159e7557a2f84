"""Ways to change a checkpoint on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a JSON object through `change`."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Rewrite model.safetensors through `change`."""
    file = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def shard(directory: Path, count: int) -> None:
    """Split model.safetensors into `count` shards and an index."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    weight_map = {}
    for index in range(count):
        name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key].clone() for key in sorted(tensors)[index::count]}
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()
