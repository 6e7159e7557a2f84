"""`load_model`: from a checkpoint directory to a policy that answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import device_loss, models
from .checkpoints import Checkpoint, open_checkpoint
from .checkpoints.tokenizer import resolve_tokenizer
from .engine import Engine, expert_ways, fused_decode
from .engine.expert_ways import ExpertWay, check_way
from .errors import (
    CalibrationNotFoundError,
    CheckpointError,
    NotSupportedYetError,
    OptionError,
    TokenizerNotFoundError,
)
from .guidance import check_mode
from .models import FlowPolicy, Pi0Fast, PrefixPolicy
from .models.weights import load_weights
from .options import MAX_STEPS, Target, check_range, requested_precision, resolve_config, resolve_target
from .policy import Policy
from .quantization.fp8 import swap_linears
from .quantization.weight_cache import WeightCache

if TYPE_CHECKING:
    from .processing.fast_tokens import ActionTokens

logger = logging.getLogger(__name__)

MAX_VIEWS = 3
MAX_TOKENS = 512


@device_loss.recognised()
def load_model(
    checkpoint: str | Path,
    framework: str = "torch",
    config: str = "pi05",
    num_views: int = 2,
    hardware: str = "auto",
    *,
    precision: str | None = None,
    num_steps: int | None = None,
    autotune: int | bool = 3,
    recalibrate: bool = False,
    weight_cache: bool = True,
    calibration: str | Path | None = None,
    use_fp8: bool | None = None,
    use_fp16: bool | None = None,
    use_fp4: bool | None = None,
    fp4_layers: tuple[int, ...] | None = None,
    use_awq: bool | None = None,
    awq_alpha: float | None = None,
    use_p1_split_gu: bool | None = None,
    vision_pool_factor: int | None = None,
    vision_num_layers: int | None = None,
    cache_frames: int | None = None,
    rtc: str = "off",
    decode_cuda_graph: bool = False,
    decode_graph_steps: int = 80,
    expert: str = "auto",
    embodiment_tag: str | None = None,
    action_horizon: int | None = None,
    asset_id: str | None = None,
    delta_actions: Sequence[bool] | None = None,
    rules: Mapping[str, object] | None = None,
) -> Policy:
    """Load a policy.

    checkpoint: an openpi PyTorch, LeRobot or (framework="jax") openpi Orbax directory, whose layout is
    detected, or a hub id "owner/name" (see `open_checkpoint`). config: "pi05", "pi0", "pi0fast" (or
    "pi0_fast"), or "auto" to read it from the checkpoint; another architecture than named is an error.
    num_views: cameras per observation, 1 to 3. hardware: "auto" (a GPU; the CPU where NVIDIA's driver is
    not), "cpu", "any" (a GPU), "thor", "hopper", "rtx_sm120", "rtx_sm89", "rtx_sm87". precision: "fp32",
    "bf16", "fp16", "fp8"; None is fp8 on a GPU that has it, bf16 on one that has not, fp32 on the CPU; the
    use_* flags map onto it. num_steps: denoise steps, 1 to 100; None is the checkpoint's own (10). autotune:
    graphs captured per prompt bucket, of which the fastest is kept; True is 3, False, 0 and 1 capture once.
    Above 0, kernels with several variants are timed at the policy's shapes on the first load on such a GPU;
    the cache remembers.
    weight_cache: keep quantised weights on disk. calibration: a file of activation scales, which must belong
    to this checkpoint, configuration, precision and views, and may name compensated weights; None or "auto":
    the one in the cache, if there is one (see `Policy.save_calibration`); "none": no scales. recalibrate:
    ignore what the cache holds, weights, calibration and times of kernels.

    rtc: real-time chunking, "off", "guided" (predict(rtc=...) pulls a chunk towards what is being played), or
    "trained", for checkpoints that declare rtc_training_max_delay; see docs/rtc.md.

    expert: how pi0's and pi05's denoise steps run on a GPU: "fused" (one persistent kernel), "chain" (five
    kernels a layer), "loop" (the model's own operations); "auto": the first that serves, which the log says.

    What a checkpoint may leave open: action_horizon (actions per chunk), asset_id (which assets/<id> holds
    the statistics), delta_actions (per action dimension, whether the model gives offsets to the state;
    openpi's files do not say, and absolute is assumed), rules (fields of `config.FamilyRules` by name).

    pi0fast alone: decode_graph_steps, the most tokens of a chunk (1 to 512); decode_cuda_graph, so many
    decode steps as one CUDA graph in place of one graph a step, which skips those behind the stop. The other
    options belong to features that are not supported yet.

    Returns a `Policy`: `predict(images, prompt, state)` -> (horizon, action_dim) float32 in the robot's
    units. Raises OptionError (unknown or contradicting options), NotSupportedYetError, HardwareError,
    CheckpointNotFoundError, CheckpointError (which file and key), CalibrationError (one that does not
    belong or is damaged; the message names the way out) and DeviceLostError.
    """
    later = {
        "fp4_layers": fp4_layers,
        "use_awq": use_awq or None,
        "awq_alpha": awq_alpha,
        "use_p1_split_gu": use_p1_split_gu or None,
        "vision_pool_factor": None if vision_pool_factor == 1 else vision_pool_factor,
        "vision_num_layers": vision_num_layers,
        "cache_frames": None if cache_frames == 1 else cache_frames,
        "embodiment_tag": embodiment_tag,
    }
    for name, value in later.items():
        if value is not None:
            raise NotSupportedYetError(f"{name}={value!r} is not supported yet: leave it out")
    check_range("num_views", num_views, 1, MAX_VIEWS)
    if num_steps is not None:
        check_range("num_steps", num_steps, 1, MAX_STEPS)
    if isinstance(autotune, bool):
        autotune = 3 if autotune else 0
    check_range("autotune", autotune, 0, 100)
    policy_name = resolve_config(config)
    wanted = requested_precision(precision, use_fp8, use_fp16, use_fp4)
    target = resolve_target(hardware, wanted, allow_fp8=use_fp8 is not False)
    from_cache = calibration in (None, "auto")
    scales = None if from_cache or calibration == "none" else Path(str(calibration)).expanduser()
    if scales is not None and target.precision != "fp8":
        raise OptionError(f"calibration={str(scales)!r} is for fp8, and precision is {target.precision!r}")
    if scales is not None and recalibrate:
        raise OptionError(f"calibration={str(scales)!r} and recalibrate=True contradict each other: drop one")
    check_range("decode_graph_steps", decode_graph_steps, 1, MAX_TOKENS)
    way = check_way(expert)
    settings = Settings(
        num_views,
        num_steps,
        autotune,
        recalibrate,
        weight_cache,
        scales,
        from_cache,
        decode_cuda_graph,
        decode_graph_steps,
        rtc,
        way,
    )
    opened = open_checkpoint(
        checkpoint,
        framework=framework,
        config=policy_name,
        rules=rules,
        action_horizon=action_horizon,
        asset_id=asset_id,
        delta_actions=delta_actions,
    )
    return _load(opened, target, settings)


@dataclass(frozen=True)
class Settings:
    """Checked options of a load that neither name the policy nor the device."""

    num_views: int
    num_steps: int | None
    autotune: int
    recalibrate: bool
    weight_cache: bool
    calibration: Path | None = None
    cached_calibration: bool = True
    decode_cuda_graph: bool = False
    decode_graph_steps: int = 80
    rtc: str = "off"
    expert: ExpertWay = "auto"


def _load(opened: Checkpoint, target: Target, settings: Settings) -> Policy:
    started = time.perf_counter()
    policy = build_policy(opened, target, settings)
    logger.info(
        "%s: %s from %s (%s rules, %s actions), %d views, %d steps, %s on %s, loaded in %.2f s",
        opened.path,
        opened.config.policy,
        opened.layout,
        opened.rules.family,
        "delta" if any(opened.delta_actions or ()) else "absolute",
        settings.num_views,
        opened.config.num_steps,
        target.precision,
        target.device,
        time.perf_counter() - started,
    )
    return policy


def build_policy(opened: Checkpoint, target: Target, settings: Settings) -> Policy:
    """The policy of an opened checkpoint: model built, weights in place, graphs captured where there is a
    GPU.
    """
    _check_views(opened, settings.num_views)
    rtc = check_mode(settings.rtc, opened.config.policy, opened.rtc_training_max_delay, str(opened.path))
    expert_ways.check(settings.expert, opened.config.policy, target.device, rtc)
    config = opened.config.with_steps(settings.num_steps)
    opened.config = config
    model = models.build(
        config,
        settings.num_views,
        target.dtype,
        opened.rules.rope_bf16,
        opened.rules.accumulate_time,
    )
    if isinstance(model, Pi0Fast):
        model.decode_as(settings.decode_graph_steps, opened.rules.skip_position)
    elif settings.decode_cuda_graph or settings.decode_graph_steps != 80:
        raise OptionError(f"decode_cuda_graph and decode_graph_steps are pi0fast's; {config.policy} has none")
    if target.precision == "fp8":
        swap_linears(model)
        _load_quantised(model, opened, target, settings)
    else:
        load_weights(model, config, opened, target.device)
    model.eval()
    model.prepare(target.device)
    tokens = _restrict(model, opened) if isinstance(model, Pi0Fast) else None
    engine = None
    if target.device.type == "cuda" and (isinstance(model, FlowPolicy) or tokens is not None):
        if isinstance(model, FlowPolicy):
            expert_ways.attach(model, target.device, settings.expert, rtc)
        elif isinstance(model, Pi0Fast):
            fused_decode.attach(model, target.device)
        whole = settings.decode_cuda_graph
        anew = settings.recalibrate
        engine = Engine(model, opened.rules, target.device, settings.autotune, whole, rtc, anew)
        engine.capture()
    policy = Policy(model, opened, target, engine, tokens, rtc)
    if target.precision == "fp8":
        try:
            _load_scales(policy, opened, settings)
        except BaseException:
            policy.close()
            raise
    return policy


def _restrict(model: Pi0Fast, opened: Checkpoint) -> ActionTokens | None:
    """The checkpoint's action tokens, to which the model keeps from now on; None where it has no processor,
    which leaves model space.
    """
    from .processing.fast_tokens import open_action_tokens

    try:
        tokens = open_action_tokens(opened, resolve_tokenizer(opened))
    except TokenizerNotFoundError as error:
        logger.warning("model space only (sample_tokens), no actions: %s", error)
        return None
    device = model.head_rows.device
    model.restrict(torch.from_numpy(tokens.ids).to(device), torch.from_numpy(tokens.stops).to(device))
    return tokens


def _load_scales(policy: Policy, opened: Checkpoint, settings: Settings) -> None:
    """The calibration that was named, or the cache's where it has one."""
    if settings.calibration is not None:
        policy.load_calibration(settings.calibration)
    elif settings.cached_calibration and not settings.recalibrate and opened.store.files:
        with contextlib.suppress(CalibrationNotFoundError):
            policy.load_calibration()


def _load_quantised(model: PrefixPolicy, opened: Checkpoint, target: Target, settings: Settings) -> None:
    """From the cache of quantised weights where it has them; `recalibrate` ignores what it holds."""
    if not settings.weight_cache:
        load_weights(model, opened.config, opened, target.device)
        return
    cache = WeightCache(opened, target.precision)
    if not settings.recalibrate and (path := cache.load(model, target.device)):
        logger.info("quantised weights from %s", path)
        return
    load_weights(model, opened.config, opened, target.device)
    cache.save(model)


def _check_views(opened: Checkpoint, num_views: int) -> None:
    """A checkpoint that names its views cannot be given more; fewer is masked views, said in the log."""
    if opened.views is None:
        return
    if num_views > len(opened.views):
        raise CheckpointError(
            f"{opened.path}: num_views={num_views}, but it was trained with {len(opened.views)}: "
            f"{', '.join(opened.views)}"
        )
    if num_views < len(opened.views):
        logger.warning(
            "%s: num_views=%d, so the model never sees %s",
            opened.path,
            num_views,
            ", ".join(opened.views[num_views:]),
        )
