"""flashrt_runtime: vision-language-action policies on the robot's own computer, without ROS.

    import flashrt_runtime
    policy = flashrt_runtime.load_model("checkpoint_dir")
    actions = policy.predict([base_rgb, wrist_rgb], prompt="pick up the red block", state=joints)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import errors

if TYPE_CHECKING:
    from .guidance import Guidance
    from .loading import load_model
    from .policy import Policy
    from .spec import PolicySpec

__version__ = "0.1.0"

__all__ = ["Guidance", "Policy", "PolicySpec", "__version__", "errors", "load_model"]


def __getattr__(name: str) -> object:
    """Import torch only when a policy is asked for: `flashrt --help` and launch files start at once."""
    if name == "load_model":
        from .loading import load_model

        return load_model
    if name == "Guidance":
        from .guidance import Guidance

        return Guidance
    if name in ("Policy", "PolicySpec"):
        from . import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
