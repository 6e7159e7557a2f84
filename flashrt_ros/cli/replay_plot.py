"""The plot of `flashrt replay`: for each joint its recorded course with the predicted chunks, and the error
over the chunk."""

from __future__ import annotations

from pathlib import Path

from flashrt_ros.core.replay import Replay
from flashrt_ros.core.timing import NS_PER_S
from flashrt_runtime.errors import OptionError

RECORDED, PREDICTED = "#00798c", "#d1495b"


def draw(file: Path, result: Replay) -> None:
    """Write the plot as PNG. Raises OptionError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise OptionError("flashrt replay draws with matplotlib: pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    joints, offsets = result.contract.action_joints, result.offsets
    begins = (result.times - result.times[0]) / NS_PER_S
    errors = result.error_by_offset()
    figure, axes = pyplot.subplots(
        len(joints), 2, figsize=(11, 1.5 * len(joints) + 1), squeeze=False, sharex="col",
        gridspec_kw={"width_ratios": (3, 1)},
    )
    for index, joint in enumerate(joints):
        course, by_offset = axes[index]
        for row, begin in enumerate(begins):
            times = begin + offsets
            course.plot(times, result.recorded[row, :, index], color=RECORDED, linewidth=1.6)
            course.plot(times, result.predicted[row, :, index], color=PREDICTED, linewidth=0.9)
            course.plot(begin, result.predicted[row, 0, index], ".", color=PREDICTED, markersize=4)
        course.set_ylabel(f"{joint.name}\n[{joint.unit}]", fontsize=8)
        by_offset.plot(offsets, errors[:, index], color="#444444")
        by_offset.set_ylim(bottom=0.0)
        for axis in (course, by_offset):
            axis.grid(alpha=0.3)
            axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("time after the first moment [s]")
    axes[-1, 1].set_xlabel("time in the chunk [s]")
    axes[0, 1].set_title("mean error", fontsize=9)
    axes[0, 0].set_title("recorded (blue) and predicted chunks (red)", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
