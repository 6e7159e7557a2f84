"""openpi's JAX checkpoints: Orbax's params/ read with tensorstore, converted once to safetensors.

Orbax stores one zarr array per parameter, together in an OCDBT database (openpi's way) or in a folder each.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import cache_directory, content_digest
from ..errors import CheckpointError, OptionError
from ..progress import tracked
from .layout import detect_layout, orbax_params
from .orbax_names import parts_by_leaf, tensors_of
from .safetensors_store import WEIGHTS_FILE, SafetensorsStore, SafetensorsWriter, read_header
from .tokenizer import FAST_FOLDER, IN_CHECKPOINT

LOG = logging.getLogger(__name__)

# Raised when the conversion's output changes, so that caches of older versions are left alone.
CONVERSION_VERSION = 1
ARRAY_METADATA = (".zarray", "zarr.json")


def converted_store(path: Path, cache_dir: Path | None = None) -> SafetensorsStore:
    """The safetensors store of an Orbax checkpoint, converted now or found in the cache.

    The cache file is named after a digest of the checkpoint's content: a changed checkpoint is converted
    anew. Dtypes stay as stored. Host memory: the largest array, beyond the mapped output. Raises
    CheckpointError naming directory and array, OptionError when tensorstore is not installed.
    """
    params = orbax_params(path)
    if params is None:
        raise CheckpointError(f"{path}: no Orbax parameters here")
    cache = (cache_dir or cache_directory()) / "orbax"
    files = sorted(file for file in params.rglob("*") if file.is_file())
    digest = content_digest(files, remember=cache / "digests.json")
    target = cache / f"{digest[:32]}-v{CONVERSION_VERSION}" / "model.safetensors"
    if not target.is_file():
        started = time.perf_counter()
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(params, target)
        LOG.info("%s: converted to %s in %.1f s", params, target, time.perf_counter() - started)
    return SafetensorsStore(dict.fromkeys(read_header(target), target))


def convert_checkpoint(path: Path, out: Path) -> dict[str, int]:
    """An Orbax checkpoint directory, of any policy, as an openpi safetensors directory: weights, and what
    lies beside params/ (config.json, assets/, tokenizers). Returns the size of each file written, by name.

    Raises OptionError when `out` holds something, CheckpointError as `convert` and `detect_layout` do;
    nothing is left then.
    """
    detect_layout(path, framework="jax")
    params = orbax_params(path)
    assert params is not None  # or there would have been no layout
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} is not empty: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    convert(params, out / WEIGHTS_FILE)
    for name in ("config.json", "assets", FAST_FOLDER, *IN_CHECKPOINT):
        source = params.parent / name
        if source.is_dir():
            shutil.copytree(source, out / name)
        elif source.is_file():
            shutil.copy2(source, out / name)
    written = sorted(file for file in out.rglob("*") if file.is_file())
    return {file.relative_to(out).as_posix(): file.stat().st_size for file in written}


def convert(params: Path, target: Path) -> None:
    """Write every parameter of an Orbax folder to a safetensors file under openpi's PyTorch names."""
    arrays = {_leaf(name): (name, array) for name, array in open_arrays(params).items()}
    table = parts_by_leaf()
    unknown = sorted(set(arrays) - set(table))
    if unknown:
        raise CheckpointError(
            f"{params}: {len(unknown)} parameters are no part of pi0 or pi0.5, such as "
            f"{', '.join(unknown[:3])}; "
            "merge adapters before loading"
        )
    sizes = dict(_sizes(params, arrays, table))
    writer = SafetensorsWriter(target, sizes, {"format": "pt", "converted_from": "openpi-orbax"})
    try:
        for leaf, (name, array) in tracked(arrays.items(), len(arrays)):
            values = _read(params, name, array)
            for part in table[leaf]:
                for key, tensor in tensors_of(values, part):
                    writer.write(key, _as_torch(tensor))
    except BaseException:
        writer.abort()
        raise
    writer.finish()


def open_arrays(params: Path) -> dict[str, Any]:
    """Every array of an Orbax folder as an open tensorstore, by its stored name ("/" between levels).

    Raises CheckpointError for a damaged folder, OptionError without tensorstore.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise OptionError('framework="jax" needs tensorstore: pip install "flashrt-runtime[jax]"') from error
    ocdbt = (params / "manifest.ocdbt").is_file()
    base = (
        {"driver": "ocdbt", "base": f"file://{params}/"}
        if ocdbt
        else {"driver": "file", "path": f"{params}/"}
    )
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(base).result().list().result()]
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{params}: damaged Orbax folder: {_first_line(error)}") from error
    found = {}
    for key in sorted(keys):
        name, _, metadata = key.rpartition("/")
        if metadata not in ARRAY_METADATA:
            continue
        driver = "zarr" if metadata == ".zarray" else "zarr3"
        place = {**base, "path": f"{name}/" if ocdbt else f"{params}/{name}/"}
        try:
            found[name] = tensorstore.open({"driver": driver, "kvstore": place}).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{params}: parameter {name!r} cannot be opened: {_first_line(error)}"
            ) from error
    if not found:
        raise CheckpointError(f"{params}: no arrays in this Orbax folder")
    return found


def _leaf(name: str) -> str:
    """A stored name as openpi's table has it: "params.a.b.value" -> "a/b"."""
    leaf = name.replace(".", "/").removeprefix("params/")
    return leaf.removesuffix("/value")


def _sizes(
    params: Path, arrays: dict[str, tuple[str, Any]], table: dict[str, Any]
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Name, dtype and shape of every tensor to come, from shapes alone."""
    for leaf, (name, array) in arrays.items():
        dtype = getattr(torch, array.dtype.name, None)
        if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{params}: parameter {name!r} is stored as {array.dtype.name}, expected floats"
            )
        # a broadcast zero has the shape and no memory
        outline = np.broadcast_to(np.zeros((), np.int8), array.shape)
        for part in table[leaf]:
            try:
                for key, tensor in tensors_of(outline, part):
                    yield key, (dtype, tensor.shape)
            except (ValueError, IndexError) as error:
                raise CheckpointError(
                    f"{params}: parameter {name!r} has shape {tuple(array.shape)}, which openpi's {leaf} "
                    "cannot have"
                ) from error


def _read(params: Path, name: str, array: Any) -> NDArray[np.generic]:
    try:
        values: NDArray[np.generic] = array.read().result()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{params}: parameter {name!r} cannot be read: {_first_line(error)}") from error
    return values


def _as_torch(array: NDArray[np.generic]) -> torch.Tensor:
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.name == "bfloat16":
        return torch.from_numpy(contiguous.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(contiguous)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
