"""Random checkpoints in openpi's safetensors layout, of any size, for tests, demos and benchmarks.

A weight is a pure function of (key, shape, seed), so two machines make the same file without exchanging it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoints.architecture import (
    EMBEDDING_KEY,
    GEMMA_DUMMY,
    LANGUAGE,
    LM_HEAD_KEY,
    VISION,
    parameter_shapes,
    unused_shapes,
)
from ..checkpoints.presets import Preset, band, preset_named
from ..checkpoints.safetensors_store import WEIGHTS_FILE, SafetensorsWriter
from ..checkpoints.stats import read_json_object
from ..checkpoints.tokenizer import FAST_FOLDER, train_tokenizer
from ..config import (
    GEMMA_2B,
    GEMMA_300M,
    NO_DECODING,
    PALIGEMMA_VOCAB_SIZE,
    PROMPT_CAPACITY,
    SIGLIP_SO400M,
    DecodeConfig,
    GemmaConfig,
    PolicyConfig,
    PolicyName,
    SiglipConfig,
)
from ..errors import OptionError
from ..progress import tracked
from .neutral import neutral_actions
from .scripted import FAST_VOCABULARY, QUIET, built_head, script_of, states_behind, write_processor

CHUNK = 1 << 22
QUERY_SCALE = 4.0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Dimensions of a random checkpoint, and the vocabulary of the tokenizer trained for it."""

    vision: SiglipConfig
    prefix: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    tokenizer_vocab: int
    dtype: str


SIZES = {
    "tiny": Size(
        vision=SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=4, image_size=224),
        prefix=GEMMA_DUMMY,
        expert=GEMMA_DUMMY,
        vocab_size=512,
        tokenizer_vocab=512,
        dtype="float32",
    ),
    "small": Size(
        vision=SiglipConfig(width=384, depth=6, mlp_dim=1536, num_heads=6, image_size=224),
        prefix=GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
        expert=GemmaConfig(width=256, depth=6, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
        vocab_size=1024,
        tokenizer_vocab=512,
        dtype="float32",
    ),
    "full": Size(
        vision=SIGLIP_SO400M,
        prefix=GEMMA_2B,
        expert=GEMMA_300M,
        vocab_size=PALIGEMMA_VOCAB_SIZE,
        tokenizer_vocab=512,
        dtype="bfloat16",
    ),
}


def weight_scale(key: str, shape: tuple[int, ...], query_scale: float) -> tuple[float, float]:
    """(offset, scale) of a tensor's normal draw.

    Linear weights keep a unit variance through the layer. adaRMS weights are drawn too: a network whose
    modulation is zero, as some initialisers leave it, passes every test of it. Queries are scaled up so that
    attention is peaked and a wrong mask or position shows.
    """
    if key.endswith("dense.weight"):
        return 0.0, 0.3 / np.sqrt(shape[1])
    if key.endswith("dense.bias"):
        return 0.0, 0.3
    if "norm" in key and key.endswith("weight"):
        layer_norm = "layer_norm" in key or "post_layernorm" in key
        return (1.0 if layer_norm else 0.0), 0.1
    if key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.0, 0.1 / np.sqrt(shape[1])
    if key.endswith(("position_embedding.weight", "bias")):
        return 0.0, 0.02
    scale = 1.0 / np.sqrt(prod(shape[1:]))
    queries = key.endswith("self_attn.q_proj.weight") and not key.startswith(VISION)
    return 0.0, scale * query_scale if queries else scale


def weight_chunks(
    key: str, shape: tuple[int, ...], seed: int, query_scale: float = QUERY_SCALE, chunk: int = CHUNK
) -> Iterator[NDArray[np.float32]]:
    """The tensor's values in row-major order, in pieces of at most `chunk`; the same whatever `chunk` is.

    Generator: PCG64 seeded by (seed, crc32 of "model." + key), the scheme of this project's parity oracles.
    """
    if key == LM_HEAD_KEY:
        key = EMBEDDING_KEY
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(f"model.{key}".encode())]))
    offset, scale = weight_scale(key, shape, query_scale)
    remaining = prod(shape)
    while remaining:
        count = min(chunk, remaining)
        values = generator.standard_normal(size=count, dtype=np.float32)
        values *= np.float32(scale)
        if offset:
            values += np.float32(offset)
        yield values
        remaining -= count


def draw_weight(
    key: str, shape: tuple[int, ...], seed: int = 0, query_scale: float = QUERY_SCALE
) -> NDArray[np.float32]:
    """One tensor as a float32 array."""
    return np.concatenate(list(weight_chunks(key, shape, seed, query_scale))).reshape(shape)


def storage_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """openpi's bfloat16 files keep norms of the language stacks, embeddings of patches and positions, and the
    action projections in float32; other dtypes are uniform."""
    if dtype != torch.bfloat16:
        return dtype
    in_float32 = (
        not key.startswith("paligemma_with_expert.")
        or key.startswith(f"{VISION}embeddings.")
        or (not key.startswith(VISION) and "layernorm" in key)
        or ".norm." in key
    )
    return torch.float32 if in_float32 else dtype


def write_weights(
    path: Path,
    config: PolicyConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    query_scale: float = QUERY_SCALE,
    scales: Mapping[str, float] | None = None,
    heads: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Write every tensor of openpi's layout to `path`, one chunk in memory per thread.

    scales: further factors by canonical key, see `presets.Motion`. heads: tensors that are not drawn.
    """
    heads = heads or {}
    shapes = {
        (LM_HEAD_KEY if key == EMBEDDING_KEY and LM_HEAD_KEY not in heads else key): shape
        for key, shape in parameter_shapes(config).items()
    }
    shapes |= unused_shapes(config)
    factors = _factors(shapes, scales or {})
    tensors = {key: (storage_dtype(key, dtype), shape) for key, shape in shapes.items()}
    writer = SafetensorsWriter(path, tensors, {"format": "pt"})

    def write(key: str) -> None:
        stored, shape = tensors[key]
        offset = 0
        if key in heads:
            writer.write(key, torch.from_numpy(heads[key]).to(stored))
            return
        for values in weight_chunks(key, shape, seed, query_scale):
            values *= np.float32(factors.get(key, 1.0))
            offset = writer.write(key, torch.from_numpy(values).to(stored), offset)

    try:
        with ThreadPoolExecutor(max_workers=min(8, torch.get_num_threads())) as pool:
            # The largest first: they are drawn by one thread each.
            drawn = pool.map(write, sorted(shapes, key=lambda key: -prod(shapes[key])))
            for _ in tracked(drawn, len(shapes)):
                pass
    except BaseException:
        writer.abort()
        raise
    writer.finish()


def _factors(keys: Iterable[str], scales: Mapping[str, float]) -> dict[str, float]:
    """Factor of each stored tensor that a pattern of `scales` matches; each pattern must match something."""
    names = list(keys)
    factors: dict[str, float] = {}
    for pattern, factor in scales.items():
        stored = LM_HEAD_KEY if pattern == EMBEDDING_KEY else pattern
        found = [name for name in names if fnmatchcase(name, stored)]
        if not found:
            raise OptionError(f"no tensor of this policy matches {pattern!r}, which is to be scaled")
        factors |= dict.fromkeys(found, factor)
    return factors


def random_config(size: str, preset: Preset, policy: PolicyName, num_steps: int = 10) -> PolicyConfig:
    """Configuration of a random checkpoint. Raises OptionError for an unknown size or policy."""
    if size not in SIZES:
        raise OptionError(f"unknown size {size!r}: expected one of {', '.join(SIZES)}")
    if policy not in PROMPT_CAPACITY:
        raise OptionError(f"unknown policy {policy!r}: expected one of {', '.join(PROMPT_CAPACITY)}")
    dims = SIZES[size]
    fast = policy == "pi0fast"
    text_and_actions = dims.tokenizer_vocab + FAST_VOCABULARY + DecodeConfig.skip_ids
    return PolicyConfig(
        policy=policy,
        vision=dims.vision,
        prefix=dims.prefix,
        expert=dims.prefix if fast else dims.expert,
        vocab_size=max(dims.vocab_size, text_and_actions) if fast else dims.vocab_size,
        horizon=preset.horizon,
        prompt_capacity=PROMPT_CAPACITY[policy],
        action_dim=len(preset.action_names) if fast else 32,
        num_steps=num_steps,
        decode=DecodeConfig(tied_head=size == "full") if fast else NO_DECODING,
    )


def make_checkpoint(
    out: str | Path,
    *,
    size: str = "tiny",
    preset: str = "libero",
    policy: PolicyName = "pi05",
    seed: int = 0,
    dtype: str | None = None,
) -> Path:
    """Write an untrained checkpoint directory in openpi's layout and return it.

    size: "tiny" (2.7 MB), "small" (174 MB) or "full" (the published dimensions, 7.2 GB in bfloat16).
    preset: whose robot it is for, see `presets`.
    dtype: "float32", "bfloat16" (mixed as openpi stores it) or "float16"; default float32, full bfloat16.
    The same arguments give the same bytes.

    Holds model.safetensors, config.json, assets/<preset>/norm_stats.json and tokenizer.model; for pi0fast
    also fast/, and `scripted` says what such a policy writes. Raises OptionError, also when `out` holds a
    checkpoint that was not made by this function.
    """
    robot = preset_named(preset)
    config = random_config(size, robot, policy)
    dtype = dtype or SIZES[size].dtype
    if dtype not in DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    out = Path(out)
    _refuse_foreign(out)
    shutil.rmtree(out / "assets", ignore_errors=True)
    assets = out / "assets" / robot.name
    assets.mkdir(parents=True, exist_ok=True)
    # The full size is for benchmarks: too large to be run here, so it keeps the preset's plain statistics.
    (out / "tokenizer.model").write_bytes(train_tokenizer(SIZES[size].tokenizer_vocab))
    _write_json(out / "config.json", config_json(config, robot, size, dtype))
    _write_json(assets / "norm_stats.json", robot.norm_stats())
    if policy == "pi0fast":
        _write_fast(out, config, robot, DTYPES[dtype], seed)
        return out
    motion = robot.motion if size != "full" else None
    chosen = motion is not None and (size, policy, seed) == ("tiny", "pi05", 0)
    write_weights(
        out / WEIGHTS_FILE,
        config,
        dtype=DTYPES[dtype],
        seed=motion.chosen_seed if motion and chosen else seed,
        query_scale=motion.query_scale if motion else QUERY_SCALE,
        scales=motion.weight_scales if motion else None,
    )
    if motion:
        travel = motion.chosen_travel if chosen else motion.travel
        centred = _centred(out, robot, motion.output_scale, travel)
        _write_json(assets / "norm_stats.json", robot.norm_stats(centred))
    return out


def _write_fast(out: Path, config: PolicyConfig, robot: Preset, dtype: torch.dtype, seed: int) -> None:
    """pi0-FAST's processor and weights, with an output head that writes chunks; full size: as drawn."""
    write_processor(out / FAST_FOLDER, config, seed)
    write = partial(write_weights, out / WEIGHTS_FILE, config, dtype=dtype, seed=seed)
    if config.decode.tied_head:
        write()
        return
    script, width = script_of(out, config, seed), config.prefix.width
    embedding = draw_weight(EMBEDDING_KEY, (config.vocab_size, width), seed)
    norm = draw_weight(f"{LANGUAGE}norm.weight", (width,), seed)
    head = partial(built_head, script, embedding, norm, seed=seed)
    write(scales=QUIET, heads={LM_HEAD_KEY: head(states=None)})
    states = states_behind(out, script, len(robot.views), robot.state_stats["mean"])
    write(scales=QUIET, heads={LM_HEAD_KEY: head(states=states)})


def _centred(
    out: Path, robot: Preset, output_scale: float, travel: Sequence[float]
) -> dict[str, list[float]]:
    """Action statistics that map the network's neutral answer to the middle of the state's statistics."""
    home = robot.state_stats["mean"]
    neutral = neutral_actions(out, home, robot.horizon // 4)[: len(home)] / output_scale
    # rounded to what another processor's arithmetic reproduces
    centre = [
        round(pose - reach * float(answer), 3)
        for pose, reach, answer in zip(home, travel, neutral, strict=True)
    ]
    return band(centre, [reach / output_scale for reach in travel])


def _refuse_foreign(out: Path) -> None:
    """A trained checkpoint is never overwritten."""
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out} is a file: give a directory")
    file = out / "config.json"
    held = [
        name for name in (WEIGHTS_FILE, "model.safetensors.index.json", "params") if (out / name).exists()
    ]
    if not held:
        return
    section = read_json_object(file).get("flashrt") if file.is_file() else None
    if not (isinstance(section, dict) and section.get("untrained") is True):
        raise OptionError(
            f"{out} holds a checkpoint ({held[0]}) that is not a random one: choose another directory"
        )


def config_json(config: PolicyConfig, robot: Preset, size: str, dtype: str) -> dict[str, Any]:
    """config.json as openpi's converter writes it, plus what that layout has no place for."""
    variant = {"tiny": ("dummy", "dummy"), "full": ("gemma_2b", "gemma_300m")}.get(size, (size, size))
    content: dict[str, Any] = {
        "action_dim": config.action_dim,
        "action_horizon": config.horizon,
        "paligemma_variant": variant[0],
        "action_expert_variant": variant[1],
        "precision": dtype,
    }
    if config.policy == "pi05":
        content["discrete_state_input"] = robot.state_in_prompt
    if size != "full":
        content["flashrt_dims"] = {
            "prefix": asdict(config.prefix),
            "expert": asdict(config.expert),
            "vision": asdict(config.vision),
            "vocab_size": config.vocab_size,
        }
    content["flashrt"] = {
        "untrained": True,
        "views": list(robot.views),
        "state_names": list(robot.state_names),
        "action_names": list(robot.action_names),
        "action_rate_hz": robot.action_rate_hz,
        "action_representation": robot.action_representation,
    }
    return content


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
