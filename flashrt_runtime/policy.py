"""The policy object: physical units outside, model space inside."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoints.base import Checkpoint
from .engine import Engine
from .errors import (
    ActionError,
    CheckpointError,
    ClosedError,
    ObservationError,
    OptionError,
)
from .inputs import FloatArray, Images, ModelInputs, ObservationEncoder, State, expect_shape
from .models import FlowPolicy
from .options import Target
from .processing.actions import ActionTransform
from .processing.images import prepare_image
from .quantization import session
from .quantization.artifact import identity_of
from .quantization.calibration import CalibrationReport
from .quantization.in_force import CalibrationInForce
from .spec import PolicySpec

logger = logging.getLogger(__name__)


class Policy:
    """A loaded policy; made by `load_model`. Calls may come from any thread and run one at a time."""

    def __init__(
        self, model: FlowPolicy, checkpoint: Checkpoint, target: Target, engine: Engine | None = None
    ) -> None:
        self._model: FlowPolicy | None = model
        self._engine = engine
        self._target = target
        self._lock = threading.Lock()
        self._checkpoint = checkpoint
        self.spec = PolicySpec.of(checkpoint, model.num_views)
        self._encode = ObservationEncoder(checkpoint, self.spec)
        views = self.spec.views
        self._calibration = (
            CalibrationInForce(model, lambda: identity_of(checkpoint, views, target.precision))
            if target.precision == "fp8"
            else None
        )
        stats = checkpoint.norm_stats
        self._actions = (
            ActionTransform(stats.actions, checkpoint.rules, checkpoint.action_dim, checkpoint.delta_actions)
            if stats and stats.actions and checkpoint.action_dim
            else None
        )

    @property
    def prompt(self) -> str | None:
        """The prompt in force, as given; None before the first."""
        return self._encode.prompt

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
        self._encode.set_prompt(prompt)

    def predict(
        self,
        images: Images,
        prompt: str | None = None,
        state: State | None = None,
        *,
        noise: FloatArray | None = None,
        seed: int | None = None,
    ) -> FloatArray:
        """One action chunk from one observation.

        images: one (H, W, 3) uint8 RGB array per view, any size, as a list in the order of `spec.views` or
        a dict by view name, where None masks a view of `spec.optional_views`. prompt: needed at first, then
        kept. state: (state_dim,) joint values in the robot's units, needed by every policy that sees the
        state. noise: (horizon, model_action_dim) float32, the flow's start; or seed: an int it is drawn from;
        neither draws fresh noise. Returns
        (horizon, action_dim) float32 actions in the robot's units, at the rate the policy was trained for.
        Raises ObservationError, PromptError, PromptTooLongError, OptionError, CheckpointError (no
        statistics), TokenizerNotFoundError, ActionError (non-finite actions) or ClosedError.
        """
        with self._lock:
            model = self._check_open()
            if self._actions is None:
                raise CheckpointError(
                    f"{self.spec.checkpoint}: no action statistics (norm_stats), so no actions in the "
                    "robot's units; use sample_actions for model space"
                )
            inputs = self._encode(images, prompt, state, noise, seed, keep_prompt=True)
            actions = self._run(model, inputs)
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
            expect_shape("images", images, (model.num_views, 3, size, size))
            expect_shape("image_mask", image_mask, (model.num_views,))
            expect_shape("token_mask", token_mask, np.shape(tokens))
            expect_shape("noise", noise, (self.spec.horizon, self.spec.model_action_dim))
            self._check_tokens(np.asarray(tokens), np.asarray(token_mask), model.config.vocab_size)
            if state is not None:
                expect_shape("state", state, (self.spec.model_action_dim,))
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

    @property
    def calibrated(self) -> bool:
        """Whether the scales this precision needs are in force: always, where it needs none."""
        return self._calibration is None or self._calibration.calibrated

    @property
    def calibration_key(self) -> str:
        """Names the calibrations that fit: another checkpoint byte, configuration, precision, set of views,
        normalisation or library version has another. The first use reads the checkpoint's files, seconds
        for a large one. Raises OptionError (not fp8), CalibrationError (no files) or ClosedError.
        """
        return self._calibration_or_refuse().identity.key

    def calibrate(
        self,
        observations: Iterable[Mapping[str, Any]],
        percentile: float | None = None,
        max_samples: int | None = None,
        verbose: bool = False,
        *,
        estimator: str | None = None,
        source: str = "",
        progress: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        held_out: int = 0,
    ) -> CalibrationReport:
        """Set the activation scales from what the model sees in `observations`; graphs stay valid.

        observations: mappings of predict's arguments: images, and where the policy needs them prompt,
        state, noise or seed; taken one by one and not kept. The magnitudes that a projection sees in every
        sample and denoise step are pooled, and its scale comes from them by an estimator: "mse" (default)
        clips where rounding and clipping to e4m3 together cost least; "percentile" clips above that share
        of the magnitudes; "max" clips nothing. percentile alone chooses the estimator: below 100
        "percentile", 100 "max". All but "max" leave out a sample whose largest magnitude is an outlier
        among at least four (an octave above the median or more, see
        `quantization.statistics.outlying_samples`): the report names it.

        max_samples: calibrate on at most this many. held_out: so many observations more are set aside, one
        in five or spread over max_samples, and fp8 actions are compared with those of bfloat16 activations
        on them. source: kept with the calibration. progress: called with the number of samples so far.
        should_stop: asked between samples; true raises CalibrationCancelledError. verbose: log scales.

        Raises OptionError (nothing to calibrate, no observations, contradicting options), CalibrationError
        (non-finite activations) and what predict raises; whatever is raised, the scales in force stay.
        """
        calibration = self._calibration_or_refuse()
        request = session.Request.checked(percentile, estimator, max_samples, held_out, source)
        runner = session.Runner(
            exclusive=self._exclusive,
            encode=lambda observation: self._encode(**self._encode.arguments(observation)),
            eager=lambda inputs: self._eager(self._check_open(), inputs),
            deployed=lambda inputs: self._run(self._check_open(), inputs),
            robot_actions=self.spec.action_dim or self.spec.model_action_dim,
        )
        report = calibration.calibrate(runner, observations, request, progress, should_stop)
        if verbose:
            for name, scale in report.scales.items():
                logger.info("%s: activation scale %.6g", name, scale)
        return report

    def recalibrate(self) -> None:
        """Drop the calibration in force: the next observation sets the scales again."""
        calibration = self._calibration_or_refuse()
        with self._exclusive():
            calibration.drop()

    def save_calibration(self, path: Path | None = None) -> Path:
        """Keep the calibration in force in a file; None: in the cache, where load_model finds it.

        Returns the file. It appears complete or not at all. Raises CalibrationError (nothing in force),
        OptionError (not fp8), ClosedError or OSError.
        """
        calibration = self._calibration_or_refuse()
        with self._exclusive():
            return calibration.save(path)

    def load_calibration(self, path: Path | None = None) -> None:
        """Put a saved calibration in force, from the next predict on; None: the one in the cache.

        Raises CalibrationNotFoundError, CalibrationMismatchError (of another checkpoint, configuration,
        precision, views, normalisation or version), CalibrationCorruptError, OptionError (not fp8) or
        ClosedError; the calibration in force then stays.
        """
        calibration = self._calibration_or_refuse()
        file, content = calibration.read(path)
        with self._exclusive():
            calibration.put(content)
        logger.info("activation scales from %s: %d samples, %s", file, content.samples, content.source)

    def _calibration_or_refuse(self) -> CalibrationInForce:
        self._check_open()
        if self._calibration is None:
            raise OptionError(
                f"precision {self.precision!r} has no activation scales: calibration is for fp8"
            )
        return self._calibration

    def _calibrate_first(self, forward: Callable[[], torch.Tensor]) -> None:
        if self._calibration is not None:
            self._calibration.from_first(forward)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            self._check_open()
            yield

    def close(self) -> None:
        """Free the model's memory. Any later call raises ClosedError; closing twice is allowed."""
        with self._lock:
            if self._model is not None:
                self._model.fused_expert = None  # it refers back to the model
            self._model = None
            self._engine = None
            self._calibration = None
            self._checkpoint.close()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _check_open(self) -> FlowPolicy:
        if self._model is None:
            raise ClosedError("this policy was closed: load it again with load_model")
        return self._model

    def _run(self, model: FlowPolicy, inputs: ModelInputs) -> FloatArray:
        self._calibrate_first(lambda: self._eager(model, inputs))
        # The graphs are captured for every view; without one the definition runs, slower and exact.
        if self._engine is None or len(inputs.views) < model.num_views:
            return self._take(self._eager(model, inputs))
        if inputs.state is None and self.spec.config == "pi0":
            raise ObservationError("pi0 needs the robot's state with every observation; none was given")
        return self._engine.run(inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy())

    def _eager(self, model: FlowPolicy, inputs: ModelInputs) -> torch.Tensor:
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

    def _put(self, array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=self.device, dtype=dtype)

    def _take(self, actions: torch.Tensor) -> FloatArray:
        result: FloatArray = actions.float().cpu().numpy()
        return result
