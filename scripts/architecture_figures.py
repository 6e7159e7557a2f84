"""Draw the pictures of docs/architecture.md: architecture_figures.py [DIRECTORY]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

BOX = {"boxstyle": "round,pad=0.02", "linewidth": 1.2}
PATH = (
    ("cameras, joints", "topics", "#dddddd"),
    ("ring buffers", "executor: stamp and reference", "#cfe2f3"),
    ("synchroniser", "newest set within skew and age", "#d9ead3"),
    ("ingest", "decode, order by name, units", "#d9ead3"),
    ("policy", "one CUDA graph", "#d9ead3"),
    ("timeline", "splice by what was sent, blend", "#fce5cd"),
    ("limits", "finite, position, speed", "#fce5cd"),
    ("controller", "JointTrajectory, Float64MultiArray", "#dddddd"),
)
THREADS = (("executor threads", "#cfe2f3"), ("worker thread", "#d9ead3"), ("control thread", "#fce5cd"))
PACKAGES = {
    "flashrt_ros.nodes": (0.5, 0.85),
    "flashrt_ros.core": (0.2, 0.5),
    "flashrt_runtime": (0.72, 0.5),
    "native_kernels": (0.72, 0.15),
    "messages": (0.2, 0.15),
}
IMPORTS = (
    ("flashrt_ros.nodes", "flashrt_ros.core"),
    ("flashrt_ros.nodes", "flashrt_runtime"),
    ("flashrt_runtime", "native_kernels"),
    ("flashrt_ros.core", "messages"),
)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rounded box around (x, y)."""
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=colour, **BOX)
    axes.add_patch(patch)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "lw": 1.4, "color": "#444444"})


def path_figure(file: Path) -> None:
    """The stations of an observation, coloured by the thread that owns them."""
    figure, axes = pyplot.subplots(figsize=(10, 3.6))
    for index, (name, what, colour) in enumerate(PATH):
        row, column = divmod(index, 4)
        x, y = 0.13 + 0.25 * column, 0.72 - 0.42 * row
        box(axes, x, y, 0.165, 0.17, colour)
        axes.text(x, y + 0.03, name, ha="center", va="center", fontsize=11, fontweight="bold")
        axes.text(x, y - 0.05, what, ha="center", va="center", fontsize=7)
        if column < 3:
            arrow(axes, (x + 0.1, y), (x + 0.15, y))
        elif row == 0:
            arrow(axes, (x, y - 0.11), (0.13, 0.41))
    for index, (name, colour) in enumerate(THREADS):
        box(axes, 0.27 + 0.2 * index, 0.03, 0.005, 0.02, colour)
        axes.text(0.3 + 0.2 * index, 0.03, name, va="center", fontsize=9)
    finish(figure, axes, file)


def imports_figure(file: Path) -> None:
    """Packages, and which may import which."""
    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    for name, (x, y) in PACKAGES.items():
        box(axes, x, y, 0.32, 0.16, "#eeeeee")
        axes.text(x, y, name, ha="center", va="center", fontsize=11)
    for upper, lower in IMPORTS:
        (x1, y1), (x2, y2) = PACKAGES[upper], PACKAGES[lower]
        arrow(axes, (x1 + (x2 - x1) * 0.2, y1 - 0.1), (x2, y2 + 0.1))
    finish(figure, axes, file)


def finish(figure: pyplot.Figure, axes: Axes, file: Path) -> None:
    """Without axes, at a size that a page shows well."""
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1)
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    directory.mkdir(parents=True, exist_ok=True)
    path_figure(directory / "architecture_path.png")
    imports_figure(directory / "architecture_imports.png")


if __name__ == "__main__":
    main()
