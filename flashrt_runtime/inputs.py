"""From an observation in physical units to a model's inputs: views in order, tokens, padded state, noise."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoints.base import Checkpoint
from .checkpoints.tokenizer import resolve_tokenizer
from .errors import CheckpointError, ClosedError, ObservationError, OptionError, PromptError
from .processing.images import fitted_size
from .processing.prompt import PromptEncoder
from .processing.state import StateTransform
from .spec import PolicySpec, view_aliases

Images = Sequence[NDArray[np.uint8]] | Mapping[str, NDArray[np.uint8] | None]
State = NDArray[np.floating] | Sequence[float]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class ModelInputs:
    """One observation in model space: views (H, W, 3) uint8 of any size, those that are there; tokens (L,)
    int64; state (model_action_dim,) float32 padded or None; noise of the model's shape, float32 on the host.
    """

    views: list[NDArray[np.uint8]]
    tokens: NDArray[np.int64]
    state: FloatArray | None
    noise: torch.Tensor


class ObservationEncoder:
    """Checks observations and turns them into `ModelInputs`; holds the prompt in force.

    `set_prompt` and `prompt` may be used while another thread encodes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: PolicySpec,
        noise_shape: tuple[int, int],
        draw_noise: Callable[[torch.Generator], torch.Tensor],
    ) -> None:
        """noise_shape, draw_noise: the model's."""
        self._checkpoint = checkpoint
        self.spec = spec
        self._noise_shape, self._draw_noise = noise_shape, draw_noise
        stats = checkpoint.norm_stats
        self._state = (
            StateTransform(stats.state, checkpoint.rules, checkpoint.state_dim)
            if stats and stats.state
            else None
        )
        self._prompt_lock = threading.Lock()  # held for a tokenisation at most, never for an inference
        self._prompt: str | None = None
        self._tokenizer: PromptEncoder | None = None
        self._noise = torch.Generator()
        self._noise.seed()

    @property
    def prompt(self) -> str | None:
        """The prompt in force, as given; None before the first."""
        return self._prompt

    def release(self) -> None:
        """Let go of the model; no observation may be encoded any more."""
        self._draw_noise = _closed

    def set_prompt(self, prompt: str) -> None:
        """Check and take a prompt; see `Policy.set_prompt` for what it raises."""
        some_state = np.zeros(self.spec.state_dim or 0, np.float32) if self._needs_state_text else None
        with self._prompt_lock:
            self._encoder().encode(prompt, some_state)
            self._prompt = prompt

    def __call__(
        self,
        images: Images,
        prompt: str | None = None,
        state: State | None = None,
        noise: FloatArray | None = None,
        seed: int | None = None,
        *,
        keep_prompt: bool = False,
        on_views: Callable[[list[NDArray[np.uint8]]], None] | None = None,
    ) -> ModelInputs:
        """`Policy.predict`'s arguments in model space, raising as it does.

        keep_prompt: `prompt` is in force from now on; otherwise it serves this observation alone. on_views:
        called with the ordered views as soon as they are checked, before all else.
        """
        views = self.ordered_views(images)
        if on_views is not None:
            on_views(views)
        start = self._start_noise(noise, seed)
        normalized = self.normalized_state(state)
        tokens = self._tokens(prompt, normalized, keep_prompt)
        return ModelInputs(views, tokens, self._padded(normalized), start)

    @staticmethod
    def arguments(observation: Mapping[str, Any]) -> dict[str, Any]:
        """An observation as a mapping of `predict`'s arguments, checked for names that it does not have."""
        known = {"images", "prompt", "state", "noise", "seed"}
        if "images" not in observation or not known.issuperset(observation):
            raise ObservationError(
                f"expected images and any of prompt, state, noise and seed; got {sorted(observation)}"
            )
        return dict(observation)

    @property
    def _needs_state_text(self) -> bool:
        return self._checkpoint.rules.state_in_prompt

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

    def _padded(self, normalized: FloatArray | None) -> FloatArray | None:
        if normalized is None or self._state is None or self.spec.config == "pi0fast":
            return None  # pi0fast reads the state from its prompt alone, however wide it is
        return self._state.pad(normalized, self.spec.model_action_dim)

    def ordered_views(self, images: Images) -> list[NDArray[np.uint8]]:
        """The images in the order of `spec.views`, each checked; those given as None are left out."""
        size = self._checkpoint.config.vision.image_size
        names = self.spec.views
        if isinstance(images, Mapping):
            aliases = view_aliases(names)
            by_name = {aliases.get(name, name): image for name, image in images.items()}
            if set(by_name) != set(names) or len(by_name) != len(images):
                raise ObservationError(f"expected images for the views {list(names)}, got {list(images)}")
            absent = [name for name in names if by_name[name] is None]
            if len(absent) == len(names) or not set(absent) <= set(self.spec.optional_views):
                raise ObservationError(f"no image of {', '.join(absent)}, which an observation needs")
            if absent and self._checkpoint.rules.show_absent_views:
                by_name |= {name: np.zeros((size, size, 3), np.uint8) for name in absent}
                absent = []
            names = tuple(name for name in names if name not in absent)
            ordered: list[NDArray[np.uint8] | None] = [by_name[name] for name in names]
        else:
            if not isinstance(images, Iterable) or getattr(images, "ndim", 1) == 0:
                raise ObservationError(
                    f"images: expected {len(names)} images in the order {list(names)}, or a dict of them by "
                    f"name; got {type(images).__name__}"
                )
            ordered = list(images)
            if len(ordered) != len(names):
                raise ObservationError(
                    f"expected {len(names)} images in the order {list(names)}, got {len(ordered)}"
                )
        checked: list[NDArray[np.uint8]] = []
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
            checked.append(image)
        return checked

    def normalized_state(self, state: State | None) -> FloatArray | None:
        """state: (state_dim,) in the robot's units, checked; None where it may be left out."""
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
        values = real_array("state", state)
        if self._state is None:
            raise CheckpointError(
                f"{self.spec.checkpoint}: no state statistics (norm_stats), so state= cannot be used"
            )
        if values.shape != (self.spec.state_dim,):
            raise ObservationError(f"state: expected shape ({self.spec.state_dim},), got {values.shape}")
        return self._state.normalize(values)

    def _start_noise(self, noise: FloatArray | None, seed: int | None) -> torch.Tensor:
        if noise is not None:
            if seed is not None:
                raise OptionError("noise= and seed= were both given: pass one")
            values = real_array("noise", noise)
            expect_shape("noise", values, self._noise_shape)
            return torch.from_numpy(values)
        # drawn on the host, so that a seed gives the same noise on every device
        generator = self._noise if seed is None else torch.Generator().manual_seed(checked_seed(seed))
        return self._draw_noise(generator)


def _closed(generator: torch.Generator) -> torch.Tensor:
    raise ClosedError("this policy was closed: load it again with load_model")


def checked_seed(seed: object) -> int:
    """A seed as an int. Raises OptionError."""
    try:
        if isinstance(seed, bool | np.bool_):
            raise TypeError
        value = operator.index(seed)  # type: ignore[arg-type]
    except TypeError as error:
        raise OptionError(f"seed: expected an integer, got {seed!r}") from error
    if not 0 <= value < 1 << 64:
        raise OptionError(f"seed: expected an integer from 0 to 2**64 - 1, got {value}")
    return value


def real_array(name: str, value: object) -> FloatArray:
    """A copy of `value` as float32. Raises ObservationError for what holds no real numbers."""
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            with np.errstate(over="ignore"):  # what becomes infinite is refused with its position
                return array.astype(np.float32)
        kind = str(array.dtype)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths; tensors of the GPU
        kind = f"{type(value).__name__}, which NumPy does not take ({error})"
    raise ObservationError(f"{name}: expected an array of real numbers, got {kind}")


def expect_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    """Raise ObservationError unless `value` has this shape and only finite numbers."""
    array = np.asarray(value)
    if array.shape != tuple(shape):
        raise ObservationError(f"{name}: expected shape {tuple(shape)}, got {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ObservationError(f"{name}: holds values that are not finite")


def check_tokens(tokens: NDArray[Any], mask: NDArray[Any], vocab_size: int, room: int) -> None:
    """Raise ObservationError unless tokens are ids (text,) and at most `room` of them count by the mask."""
    if tokens.ndim != 1:
        raise ObservationError(f"tokens: expected shape (text,), got {tokens.shape}")
    valid = int(np.sum(mask))
    if valid > room:
        raise ObservationError(f"{valid} valid tokens do not fit {room}")
    if tokens.size and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise ObservationError(
            f"tokens: expected ids from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
        )
