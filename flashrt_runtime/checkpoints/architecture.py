"""Names and shapes of every tensor of a policy, and the policy's dimensions read back from them.

Names are openpi's PyTorch ones. Dimensions come from tensor shapes; the one thing shapes leave open is how
many heads share a projection, which comes from the published variants or from `flashrt_dims` in config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt, prod

from ..config import (
    GEMMA_2B,
    GEMMA_300M,
    NO_DECODING,
    PATCH_SIZE,
    SIGLIP_SO400M,
    DecodeConfig,
    GemmaConfig,
    PolicyConfig,
    PolicyName,
    SiglipConfig,
)
from ..errors import CheckpointError

Shape = tuple[int, ...]

PALIGEMMA = "paligemma_with_expert.paligemma."
VISION = f"{PALIGEMMA}model.vision_tower.vision_model."
PROJECTOR = f"{PALIGEMMA}model.multi_modal_projector.linear."
LANGUAGE = f"{PALIGEMMA}model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
EMBEDDING_KEY = f"{LANGUAGE}embed_tokens.weight"
LM_HEAD_KEY = f"{PALIGEMMA}lm_head.weight"
EXPERT_LM_HEAD_KEY = "paligemma_with_expert.gemma_expert.lm_head.weight"

# Stored by some writers and read by none of the policies here: output heads and the expert's unused
# embedding.
IGNORED_KEYS = frozenset({LM_HEAD_KEY, EXPERT_LM_HEAD_KEY, f"{EXPERT}embed_tokens.weight"})

# openpi's reduced variant for tests; its name in config.json is "dummy".
GEMMA_DUMMY = GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)
PUBLISHED_STACKS = {variant.width: variant for variant in (GEMMA_2B, GEMMA_300M, GEMMA_DUMMY)}
PUBLISHED_VISION = {SIGLIP_SO400M.width: SIGLIP_SO400M}

DIMS_HELP = (
    "add `flashrt_dims` to config.json: "
    "{prefix|expert: {width, depth, mlp_dim, num_heads, num_kv_heads, head_dim}, "
    "vision: {width, depth, mlp_dim, num_heads, image_size}, vocab_size}"
)


def parameter_shapes(config: PolicyConfig) -> dict[str, Shape]:
    """Shape of every tensor the policy reads, by canonical name."""
    width, action_dim = config.expert.width, config.action_dim
    shapes: dict[str, Shape] = {EMBEDDING_KEY: (config.vocab_size, config.prefix.width)}
    shapes |= _vision_shapes(config.vision, config.prefix.width)
    shapes |= _stack_shapes(LANGUAGE, config.prefix, adaptive=False)
    if config.policy == "pi0fast":
        head = {} if config.decode.tied_head else {LM_HEAD_KEY: shapes[EMBEDDING_KEY]}
        return shapes | head
    shapes |= _stack_shapes(EXPERT, config.expert, adaptive=config.policy == "pi05")
    shapes |= _linear("action_in_proj", width, action_dim)
    shapes |= _linear("action_out_proj", action_dim, width)
    if config.policy == "pi05":
        shapes |= _linear("time_mlp_in", width, width)
        shapes |= _linear("time_mlp_out", width, width)
    else:
        shapes |= _linear("state_proj", width, action_dim)
        shapes |= _linear("action_time_mlp_in", width, 2 * width)
        shapes |= _linear("action_time_mlp_out", width, width)
    return shapes


def unused_shapes(config: PolicyConfig) -> dict[str, Shape]:
    """Shape of the untrained output head that openpi's files carry along."""
    if config.policy == "pi0fast":
        return {}
    return {EXPERT_LM_HEAD_KEY: (config.vocab_size, config.expert.width)}


def _linear(key: str, rows: int, columns: int, bias: bool = True) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{key}.weight": (rows, columns)}
    return shapes | {f"{key}.bias": (rows,)} if bias else shapes


def _norm(key: str, width: int, adaptive: bool) -> dict[str, Shape]:
    return _linear(f"{key}.dense", 3 * width, width) if adaptive else {f"{key}.weight": (width,)}


def _stack_shapes(root: str, stack: GemmaConfig, adaptive: bool) -> dict[str, Shape]:
    width, queries, keys = stack.width, stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    shapes = _norm(f"{root}norm", width, adaptive)
    for index in range(stack.depth):
        layer = f"{root}layers.{index}."
        shapes |= _norm(f"{layer}input_layernorm", width, adaptive)
        shapes |= _norm(f"{layer}post_attention_layernorm", width, adaptive)
        shapes |= _linear(f"{layer}self_attn.q_proj", queries, width, bias=False)
        shapes |= _linear(f"{layer}self_attn.k_proj", keys, width, bias=False)
        shapes |= _linear(f"{layer}self_attn.v_proj", keys, width, bias=False)
        shapes |= _linear(f"{layer}self_attn.o_proj", width, queries, bias=False)
        shapes |= _linear(f"{layer}mlp.gate_proj", stack.mlp_dim, width, bias=False)
        shapes |= _linear(f"{layer}mlp.up_proj", stack.mlp_dim, width, bias=False)
        shapes |= _linear(f"{layer}mlp.down_proj", width, stack.mlp_dim, bias=False)
    return shapes


def _vision_shapes(vision: SiglipConfig, out_width: int) -> dict[str, Shape]:
    width = vision.width
    shapes: dict[str, Shape] = {
        f"{VISION}embeddings.patch_embedding.weight": (width, 3, PATCH_SIZE, PATCH_SIZE),
        f"{VISION}embeddings.patch_embedding.bias": (width,),
        f"{VISION}embeddings.position_embedding.weight": (vision.tokens, width),
    }
    for index in range(vision.depth):
        layer = f"{VISION}encoder.layers.{index}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{part}", width, width)
        shapes |= _linear(f"{layer}mlp.fc1", vision.mlp_dim, width)
        shapes |= _linear(f"{layer}mlp.fc2", width, vision.mlp_dim)
    shapes |= {f"{VISION}post_layernorm.weight": (width,), f"{VISION}post_layernorm.bias": (width,)}
    return shapes | _linear(PROJECTOR[:-1], out_width, width)


def detect_policy(keys: Iterable[str], where: str) -> PolicyName:
    """The policy a set of canonical tensor names belongs to: pi05 has a time MLP, pi0 a state projection,
    pi0fast neither and no action expert.

    Raises CheckpointError for another architecture.
    """
    names = set(keys)
    if "time_mlp_in.weight" in names:
        return "pi05"
    if "action_time_mlp_in.weight" in names:
        return "pi0"
    paligemma = any(name.startswith(PALIGEMMA) or name == EMBEDDING_KEY for name in names)
    if paligemma and not any(name.startswith("action_") for name in names):
        return "pi0fast"
    raise CheckpointError(
        f"{where}: a checkpoint of another architecture. Expected pi05 (time_mlp_in.weight), pi0 "
        f"(action_time_mlp_in.weight) or pi0fast (PaliGemma alone); found {len(names)} tensors such as "
        f"{', '.join(sorted(names)[:3]) or 'none'}"
    )


class DimensionReader:
    """Reads a policy's dimensions from tensor shapes; `dims` is config.json's `flashrt_dims`, if any."""

    def __init__(
        self, shapes: Mapping[str, Shape], where: str, dims: Mapping[str, object] | None = None
    ) -> None:
        self.shapes = shapes
        self.where = where
        self.dims = dict(dims or {})

    def shape(self, key: str, rank: int) -> Shape:
        """Shape of a tensor that must be there."""
        if key not in self.shapes:
            raise CheckpointError(f"{self.where}: missing key {key!r}")
        shape = self.shapes[key]
        if len(shape) != rank:
            raise CheckpointError(f"{self.where}: {key!r} has shape {shape}, expected {rank} dimensions")
        return shape

    def depth(self, root: str) -> int:
        """Number of consecutive layers under `root`."""
        pattern = re.compile(re.escape(root) + r"layers\.(\d+)\.")
        found = {int(match.group(1)) for key in self.shapes if (match := pattern.match(key))}
        if not found:
            raise CheckpointError(f"{self.where}: missing key {root + 'layers.0.*'!r}")
        return max(found) + 1

    def declared(self, part: str, name: str) -> int | None:
        """An entry of flashrt_dims, checked to be a positive integer."""
        section = self.dims.get(part)
        value = section.get(name) if isinstance(section, Mapping) else None
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.where}: flashrt_dims.{part}.{name} is {value!r}, expected a positive integer"
            )
        return value

    def stack(self, part: str, root: str, width_key: str, axis: int) -> GemmaConfig:
        """Dimensions of the Gemma stack under `root`; its width is axis `axis` of `width_key`."""
        width = self.shape(width_key, 2)[axis]
        queries = self.shape(f"{root}layers.0.self_attn.q_proj.weight", 2)[0]
        keys = self.shape(f"{root}layers.0.self_attn.k_proj.weight", 2)[0]
        heads, kv_heads = self.declared(part, "num_heads"), self.declared(part, "num_kv_heads")
        head_dim = self.declared(part, "head_dim")
        if heads is None or kv_heads is None or head_dim is None:
            if width not in PUBLISHED_STACKS:
                raise CheckpointError(
                    f"{self.where}: the {part} stack has width {width}, which is no published variant "
                    f"({sorted(PUBLISHED_STACKS)}), so its head count is unknown: {DIMS_HELP}"
                )
            published = PUBLISHED_STACKS[width]
            heads, kv_heads, head_dim = published.num_heads, published.num_kv_heads, published.head_dim
        if (queries, keys) != (heads * head_dim, kv_heads * head_dim):
            raise CheckpointError(
                f"{self.where}: {root}layers.0.self_attn has {queries} query and {keys} key rows, but "
                f"{heads} heads "
                f"({kv_heads} for keys) of {head_dim} give {heads * head_dim} and {kv_heads * head_dim}: "
                f"{DIMS_HELP}"
            )
        return GemmaConfig(
            width=width,
            depth=self.depth(root),
            mlp_dim=self.shape(f"{root}layers.0.mlp.gate_proj.weight", 2)[0],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
        )

    def vision(self) -> SiglipConfig:
        """Dimensions of the vision tower; the image size follows from the number of positions."""
        positions, width = self.shape(f"{VISION}embeddings.position_embedding.weight", 2)
        side = isqrt(positions)
        if side * side != positions:
            raise CheckpointError(
                f"{self.where}: {positions} position embeddings do not form a square of patches"
            )
        heads = self.declared("vision", "num_heads")
        if heads is None:
            if width not in PUBLISHED_VISION:
                raise CheckpointError(
                    f"{self.where}: the vision tower has width {width}, which is no published variant "
                    f"({sorted(PUBLISHED_VISION)}), so its head count is unknown: {DIMS_HELP}"
                )
            heads = PUBLISHED_VISION[width].num_heads
        if width % heads:
            raise CheckpointError(
                f"{self.where}: vision width {width} is not divisible by {heads} heads: {DIMS_HELP}"
            )
        return SiglipConfig(
            width=width,
            depth=self.depth(f"{VISION}encoder."),
            mlp_dim=self.shape(f"{VISION}encoder.layers.0.mlp.fc1.weight", 2)[0],
            num_heads=heads,
            image_size=side * PATCH_SIZE,
        )

    def check_declared(self, config: PolicyConfig) -> None:
        """Every entry of flashrt_dims must agree with the tensors."""
        parts: dict[str, GemmaConfig | SiglipConfig] = {"prefix": config.prefix, "vision": config.vision}
        if config.policy != "pi0fast":  # whose writers repeat the dimensions of an expert it does not have
            parts["expert"] = config.expert
        for part, found in parts.items():
            for name, value in vars(found).items():
                declared = self.declared(part, name)
                if declared is not None and declared != value:
                    raise CheckpointError(
                        f"{self.where}: flashrt_dims.{part}.{name} is {declared}, but the tensors have "
                        f"{value}"
                    )
        vocabulary = self.dims.get("vocab_size")
        if vocabulary is not None and vocabulary != config.vocab_size:
            raise CheckpointError(
                f"{self.where}: flashrt_dims.vocab_size is {vocabulary}, but the tensors have "
                f"{config.vocab_size}"
            )


def infer_config(
    shapes: Mapping[str, Shape],
    *,
    policy: PolicyName,
    horizon: int,
    prompt_capacity: int,
    num_steps: int,
    where: str,
    dims: Mapping[str, object] | None = None,
    action_dim: int | None = None,
    decode: DecodeConfig = NO_DECODING,
) -> PolicyConfig:
    """The policy's configuration from tensor shapes (canonical names) and the few facts shapes do not hold.

    action_dim, decode: of pi0fast, whose tensors tell neither.
    Raises CheckpointError naming file and key when a tensor is missing or dimensions contradict each other.
    """
    reader = DimensionReader(shapes, where, dims)
    prefix = reader.stack("prefix", LANGUAGE, EMBEDDING_KEY, 1)
    if policy == "pi0fast":
        expert, width = prefix, action_dim
    else:
        expert = reader.stack("expert", EXPERT, "action_in_proj.weight", 0)
        width = reader.shape("action_in_proj.weight", 2)[1]
    if width is None:
        raise CheckpointError(
            f"{where}: no action_dim, and pi0fast's tensors do not tell it. Pass action_dim= or write "
            '{"action_dim": N} there: the width of the actions that the FAST processor encoded'
        )
    config = PolicyConfig(
        policy=policy,
        vision=reader.vision(),
        prefix=prefix,
        expert=expert,
        vocab_size=reader.shape(EMBEDDING_KEY, 2)[0],
        horizon=horizon,
        prompt_capacity=prompt_capacity,
        action_dim=width,
        num_steps=num_steps,
        decode=decode,
    )
    reader.check_declared(config)
    ours, theirs = config.prefix, config.expert
    shared = ("depth", "num_heads", "num_kv_heads", "head_dim")
    if any(getattr(ours, name) != getattr(theirs, name) for name in shared):
        raise CheckpointError(
            f"{where}: prefix and expert attend to each other layer by layer, so {', '.join(shared)} must "
            "agree: "
            f"{ours} against {theirs}"
        )
    return config


def check_shapes(found: Mapping[str, Shape], config: PolicyConfig, where: str) -> None:
    """Compare tensors (canonical names) with the architecture: nothing missing, misshapen or left over."""
    expected = parameter_shapes(config)
    missing = [key for key in expected if key not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: missing key {missing[0]!r}{more}, needed by {config.policy}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise CheckpointError(
                f"{where}: {key!r} has shape {found[key]}, expected {shape} for {config.policy} of these "
                "dimensions"
            )
    extra = sorted(set(found) - set(expected) - IGNORED_KEYS)
    if extra:
        raise CheckpointError(
            f"{where}: {len(extra)} tensors are no part of {config.policy}, such as "
            f"{', '.join(map(repr, extra[:3]))}; "
            "merge adapters and drop foreign tensors before loading"
        )


def parameter_count(config: PolicyConfig) -> int:
    """Number of parameters the policy reads."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())
