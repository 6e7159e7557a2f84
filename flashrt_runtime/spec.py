"""What a policy takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoints.base import Checkpoint

DEFAULT_VIEWS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
VIEW_ALIASES = ("image", "wrist_image", "wrist_image_right")


def view_aliases(views: Sequence[str]) -> dict[str, str]:
    """alias -> view, of the first views; a name that a view is called by itself is nobody's alias."""
    pairs = zip(VIEW_ALIASES, views, strict=False)
    return {alias: view for alias, view in pairs if alias not in views}


@dataclass(frozen=True)
class PolicySpec:
    """What a policy takes and gives.

    views: camera order; horizon: actions per chunk; state_dim, action_dim: the robot's widths;
    model_action_dim: the padded width of noise and of model space; prompt_capacity: tokens, state digits
    included. optional_views: those that an observation may leave out (given as None, they are masked), but
    not all at once. action_representation: absolute, delta or velocity; None where the checkpoint does not
    say. rtc_training_max_delay: largest number of frozen actions it was trained with, None for none.
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
    action_representation: str | None = None
    optional_views: tuple[str, ...] = ()
    rtc_training_max_delay: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, num_views: int) -> PolicySpec:
        """The spec of a policy of `num_views` cameras from an opened checkpoint."""
        config = checkpoint.config
        views = (checkpoint.views or DEFAULT_VIEWS)[:num_views]
        # Offsets to the state are added up here: what comes out is absolute.
        summed = "absolute" if any(checkpoint.delta_actions or ()) else None
        return cls(
            config=config.policy,
            family=checkpoint.rules.family,
            views=views,
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
            action_representation=checkpoint.action_representation or summed,
            optional_views=views if len(views) > 1 else (),
            rtc_training_max_delay=checkpoint.rtc_training_max_delay,
        )
