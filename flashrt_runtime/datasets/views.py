"""Which camera of a dataset is which view of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import DatasetError, OptionError
from ..spec import view_aliases


def parse_views(arguments: Sequence[str]) -> dict[str, str]:
    """view -> camera from "view=camera" texts. Raises OptionError."""
    views: dict[str, str] = {}
    for argument in arguments:
        view, separator, camera = argument.partition("=")
        if not (view and separator and camera):
            raise OptionError(f"--view {argument!r}: expected VIEW=CAMERA")
        if view in views:
            raise OptionError(f"--view: {view!r} was given twice")
        views[view] = camera
    return views


def match_views(
    cameras: Iterable[str], views: Sequence[str], named: Mapping[str, str] | None = None
) -> dict[str, str]:
    """view -> camera, in the order of `views`.

    named: given by the user; else cameras that are called like the views, or image, wrist_image and
    wrist_image_right for the first three, unless another view is called so. Nothing is guessed from the
    order: DatasetError says what to give.
    """
    cameras = list(cameras)
    if named:
        wrong = sorted(set(named) - set(views)) + sorted(set(named.values()) - set(cameras))
        if wrong:
            raise DatasetError(
                f"--view: {', '.join(wrong)}: the views are {', '.join(views)}, the cameras "
                f"{', '.join(cameras) or 'none'}"
            )
        found = {view: named[view] for view in views if view in named}
    else:
        aliases = {view: alias for alias, view in view_aliases(views).items()}
        found = {view: view if view in cameras else aliases.get(view, "") for view in views}
        found = {view: camera for view, camera in found.items() if camera in cameras}
    missing = [view for view in views if view not in found]
    if missing:
        raise DatasetError(
            f"no camera for the views {', '.join(missing)} among {', '.join(cameras) or 'none'}: call "
            f"cameras as the views are, or name them to `flashrt calibrate`: `--view {missing[0]}=CAMERA`"
        )
    return found
