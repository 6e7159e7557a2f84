"""The policy object: physical units outside, model space inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import device_loss
from .cache import cache_directory, content_digest
from .checkpoints.base import Checkpoint
from .checkpoints.tokenizer import BOS_ID
from .engine import Engine
from .errors import (
    ActionError,
    CheckpointError,
    ClosedError,
    DeviceLostError,
    ObservationError,
    OptionError,
    TokenizerNotFoundError,
)
from .guidance import Guidance, RtcMode
from .inputs import (
    FloatArray,
    Images,
    ModelInputs,
    ObservationEncoder,
    State,
    check_tokens,
    checked_seed,
    expect_shape,
)
from .models import FlowPolicy, Pi0Fast, PrefixPolicy
from .models.flow import Guide, guided
from .models.pi0_fast import BROKEN, NOTHING
from .models.weights import unquantised_weights
from .options import Target
from .processing.actions import ActionTransform, refuse_non_finite
from .processing.guidance import GuidanceEncoder, GuideArrays
from .processing.images import prepare_image
from .quantization.artifact import identity_of
from .quantization.calibrated import Calibrated
from .quantization.in_force import CalibrationInForce
from .quantization.runner import Runner
from .spec import PolicySpec
from .turns import Turns

if TYPE_CHECKING:
    from .processing.fast_tokens import ActionTokens


class Policy(Calibrated):
    """A loaded policy; made by `load_model`. Calls may come from any thread and run one at a time;
    ReentryError for one from inside another, as of a signal handler.
    """

    def __init__(
        self,
        model: PrefixPolicy,
        checkpoint: Checkpoint,
        target: Target,
        engine: Engine | None = None,
        action_tokens: ActionTokens | None = None,
        rtc: RtcMode = "off",
    ) -> None:
        """action_tokens: what pi0fast's output means; without them it has no `predict`."""
        self._model: PrefixPolicy | None = model
        self._action_tokens = action_tokens
        self._engine = engine
        self._target = target
        self._lock = Turns()
        self._lost = False  # the GPU, see `device_loss`
        self._checkpoint = checkpoint
        self.spec = PolicySpec.of(checkpoint, model.num_views)
        self._encode = ObservationEncoder(checkpoint, self.spec, model.noise_shape, model.draw_noise)
        views = self.spec.views
        self._calibration = (
            CalibrationInForce(
                model,
                lambda: identity_of(checkpoint, views, target.precision),
                lambda names: unquantised_weights(model, model.config, checkpoint, target.device, names),
            )
            if target.precision == "fp8"
            else None
        )
        stats = checkpoint.norm_stats
        self._actions = (
            ActionTransform(stats.actions, checkpoint.rules, checkpoint.action_dim, checkpoint.delta_actions)
            if stats and stats.actions and checkpoint.action_dim
            else None
        )
        self.rtc: RtcMode = rtc  # real-time chunking, as loaded
        self._encode_guidance = GuidanceEncoder(self.spec, self._actions, rtc)

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

    @property
    def checkpoint_digest(self) -> str:
        """SHA-256 over every byte of the weight files, which calibrations are bound to; read once."""
        return content_digest(self._checkpoint.store.files, cache_directory() / "digests.json")

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
        rtc: Guidance | None = None,
    ) -> FloatArray:
        """One action chunk from one observation.

        images: one (H, W, 3) uint8 RGB array per view, any size, as a list in the order of `spec.views` or
        a dict by view name, where None masks a view of `spec.optional_views`. prompt: needed at first, then
        kept. state: (state_dim,) joint values in the robot's units, needed by every policy that sees the
        state. noise: (horizon, model_action_dim) float32, the flow's start; or seed: an int it is drawn from;
        neither draws fresh noise. rtc: what the chunk is to go on from, for a policy loaded with
        rtc="guided" or "trained"; None: nothing. Returns (horizon, action_dim) float32 actions in the robot's
        units, at the rate the policy was trained for.
        Raises ObservationError, PromptError, PromptTooLongError, OptionError, CheckpointError (no
        statistics), TokenizerNotFoundError, ActionError (non-finite actions), NoStopError and
        ActionTokenError (pi0fast: tokens that are no chunk), DeviceLostError (the process must be started
        again) or ClosedError.
        """
        with self._turn():
            model = self._check_open()
            if self._actions is None:
                raise CheckpointError(
                    f"{self.spec.checkpoint}: no action statistics (norm_stats), so no actions in the "
                    "robot's units; use sample_actions for model space"
                )
            if self._engine is not None:
                self._engine.expect()
            inputs = self._encode(
                images, prompt, state, noise, seed, keep_prompt=True, on_views=self._begin
            )
            if isinstance(model, Pi0Fast) and self._action_tokens is None:
                raise TokenizerNotFoundError(
                    f"{self.spec.checkpoint}: the tokenizers of its action tokens were not found when it was "
                    "loaded (the log says where they were looked for): load it again with them in place"
                )
            raw = None if state is None else np.asarray(state, np.float32)  # real: it was encoded
            guide = None if rtc is None else self._encode_guidance(rtc, raw)
            actions = self._run(model, inputs, guide)
            refuse_non_finite(actions, model.range_limit)
            return self._actions.to_physical(actions, raw)

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
        with self._exclusive():
            model = self._check_open()
            if not isinstance(model, FlowPolicy):
                raise OptionError(f"{self.spec.config} generates tokens, not actions: use sample_tokens")
            prefix = self._prefix(model, images, image_mask, tokens, token_mask)
            expect_shape("noise", noise, (self.spec.horizon, self.spec.model_action_dim))
            if state is not None:
                expect_shape("state", state, (self.spec.model_action_dim,))
            tensors = (
                *prefix,
                None if state is None else self._put(state, torch.float32),
                self._put(noise, torch.float32),
            )
            self._calibrate_first(lambda: model.sample_actions(*tensors))
            actions: FloatArray = model.sample_actions(*tensors).float().cpu().numpy()
            refuse_non_finite(actions, model.range_limit)
            return actions

    def sample_tokens(
        self,
        images: FloatArray,
        image_mask: NDArray[np.bool_],
        tokens: NDArray[np.int64],
        token_mask: NDArray[np.bool_],
        max_tokens: int,
        stop: int | None = None,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        pruned: bool = False,
    ) -> NDArray[np.int64]:
        """pi0fast's model alone, without processing: for parity work.

        The first four as in `sample_actions`; the family's BOS is appended to the prompt here. stop: the id
        that ends the text; None generates max_tokens. temperature: 0 is greedy, else tokens are drawn, by
        `seed`. pruned: only the ids of an action chunk compete, as in `predict`, in place of the whole
        vocabulary. Returns ids (n,) int64, n <= max_tokens, the stop among them. Raises ObservationError for
        shapes that do not fit, OptionError (not pi0fast, max_tokens, temperature) and ActionError
        (non-finite scores).
        """
        with self._exclusive():
            model = self._check_open()
            if not isinstance(model, Pi0Fast):
                raise OptionError(f"{self.spec.config} generates actions, not tokens: use sample_actions")
            if not temperature >= 0:
                raise OptionError(f"temperature must be 0 or more, got {temperature}")
            pixels, present, text, valid = self._prefix(model, images, image_mask, tokens, token_mask)
            if self._checkpoint.rules.end_with_bos:
                text = torch.cat((text, text.new_tensor([BOS_ID])))
                valid = torch.cat((valid, valid.new_tensor([True])))
            generator = torch.Generator()
            _ = generator.seed() if seed is None else generator.manual_seed(checked_seed(seed))
            arguments = (max_tokens, stop, temperature, generator, pruned)
            self._calibrate_first(lambda: model.sample_tokens(pixels, present, text, valid, *arguments))
            found = model.sample_tokens(pixels, present, text, valid, *arguments).cpu().numpy()
            self._refuse_broken(found)
            return found

    def _prefix(
        self,
        model: PrefixPolicy,
        images: FloatArray,
        image_mask: NDArray[np.bool_],
        tokens: NDArray[np.int64],
        token_mask: NDArray[np.bool_],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A prefix in model space, checked, on the device."""
        size = model.config.vision.image_size
        expect_shape("images", images, (model.num_views, 3, size, size))
        expect_shape("image_mask", image_mask, (model.num_views,))
        expect_shape("token_mask", token_mask, np.shape(tokens))
        room = self.spec.prompt_capacity - self._checkpoint.rules.end_with_bos
        check_tokens(np.asarray(tokens), np.asarray(token_mask), model.config.vocab_size, room)
        return (
            self._put(images, torch.float32),
            self._put(image_mask, torch.bool),
            self._put(tokens, torch.int64),
            self._put(token_mask, torch.bool),
        )

    @staticmethod
    def _refuse_broken(tokens: NDArray[np.int64]) -> None:
        if (tokens == BROKEN).any():
            raise ActionError("the scores of an action token are not finite: the chunk was dropped")

    def _decoded(self, output: NDArray[Any]) -> FloatArray:
        """The model's output as actions (horizon, model_action_dim) in model space."""
        if self._action_tokens is None:
            return output
        tokens = output[output != NOTHING]
        self._refuse_broken(tokens)
        return self._action_tokens.decode(tokens)

    def _runner(self) -> Runner:
        return Runner(
            exclusive=self._exclusive,
            watched=self._watched,
            encode=lambda observation: self._encode(**self._encode.arguments(observation)),
            eager=lambda inputs: self._eager(self._check_open(), inputs),
            reference=lambda inputs: self._decoded(self._eager(self._check_open(), inputs).cpu().numpy()),
            deployed=lambda inputs: self._run(self._check_open(), inputs),
            robot_actions=self.spec.action_dim or self.spec.model_action_dim,
            draw_noise=self._model.draw_noise if isinstance(self._model, FlowPolicy) else None,
            range_limit=None if self._model is None else self._model.range_limit,
        )

    def _calibrate_first(self, forward: Callable[[], torch.Tensor]) -> None:
        if self._calibration is not None and not self._calibration.calibrated:
            with self._settling():
                self._calibration.from_first(forward)

    def _settling(self) -> contextlib.AbstractContextManager[None]:
        """For what runs on the caller's stream, which the engine's graphs then need not wait for."""
        return contextlib.nullcontext() if self._engine is None else self._engine.caller_settled()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._turn(), self._settling():
            yield

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """For what runs on the engine's stream alone; all else takes `_exclusive`."""
        with self._lock.one():
            self._check_open()
            if self._calibration is not None and not self._lost:  # a lost GPU says so itself
                self._calibration.weights.check()
            with self._watched():
                yield

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with device_loss.recognised():
                yield
        except DeviceLostError:
            if not self._lost:
                device_loss.leave(self._model, self._engine)
            self._lost = True
            raise

    def close(self) -> None:
        """Free the model's memory, but for that of a lost GPU. Any later call raises ClosedError; closing
        twice is allowed.
        """
        with self._lock.one():
            if self._model is not None and not self._lost:
                self._model.release()
            self._model = None
            self._engine = None
            self._encode.release()
            self._calibration = None
            self._checkpoint.close()
            if self.device.type == "cuda" and not self._lost:
                torch.cuda.empty_cache()

    def _check_open(self) -> PrefixPolicy:
        if self._model is None:
            raise ClosedError("this policy was closed: load it again with load_model")
        return self._model

    def _run(
        self, model: PrefixPolicy, inputs: ModelInputs, guide: GuideArrays | None = None
    ) -> FloatArray:
        self._calibrate_first(lambda: self._eager(model, inputs))
        # The graphs are captured for every view; without one the definition runs, slower and exact.
        if self._engine is None or len(inputs.views) < model.num_views:
            with self._settling():
                return self._decoded(self._eager(model, inputs, guide).cpu().numpy())
        if inputs.state is None and self.spec.config == "pi0":
            raise ObservationError("pi0 needs the robot's state with every observation; none was given")
        output = self._engine.run(inputs.views, inputs.tokens, inputs.state, inputs.noise.numpy(), guide)
        return self._decoded(output)

    def _begin(self, views: list[NDArray[np.uint8]]) -> None:
        """Let the GPU see the images while the prompt is encoded; not before the first scales are set."""
        if self._engine is not None and self.calibrated and len(views) == len(self.spec.views):
            self._engine.begin(views)

    def _eager(
        self, model: PrefixPolicy, inputs: ModelInputs, guide: GuideArrays | None = None
    ) -> torch.Tensor:
        """The definition, at the observation's own lengths."""
        size, resize = model.config.vision.image_size, self._checkpoint.rules.resize
        pixels = torch.stack([prepare_image(view, size, resize, self.device) for view in inputs.views])
        with guided(model, None if guide is None else self._guide(guide)):
            return model.sample(
                pixels,
                torch.ones(len(inputs.views), dtype=torch.bool, device=self.device),
                self._put(inputs.tokens, torch.int64),
                torch.ones(len(inputs.tokens), dtype=torch.bool, device=self.device),
                None if inputs.state is None else self._put(inputs.state, torch.float32),
                inputs.noise.to(self.device),
            )

    def _guide(self, guide: GuideArrays) -> Guide:
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in guide.arrays().items()}
        return Guide(**tensors, trained=self.rtc == "trained")

    def _put(self, array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=self.device, dtype=dtype)
