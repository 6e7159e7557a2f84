"""The policy object: physical units outside, model space inside."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoints.base import Checkpoint
from .checkpoints.tokenizer import resolve_tokenizer
from .engine import Engine
from .errors import (
    ActionError,
    CheckpointError,
    ClosedError,
    NotSupportedYetError,
    ObservationError,
    OptionError,
    PromptError,
)
from .models import FlowPolicy
from .options import Target
from .processing.actions import ActionTransform
from .processing.images import fitted_size, prepare_image
from .processing.prompt import PromptEncoder
from .processing.state import StateTransform
from .quantization.calibration import Calibrator

logger = logging.getLogger(__name__)

DEFAULT_VIEWS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
VIEW_ALIASES = ("image", "wrist_image", "wrist_image_right")

Images = Sequence[NDArray[np.uint8]] | Mapping[str, NDArray[np.uint8]]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class PolicySpec:
    """What a policy takes and gives.

    views: camera order; horizon: actions per chunk; state_dim, action_dim: the robot's widths;
    model_action_dim: the padded width of noise and of model space; prompt_capacity: tokens, state digits
    included.
    """

    config: str
    family: str
    views: tuple[str, ...]
    horizon: int
    state_dim: int | None
    action_dim: int | None
    model_action_dim: int
    prompt_capacity: int
    num_steps: int
    state_names: tuple[str, ...] | None
    action_names: tuple[str, ...] | None
    action_rate_hz: float | None
    checkpoint: str
    action_representation: str = "absolute"


@dataclass(frozen=True)
class _ModelInputs:
    """One observation in model space: images (H, W, 3) uint8, tokens (L,) int64, state (action_dim,) float32
    padded or None, noise (horizon, action_dim) float32 on the host.
    """

    views: list[NDArray[np.uint8]]
    tokens: NDArray[np.int64]
    state: FloatArray | None
    noise: torch.Tensor


class Policy:
    """A loaded policy; made by `load_model`. Calls may come from any thread and run one at a time."""

    def __init__(
        self, model: FlowPolicy, checkpoint: Checkpoint, target: Target, engine: Engine | None = None
    ) -> None:
        self._model: FlowPolicy | None = model
        self._engine = engine
        self._calibrator = Calibrator(model) if target.precision == "fp8" else None
        self._target = target
        self._lock = threading.Lock()
        self._prompt_lock = threading.Lock()  # held for a tokenisation at most, never for an inference
        self._prompt: str | None = None
        self._noise = torch.Generator()
        self._noise.seed()
        self._tokenizer: PromptEncoder | None = None
        self._checkpoint = checkpoint
        stats, rules, config = checkpoint.norm_stats, checkpoint.rules, checkpoint.config
        self._state = (
            StateTransform(stats.state, rules, checkpoint.state_dim) if stats and stats.state else None
        )
        self._actions = (
            ActionTransform(stats.actions, rules, checkpoint.action_dim, checkpoint.delta_actions)
            if stats and stats.actions and checkpoint.action_dim
            else None
        )
        self.spec = PolicySpec(
            config=config.policy,
            family=rules.family,
            views=(checkpoint.views or DEFAULT_VIEWS)[: model.num_views],
            horizon=config.horizon,
            state_dim=checkpoint.state_dim,
            action_dim=checkpoint.action_dim,
            model_action_dim=config.action_dim,
            prompt_capacity=config.prompt_capacity,
            num_steps=config.num_steps,
            state_names=checkpoint.state_names,
            action_names=checkpoint.action_names,
            action_rate_hz=checkpoint.action_rate_hz,
            checkpoint=str(checkpoint.path),
        )

    @property
    def prompt(self) -> str | None:
        """The prompt in force, as given; None before the first."""
        return self._prompt

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16 or fp8."""
        return self._target.precision

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._target.device

    def set_prompt(self, prompt: str) -> None:
        """Use `prompt` from the next predict on.

        May be called while another thread predicts. Raises PromptError (empty), PromptTooLongError (with
        the digits of a zero state, where the prompt holds the state) or TokenizerNotFoundError; the prompt
        in force then stays.
        """
        self._check_open()
        some_state = np.zeros(self.spec.state_dim or 0, np.float32) if self._needs_state_text else None
        with self._prompt_lock:
            self._encoder().encode(prompt, some_state)
            self._prompt = prompt

    def _tokens(self, prompt: str | None, normalized: FloatArray | None, keep: bool) -> NDArray[np.int64]:
        """Tokens of `prompt`, or of the one in force for None; `keep` puts it in force."""
        with self._prompt_lock:
            text = self._prompt if prompt is None else prompt
            if text is None:
                raise PromptError("no prompt yet: pass prompt= with an observation, or call set_prompt first")
            tokens = self._encoder().encode(text, normalized if self._needs_state_text else None)
            if keep:
                self._prompt = text
            return tokens

    def predict(
        self,
        images: Images,
        prompt: str | None = None,
        state: NDArray[np.floating] | Sequence[float] | None = None,
        *,
        noise: FloatArray | None = None,
        seed: int | None = None,
    ) -> FloatArray:
        """One action chunk from one observation.

        images: one (H, W, 3) uint8 RGB array per view, any size, as a list in the order of `spec.views` or
        a dict by view name. prompt: needed at first, then kept. state: (state_dim,) joint values in the
        robot's units, needed by every policy that sees the state. noise: (horizon, model_action_dim)
        float32, the flow's start; or seed: an int it is drawn from; neither draws fresh noise. Returns
        (horizon, action_dim) float32 actions in the robot's units, at the rate the policy was trained for.
        Raises ObservationError, PromptError, PromptTooLongError, OptionError, CheckpointError (no
        statistics), TokenizerNotFoundError, ActionError (non-finite actions) or ClosedError.
        """
        with self._lock:
            model = self._check_open()
            views = self._ordered_views(images)
            start = self._start_noise(noise, seed)
            normalized = self._normalized_state(state)
            if self._actions is None:
                raise CheckpointError(
                    f"{self.spec.checkpoint}: no action statistics (norm_stats), so no actions in the "
                    "robot's units; use sample_actions for model space"
                )
            tokens = self._tokens(prompt, normalized, keep=True)
            actions = self._run(model, _ModelInputs(views, tokens, self._padded(normalized), start))
            self._refuse_non_finite(actions)
            return self._actions.to_physical(
                actions, None if state is None else np.asarray(state, np.float32)
            )

    def sample_actions(
        self,
        images: FloatArray,
        image_mask: NDArray[np.bool_],
        tokens: NDArray[np.int64],
        token_mask: NDArray[np.bool_],
        state: FloatArray | None,
        noise: FloatArray,
    ) -> FloatArray:
        """The model alone, without processing: for parity work.

        images: (views, 3, size, size) float32 in [-1, 1]; image_mask: (views,) bool; tokens: (text,) int;
        token_mask: (text,) bool; state: (model_action_dim,) float32 normalised and padded (pi0; unused by
        pi0.5); noise: (horizon, model_action_dim) float32. Returns (horizon, model_action_dim) float32 in
        model space. Raises ObservationError for shapes that do not fit.
        """
        with self._lock:
            model = self._check_open()
            size = model.config.vision.image_size
            self._expect("images", images, (model.num_views, 3, size, size))
            self._expect("image_mask", image_mask, (model.num_views,))
            self._expect("token_mask", token_mask, np.shape(tokens))
            self._expect("noise", noise, (self.spec.horizon, self.spec.model_action_dim))
            self._check_tokens(np.asarray(tokens), np.asarray(token_mask), model.config.vocab_size)
            if state is not None:
                self._expect("state", state, (self.spec.model_action_dim,))
            put = self._put
            tensors = (
                put(images, torch.float32),
                put(image_mask, torch.bool),
                put(tokens, torch.int64),
                put(token_mask, torch.bool),
                None if state is None else put(state, torch.float32),
                put(noise, torch.float32),
            )
            self._calibrate_first(lambda: model.sample_actions(*tensors))
            actions = self._take(model.sample_actions(*tensors))
            self._refuse_non_finite(actions)
            return actions

    def _check_tokens(self, tokens: NDArray[Any], mask: NDArray[Any], vocab_size: int) -> None:
        if tokens.ndim != 1:
            raise ObservationError(f"tokens: expected shape (text,), got {tokens.shape}")
        valid = int(np.sum(mask))
        if valid > self.spec.prompt_capacity:
            raise ObservationError(f"{valid} valid tokens do not fit {self.spec.prompt_capacity}")
        if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
            raise ObservationError(
                f"tokens: expected ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )

    @staticmethod
    def _refuse_non_finite(actions: FloatArray) -> None:
        if not np.isfinite(actions).all():
            bad = int((~np.isfinite(actions)).sum())
            raise ActionError(f"{bad} of {actions.size} actions are not finite: the chunk was dropped")

    def calibrate(
        self,
        observations: Iterable[Mapping[str, Any]],
        percentile: float = 100.0,
        max_samples: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Set the activation scales from what the model sees in `observations`; graphs stay valid.

        observations: mappings of predict's arguments: images, and where the policy needs them prompt,
        state, noise or seed. The scale of each projection is its largest activation / 448 over every sample
        and denoise step (percentile=100; others come with a later version). max_samples: use at most this
        many. verbose: log scales. Raises OptionError (nothing to calibrate, no observations),
        NotSupportedYetError and what predict raises; the scales in force then stay.
        """
        calibrator = self._calibrator_or_refuse()
        if percentile != 100.0:
            raise NotSupportedYetError(f"percentile={percentile} is not supported yet: use 100, the maximum")
        if max_samples is not None and max_samples < 1:
            raise OptionError(f"max_samples must be 1 or more, or None for all; got {max_samples}")
        count = 0
        calibrator.reset()
        for observation in itertools.islice(observations, max_samples):
            with self._lock:  # not around the caller's iterator, which may be slow or call us
                model = self._check_open()
                inputs = self._inputs(**self._observation(observation))
                with calibrator.observe():
                    self._eager(model, inputs)
            count += 1
        if count == 0:
            raise OptionError("calibrate: no observations were given")
        with self._lock:
            self._check_open()
            calibrator.apply()
        logger.info(
            "activation scales of %d projections from %d observations", len(calibrator.linears), count
        )
        if verbose:
            for name, scale in calibrator.scales().items():
                logger.info("%s: activation scale %.6g", name, scale)

    @staticmethod
    def _observation(observation: Mapping[str, Any]) -> dict[str, Any]:
        known = {"images", "prompt", "state", "noise", "seed"}
        if "images" not in observation or not known.issuperset(observation):
            raise ObservationError(
                f"expected images and any of prompt, state, noise and seed; got {sorted(observation)}"
            )
        return dict(observation)

    def recalibrate(self) -> None:
        """Drop the calibration in force: the next observation sets the scales again."""
        calibrator = self._calibrator_or_refuse()
        with self._lock:
            self._check_open()
            calibrator.drop()

    def _calibrator_or_refuse(self) -> Calibrator:
        self._check_open()
        if self._calibrator is None:
            raise OptionError(
                f"precision {self.precision!r} has no activation scales: calibration is for fp8"
            )
        return self._calibrator

    def _calibrate_first(self, forward: Callable[[], torch.Tensor]) -> None:
        """FP8 without scales takes them from the observation at hand, and says so."""
        calibrator = self._calibrator
        if calibrator is None or calibrator.calibrated:
            return
        logger.warning(
            "not calibrated: activation scales are those of this one observation; call calibrate()"
        )
        calibrator.reset()
        with calibrator.observe():
            forward()
        calibrator.apply()

    def close(self) -> None:
        """Free the model's memory. Any later call raises ClosedError; closing twice is allowed."""
        with self._lock:
            if self._model is not None:
                self._model.fused_expert = None  # it refers back to the model
            self._model = None
            self._engine = None
            self._calibrator = None
            self._checkpoint.close()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def _needs_state_text(self) -> bool:
        return self._checkpoint.rules.state_in_prompt

    def _check_open(self) -> FlowPolicy:
        if self._model is None:
            raise ClosedError("this policy was closed: load it again with load_model")
        return self._model

    def _encoder(self) -> PromptEncoder:
        if self._tokenizer is None:
            config = self._checkpoint.config
            self._tokenizer = PromptEncoder(
                resolve_tokenizer(self._checkpoint),
                config.policy,
                self._checkpoint.rules,
                config.prompt_capacity,
                config.vocab_size,
            )
        return self._tokenizer

    def _inputs(
        self,
        images: Images,
        prompt: str | None = None,
        state: NDArray[np.floating] | Sequence[float] | None = None,
        noise: FloatArray | None = None,
        seed: int | None = None,
    ) -> _ModelInputs:
        """predict's arguments in model space; raises as predict does and leaves the prompt in force as it
        is.
        """
        normalized = self._normalized_state(state)
        tokens = self._tokens(prompt, normalized, keep=False)
        views, start = self._ordered_views(images), self._start_noise(noise, seed)
        return _ModelInputs(views, tokens, self._padded(normalized), start)

    def _padded(self, normalized: FloatArray | None) -> FloatArray | None:
        if normalized is None or self._state is None:
            return None
        return self._state.pad(normalized, self.spec.model_action_dim)

    def _run(self, model: FlowPolicy, inputs: _ModelInputs) -> FloatArray:
        self._calibrate_first(lambda: self._eager(model, inputs))
        if self._engine is None:
            return self._take(self._eager(model, inputs))
        if inputs.state is None and self.spec.config == "pi0":
            raise ObservationError("pi0 needs the robot's state with every observation; none was given")
        return self._engine.run(inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy())

    def _eager(self, model: FlowPolicy, inputs: _ModelInputs) -> torch.Tensor:
        """The definition, at the observation's own lengths."""
        size, resize = model.config.vision.image_size, self._checkpoint.rules.resize
        pixels = torch.stack([prepare_image(view, size, resize, self.device) for view in inputs.views])
        every = torch.ones
        return model.sample_actions(
            pixels,
            every(len(inputs.views), dtype=torch.bool, device=self.device),
            self._put(inputs.tokens, torch.int64),
            every(len(inputs.tokens), dtype=torch.bool, device=self.device),
            None if inputs.state is None else self._put(inputs.state, torch.float32),
            inputs.noise.to(self.device),
        )

    def _ordered_views(self, images: Images) -> list[NDArray[np.uint8]]:
        size = self._checkpoint.config.vision.image_size
        names = self.spec.views
        if isinstance(images, Mapping):
            aliases = dict(zip(VIEW_ALIASES, names, strict=False))
            by_name = {aliases.get(name, name): image for name, image in images.items()}
            if set(by_name) != set(names) or len(by_name) != len(images):
                raise ObservationError(f"expected images for the views {list(names)}, got {list(images)}")
            ordered = [by_name[name] for name in names]
        else:
            ordered = list(images)
            if len(ordered) != len(names):
                raise ObservationError(
                    f"expected {len(names)} images in the order {list(names)}, got {len(ordered)}"
                )
        for name, image in zip(names, ordered, strict=True):
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
                raise ObservationError(f"image {name!r}: expected a uint8 array of RGB pixels, got {kind}")
            if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ObservationError(f"image {name!r}: expected shape (H, W, 3), got {image.shape}")
            if 0 in fitted_size(image.shape[0], image.shape[1], size):
                raise ObservationError(
                    f"image {name!r}: {image.shape[1]}x{image.shape[0]} is too narrow to fit {size}x{size}"
                )
        return ordered

    def _normalized_state(self, state: NDArray[np.floating] | Sequence[float] | None) -> FloatArray | None:
        checkpoint = self._checkpoint
        needed = (
            self._needs_state_text
            or self.spec.config == "pi0"
            or bool(np.any(checkpoint.delta_actions or ()))
        )
        if state is None:
            if needed:
                raise ObservationError(
                    f"this policy sees the robot's state: pass state= with {self.spec.state_dim} values"
                )
            return None
        values = np.asarray(state, dtype=np.float32)
        if self._state is None:
            raise CheckpointError(
                f"{self.spec.checkpoint}: no state statistics (norm_stats), so state= cannot be used"
            )
        if values.shape != (self.spec.state_dim,):
            raise ObservationError(f"state: expected shape ({self.spec.state_dim},), got {values.shape}")
        if not np.isfinite(values).all():
            raise ObservationError(
                f"state: values at {np.flatnonzero(~np.isfinite(values)).tolist()} are not finite"
            )
        return self._state.normalize(values)

    def _start_noise(self, noise: FloatArray | None, seed: int | None) -> torch.Tensor:
        shape = (self.spec.horizon, self.spec.model_action_dim)
        if noise is not None:
            if seed is not None:
                raise OptionError("noise= and seed= were both given: pass one")
            self._expect("noise", noise, shape)
            return torch.from_numpy(np.array(noise, dtype=np.float32))
        # drawn on the host, so that a seed gives the same noise on every device
        generator = self._noise if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    @staticmethod
    def _expect(name: str, value: object, shape: tuple[int, ...]) -> None:
        array = np.asarray(value)
        if array.shape != tuple(shape):
            raise ObservationError(f"{name}: expected shape {tuple(shape)}, got {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ObservationError(f"{name}: holds values that are not finite")

    def _put(self, array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=self.device, dtype=dtype)

    def _take(self, actions: torch.Tensor) -> FloatArray:
        result: FloatArray = actions.float().cpu().numpy()
        return result
