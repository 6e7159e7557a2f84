"""From a request's bytes to an observation: JSON, multipart and msgpack. Runs on a decoding thread."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from ..inputs import Images
from ..spec import PolicySpec
from . import wire
from .images import decode_image, from_base64
from .layouts import as_numbers, as_pixels, layout_of
from .multipart import media_type, parts_of
from .refusals import Refusal, invalid
from .settings import ServerSettings
from .worker import Observation

MAX_PROMPT = 4096
MAX_STATE = 1024
MAX_IMAGES = 8
MAX_SEED = 2**63 - 1
MAX_PARTS = 32

Shape = list[int]


class PredictRequest(pydantic.BaseModel):
    """A JSON request of POST /predict."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "prompt": "pick up the block",
                "images": {"base_0_rgb": "<base64 of a PNG or JPEG file>", "left_wrist_0_rgb": "<base64>"},
                "state": [0.0, -1.57, 1.57, -1.57, -1.57, 0.0, 0.02],
                "seed": 7,
            }
        },
    )

    images: list[str] | dict[str, str | None] = pydantic.Field(
        description="Base64 of JPEG or PNG files, or of raw RGB pixels with image_shape: one for every view, "
        "as a list in the policy's order or by view name, null for a camera that the robot does not have.",
        min_length=1,
        max_length=MAX_IMAGES,
    )
    image_shape: Shape | list[Shape] | dict[str, Shape] | None = pydantic.Field(
        default=None,
        description="[height, width, 3] of raw pixels: one for all images, or one for each.",
    )
    state: list[float] | None = pydantic.Field(
        default=None, description="The robot's state in its own units.", max_length=MAX_STATE
    )
    prompt: str | None = pydantic.Field(
        default=None, description="What the robot shall do.", max_length=MAX_PROMPT
    )
    seed: int | None = pydantic.Field(
        default=None,
        description="Of the noise; without one the server draws its own and returns it.",
        ge=0,
        le=MAX_SEED,
    )
    deadline_ms: float | None = pydantic.Field(
        default=None, description="Answer within this time or not at all.", gt=0, allow_inf_nan=False
    )


class PredictResponse(pydantic.BaseModel):
    """The answer of POST /predict."""

    actions: list[list[float]] = pydantic.Field(
        description="One row of robot units for every time step: (horizon, action_dim)."
    )
    shape: list[int] = pydantic.Field(description="[horizon, action_dim]")
    action_names: list[str] | None = pydantic.Field(description="One name for every column, where known.")
    rate_hz: float | None = pydantic.Field(description="Time steps a second, where known.")
    latency_ms: float = pydantic.Field(description="The model's time.")
    queue_ms: float = pydantic.Field(description="The wait for the model.")
    seed: int = pydantic.Field(description="The seed that was used.")
    checkpoint: str = pydantic.Field(description="SHA-256 over the checkpoint's weights.")


class ErrorResponse(pydantic.BaseModel):
    """What every refused request is answered."""

    error: str = pydantic.Field(description="A stable code for programs.")
    detail: str = pydantic.Field(description="What was expected, what came, what to do.")


class Reader:
    """Reads requests for one policy. Every method raises Refusal."""

    def __init__(self, spec: PolicySpec, settings: ServerSettings) -> None:
        self.spec, self.settings = spec, settings

    def read(self, content_type: str, body: bytes) -> tuple[Observation, float]:
        """The observation of an HTTP body, and its deadline in seconds."""
        kind, options = media_type(content_type)
        if kind == "application/json":
            return self.json(body)
        if kind == "multipart/form-data":
            return self.multipart(options.get("boundary"), body)
        if kind in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
            return self.message(wire.unpack(body))
        raise Refusal(
            415,
            "unsupported_media_type",
            f"content-type {content_type[:80]!r}: expected application/json, multipart/form-data or "
            "application/msgpack",
        )

    def json(self, body: bytes) -> tuple[Observation, float]:
        """A `PredictRequest`."""
        try:
            request = PredictRequest.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise invalid(_first_problems(error)) from error
        images = self._json_images(request)
        state = None if request.state is None else as_numbers("state", request.state)
        return self._observation(images, state, request.prompt, request.seed, request.deadline_ms)

    def _json_images(self, request: PredictRequest) -> Images:
        given = request.images
        by_name: Mapping[str, str | None] = (
            given
            if isinstance(given, dict)
            else {f"images[{index}]": text for index, text in enumerate(given)}
        )
        shapes = _shapes(request.image_shape, list(by_name), len(by_name))
        pixels = {
            name: None
            if text is None
            else decode_image(name, from_base64(name, text), shape, self.settings.max_pixels)
            for (name, text), shape in zip(by_name.items(), shapes, strict=True)
        }
        if isinstance(given, dict):
            return pixels
        return [image for image in pixels.values() if image is not None]

    def multipart(self, boundary: str | None, body: bytes) -> tuple[Observation, float]:
        """One file for every view, named after it; other fields as in JSON, their values written as JSON."""
        fields, files = parts_of(boundary, body)
        unknown = sorted(set(fields) - {"prompt", "state", "seed", "deadline_ms", "image_shape"})
        if unknown:
            raise invalid(f"field {unknown[0]!r}: expected prompt, state, seed, deadline_ms or image_shape")
        if not files:
            raise invalid(f"no image: send a file for each of {', '.join(self.spec.views)}")
        values = {name: _json_field(name, text) for name, text in fields.items() if name != "prompt"}
        shapes = _shapes(values.get("image_shape"), list(files), len(files))
        images = {
            name: decode_image(name, content, shape, self.settings.max_pixels)
            for (name, content), shape in zip(files.items(), shapes, strict=True)
        }
        state = None if values.get("state") is None else as_numbers("state", values["state"])
        return self._observation(
            images, state, fields.get("prompt"), values.get("seed"), values.get("deadline_ms")
        )

    def message(self, content: Any) -> tuple[Observation, float]:
        """A msgpack map: an openpi layout, or our own keys images, state, prompt, seed, deadline_ms."""
        if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
            raise invalid(f"expected a map with text keys, got {type(content).__name__}")
        prompt, seed, limit = (_scalar(content.get(name)) for name in ("prompt", "seed", "deadline_ms"))
        layout = layout_of(content, self.settings.layout)
        if layout is None:
            state = None if content.get("state") is None else as_numbers("state", content["state"])
            return self._observation(self._own_images(content), state, prompt, seed, limit)
        images = layout.read_images(content, self.spec, self.settings.cameras)
        return self._observation(images, layout.read_state(content), prompt, seed, limit, layout.encode)

    def _own_images(self, content: Mapping[str, Any]) -> Images:
        images = content.get("images")
        if isinstance(images, Mapping) and 0 < len(images) <= MAX_IMAGES:
            return {
                str(name): None if value is None else as_pixels(str(name), value)
                for name, value in images.items()
            }
        if isinstance(images, list) and 0 < len(images) <= MAX_IMAGES:
            return [as_pixels(f"images[{index}]", value) for index, value in enumerate(images)]
        raise invalid(
            f"images: expected a map of {', '.join(self.spec.views)} or a list in that order, or the keys of "
            f"an openpi layout; the observation has {sorted(content)}"
        )

    def _observation(
        self,
        images: Images,
        state: NDArray[np.float32] | None,
        prompt: Any,
        seed: Any,
        deadline_ms: Any,
        finish: Any = None,
    ) -> tuple[Observation, float]:
        text = self.settings.default_prompt if prompt is None else prompt
        if not isinstance(text, str) or not 0 < len(text) <= MAX_PROMPT:
            got = "none" if text is None else str(text)[:60]
            raise invalid(f"prompt: every request needs a text of 1 to {MAX_PROMPT} characters, got {got!r}")
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED
        ):
            raise invalid(f"seed: expected a whole number from 0 to 2^63 - 1, got {str(seed)[:60]!r}")
        return Observation(images, text, state, seed, finish), self._deadline_s(deadline_ms)

    def _deadline_s(self, deadline_ms: Any) -> float:
        if deadline_ms is None:
            return self.settings.deadline_s
        number = isinstance(deadline_ms, (int, float)) and not isinstance(deadline_ms, bool)
        if not number or not 0 < deadline_ms < math.inf:
            raise invalid(f"deadline_ms: expected a number above 0, got {str(deadline_ms)[:60]!r}")
        return min(float(deadline_ms) / 1e3, self.settings.deadline_s)


def _first_problems(error: pydantic.ValidationError) -> str:
    """The first three problems as one line: where, what, and what came."""
    lines = []
    for problem in error.errors(include_url=False)[:3]:
        place = ".".join(str(part)[:40] for part in problem["loc"]) or "body"
        came = repr(problem.get("input"))
        lines.append(f"{place}: {problem['msg']}, got {came[:57] + '…' if len(came) > 60 else came}")
    more = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more > 0 else "")


def _shapes(given: Any, names: list[str] | None, count: int) -> list[Any]:
    """One shape, or None, for each image. Raises Refusal."""
    if given is None:
        return [None] * count
    if isinstance(given, Mapping):
        if names is None or set(given) != set(names):
            raise invalid(f"image_shape: names {sorted(given)} are not those of the images")
        shapes = [given[name] for name in names]
    elif isinstance(given, list) and given and isinstance(given[0], list):
        if len(given) != count:
            raise invalid(f"image_shape: {len(given)} shapes for {count} images")
        shapes = given
    else:
        shapes = [given] * count
    for shape in shapes:
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise invalid(f"image_shape: expected [height, width, 3], got {str(shape)[:60]}")
    return shapes


def _scalar(value: Any) -> Any:
    """A NumPy scalar or array of one element as a plain number."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.size == 1 else value


def _json_field(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"field {name!r}: expected JSON, got {text[:60]!r}") from error
