"""The stages of our own model, recorded while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models import FlowPolicy
from .stages import Inputs, Stages


def capture(model: FlowPolicy, inputs: Inputs) -> Stages:
    """Run `model.sample_actions` on one observation and keep every stage.

    The model drops padding and masked views: its rows are put back where they belong, the others stay zero.
    Raises ObservationError when a shape does not fit.
    """
    inputs.check(model.config)
    device = model.cache.k.device
    tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in inputs.arrays().items()}
    record: dict[str, Any] = {"velocities": []}
    with ExitStack() as stack:
        stack.enter_context(_recorded_vision(model, record))
        stack.enter_context(_recorded(model.paligemma, "embed", record, "embeddings"))
        stack.enter_context(_recorded(model, "velocity", record, "velocities"))
        actions = model.sample_actions(**tensors)
    return _stages(model, inputs, record, actions)


@contextmanager
def _recorded(owner: Any, method: str, record: dict[str, Any], name: str) -> Iterator[None]:
    """Record what a method returns: appended where `record[name]` is a list, else stored."""
    original = getattr(owner, method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if isinstance(record.get(name), list):
            record[name].append(result.detach().clone())
        else:
            record[name] = result.detach().clone()
        return result

    object.__setattr__(owner, method, wrapper)
    try:
        yield
    finally:
        object.__delattr__(owner, method)


@contextmanager
def _recorded_vision(model: FlowPolicy, record: dict[str, Any]) -> Iterator[None]:
    """Record the output of the image encoder's final norm."""

    def keep(_module: object, _inputs: object, outputs: tuple[Tensor, Tensor]) -> None:
        record["vision"] = outputs[0].detach().clone()

    hook = model.paligemma.vision.norm.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _stages(model: FlowPolicy, inputs: Inputs, record: dict[str, Any], actions: Tensor) -> Stages:
    tokens = model.config.vision.tokens
    valid = np.concatenate([np.repeat(inputs.image_mask, tokens), inputs.token_mask])
    rows = int(valid.sum())
    caches = (_array(buffer[:, :rows]) for buffer in (model.cache.k, model.cache.v))
    keys, values = (np.moveaxis(_spread(np.moveaxis(cache, 1, 0), valid), 0, 1) for cache in caches)
    return Stages(
        vision=_spread(_array(record["vision"]), inputs.image_mask),
        valid=valid,
        prefix_embeddings=_spread(_array(record["embeddings"]), valid),
        keys=keys,
        values=values,
        velocities=np.stack([_array(velocity) for velocity in record["velocities"]]),
        actions=_array(actions),
    )


def _spread(rows: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """`rows` at the positions of `valid`, zero elsewhere."""
    out = np.zeros((len(valid), *rows.shape[1:]), dtype=np.float32)
    out[valid] = rows
    return out


def _array(tensor: Tensor) -> NDArray[np.float32]:
    result: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return result
