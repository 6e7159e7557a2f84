"""How openpi's robots name what they send, and how that becomes our views and state.

A layout maps the keys of an observation to a policy's views (base, left wrist, right wrist, as in
`DEFAULT_VIEWS`; a view that the policy does not have is not read) and joins the parts of the state. A policy
whose views have other names says which camera each is: by position alone, two could change places unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..spec import DEFAULT_VIEWS, PolicySpec
from .refusals import invalid

Array = NDArray[Any]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """One robot's observations.

    images: key of each of base, left wrist and right wrist; None where it has none. state: keys joined in
    this order. width: of the joined state. decode, encode: the robot's convention into the policy's
    (state (n,)) and back (actions (horizon, n)).
    """

    name: str
    images: tuple[str | None, str | None, str | None]
    state: tuple[str, ...]
    width: int
    decode: Callable[[FloatArray], FloatArray] | None = None
    encode: Callable[[FloatArray], FloatArray] | None = None

    def missing_cameras(self, spec: PolicySpec, cameras: Mapping[str, str]) -> list[str]:
        """Views of the policy that no key is known for; cameras: the keys named by the user, by view."""
        return [view for view in spec.views if self._key(view, cameras) is None]

    def read_images(
        self, observation: Mapping[str, Any], spec: PolicySpec, cameras: Mapping[str, str]
    ) -> dict[str, NDArray[np.uint8]]:
        """(H, W, 3) uint8 RGB by the policy's view names. Raises Refusal."""
        images = {}
        for view in spec.views:
            key = self._key(view, cameras)
            if key is None:
                raise invalid(no_camera(self.name, [view]))
            images[view] = as_pixels(key, _entry(observation, key, self.name))
        return images

    def _key(self, view: str, cameras: Mapping[str, str]) -> str | None:
        return cameras.get(view) or dict(zip(DEFAULT_VIEWS, self.images, strict=True)).get(view)

    def read_state(self, observation: Mapping[str, Any]) -> FloatArray:
        """(width,) float32 in the policy's convention. Raises Refusal."""
        parts = [as_numbers(key, _entry(observation, key, self.name)) for key in self.state]
        state = np.concatenate(parts)
        if state.shape != (self.width,):
            raise invalid(
                f"{' + '.join(self.state)}: layout {self.name} has {self.width} values, got {state.size}"
            )
        if not np.isfinite(state).all():
            raise invalid(f"state: values at {np.flatnonzero(~np.isfinite(state)).tolist()} are not finite")
        return state if self.decode is None else self.decode(state)


def no_camera(layout: str, views: Sequence[str]) -> str:
    """What to do about views that a layout has no camera for."""
    return (
        f"layout {layout} has no camera for {', '.join(views)}: start the server with --camera VIEW=KEY "
        "for it, or with fewer views"
    )


def _entry(observation: Mapping[str, Any], key: str, layout: str) -> Any:
    """A value by its key, where a/b also means b inside a."""
    outer, _, inner = key.partition("/")
    if key in observation:
        return observation[key]
    nested = observation.get(outer) if inner else None
    if isinstance(nested, Mapping) and inner in nested:
        return nested[inner]
    got = sorted(map(str, observation))
    raise invalid(f"no {key!r} in the observation: layout {layout} needs it; got {got}")


def as_pixels(key: str, value: Any) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 from (H, W, 3) or (3, H, W), uint8 or floats from 0 to 1.

    Floats are truncated, as openpi's server does. Raises Refusal.
    """
    if not isinstance(value, np.ndarray) or value.ndim != 3:
        got = value.shape if isinstance(value, np.ndarray) else type(value).__name__
        raise invalid(f"{key}: expected an image (H, W, 3) or (3, H, W), got {got}")
    pixels = value
    if value.dtype.kind == "f":
        if not (np.isfinite(value).all() and value.min(initial=0) >= 0 and value.max(initial=0) <= 1):
            raise invalid(f"{key}: a float image holds values from 0 to 1")
        pixels = (255 * value).astype(np.uint8)
    elif value.dtype != np.uint8:
        raise invalid(f"{key}: expected uint8 pixels, or floats from 0 to 1, got {value.dtype}")
    if pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[2] != 3 or 0 in pixels.shape:
        raise invalid(f"{key}: expected an image (H, W, 3) or (3, H, W), got {value.shape}")
    return np.ascontiguousarray(pixels)


def as_numbers(key: str, value: Any) -> FloatArray:
    """(n,) float32 from numbers, a list of them or a one-dimensional array. Raises Refusal."""
    try:
        array = np.atleast_1d(np.asarray(value))
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise ValueError
        with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused
            return array.astype(np.float32)
    except (ValueError, TypeError) as error:
        raise invalid(f"{key}: expected a list of numbers, got {str(value)[:60]!r}") from error


# openpi's policies were trained in Trossen's joint convention; an ALOHA robot reports four joints with the
# other sign, and its grippers as a fraction of the finger's travel instead of an angle.
ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float32)
ALOHA_GRIPPERS = [6, 13]
FINGER_CLOSED_M, FINGER_OPEN_M = 0.01844, 0.05800
HORN_M, ARM_M = 0.022, 0.036
ANGLE_CLOSED, ANGLE_OPEN = 0.5476, 1.6296  # rad, what openpi scales to 0 and 1 in a state
COMMAND_CLOSED, COMMAND_OPEN = -0.6213, 1.4910  # rad, the puppet's joint at 0 and 1 of a command


def aloha_to_policy(state: FloatArray) -> FloatArray:
    """(14,) of an ALOHA robot in the policy's convention.

    The finger is the end of an arm on a horn (a slider crank): with horn r, arm l and finger position x, the
    law of cosines gives sin(angle) = (r² + x² - l²) / (2 r x).
    """
    result = np.asarray(state, np.float64) * ALOHA_SIGNS
    finger = FINGER_CLOSED_M + result[ALOHA_GRIPPERS] * (FINGER_OPEN_M - FINGER_CLOSED_M)
    finger = np.maximum(finger, 1e-6)
    sine = (HORN_M**2 + finger**2 - ARM_M**2) / (2 * HORN_M * finger)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    result[ALOHA_GRIPPERS] = (angle - ANGLE_CLOSED) / (ANGLE_OPEN - ANGLE_CLOSED)
    return result.astype(np.float32)


def policy_to_aloha(actions: FloatArray) -> FloatArray:
    """(horizon, 14) of the policy as an ALOHA robot's commands."""
    result = np.asarray(actions, np.float64) * ALOHA_SIGNS
    angle = result[:, ALOHA_GRIPPERS] + ANGLE_CLOSED
    result[:, ALOHA_GRIPPERS] = (angle - COMMAND_CLOSED) / (COMMAND_OPEN - COMMAND_CLOSED)
    return result.astype(np.float32)


ALOHA_CAMERAS = ("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist")

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "libero", ("observation/image", "observation/wrist_image", None), ("observation/state",), 8
        ),
        Layout(
            "droid",
            ("observation/exterior_image_1_left", "observation/wrist_image_left", None),
            ("observation/joint_position", "observation/gripper_position"),
            8,
        ),
        Layout("aloha", ALOHA_CAMERAS, ("state",), 14, aloha_to_policy, policy_to_aloha),
        Layout("aloha_sim", ALOHA_CAMERAS, ("state",), 14),
    )
}
LAYOUT_NAMES = ("auto", *LAYOUTS, "native")


def check_layout(name: str, spec: PolicySpec, cameras: Mapping[str, str]) -> None:
    """Refuses a layout whose robot is not the policy's. Raises OptionError."""
    unknown = sorted(set(cameras) - set(spec.views))
    if unknown:
        raise OptionError(f"--camera {unknown[0]}: the policy's views are {', '.join(spec.views)}")
    if name not in LAYOUT_NAMES:
        raise OptionError(f"unknown layout {name!r}: expected one of {', '.join(LAYOUT_NAMES)}")
    layout = LAYOUTS.get(name)
    if layout is None:
        return
    if spec.state_dim is not None and spec.state_dim != layout.width:
        raise OptionError(
            f"layout {name} has a state of {layout.width} values, the policy one of {spec.state_dim}"
        )
    missing = layout.missing_cameras(spec, cameras)
    if missing:
        raise OptionError(no_camera(name, missing))
    if layout.encode is not None and spec.action_dim not in (None, layout.width):
        raise OptionError(
            f"layout {name} converts {layout.width} actions, the policy gives {spec.action_dim}"
        )


def layout_of(observation: Mapping[str, Any], name: str) -> Layout | None:
    """The layout of an observation; None is our own keys. Raises Refusal.

    ALOHA's keys do not tell whether joints and grippers follow the real robot's convention or the
    simulator's: guessing would flip four joints, so that one must be named when the server is started.
    """
    if name != "auto":
        return LAYOUTS.get(name)
    found = [layout for layout in LAYOUTS.values() if _first_image(layout, observation)]
    if not found:
        return None
    if len(found) > 1:
        names = " or ".join(f"--layout {layout.name}" for layout in found)
        raise invalid(f"an ALOHA observation: start the server with {names}, whose joint signs differ")
    return found[0]


def _first_image(layout: Layout, observation: Mapping[str, Any]) -> bool:
    key = layout.images[0] or ""
    outer, _, inner = key.partition("/")
    nested = observation.get(outer)
    return key in observation or (isinstance(nested, Mapping) and inner in nested)
