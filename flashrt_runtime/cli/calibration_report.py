"""The report of a calibration: Markdown, the scales and errors as plots, and the frames that were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..quantization.calibration import CEILING, CalibrationReport, HeldOutError
from ..quantization.recommend import recommended_samples

THUMBNAIL = 96
COLUMNS = 8
MOST_SHOWN = 128
LISTED = 10


def require_matplotlib() -> Any:
    """pyplot without a display; raises OptionError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError("--report needs matplotlib: pip install 'flashrt-runtime[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def thumbnail(images: Mapping[str, Any] | Sequence[Any]) -> NDArray[np.uint8]:
    """An observation's views side by side, small: (96, n * 96, 3) uint8 RGB; a masked view is grey."""
    views = list(images.values() if isinstance(images, Mapping) else images)
    return np.concatenate([_fitted(view) for view in views], 1)


def _fitted(view: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    square = np.full((THUMBNAIL, THUMBNAIL, 3), 60, np.uint8)
    if view is None:
        return square
    height, width = view.shape[:2]
    ratio = THUMBNAIL / max(height, width)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    small = cv2.resize(view, size, interpolation=cv2.INTER_AREA)
    top, left = (THUMBNAIL - size[1]) // 2, (THUMBNAIL - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = small
    return square


def contact_sheet(thumbnails: Sequence[NDArray[np.uint8]], held_out: Sequence[int]) -> NDArray[np.uint8]:
    """The observations in the order they came, numbered; held-out ones have a white frame."""
    shown = list(thumbnails)
    width = max(image.shape[1] for image in shown)
    cells = []
    for index, image in enumerate(shown):
        cell = np.zeros((THUMBNAIL + 18, width + 4, 3), np.uint8)
        cell[16 : 16 + THUMBNAIL, 2 : 2 + image.shape[1]] = image
        if index in held_out:
            cv2.rectangle(cell, (0, 14), (width + 3, THUMBNAIL + 17), (255, 255, 255), 2)
        text = f"{index} held out" if index in held_out else str(index)
        cv2.putText(cell, text, (3, 11), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
        cells.append(cell)
    columns = min(COLUMNS, len(cells))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.concatenate(cells[start : start + columns], 1) for start in range(0, len(cells), columns)]
    return np.concatenate(rows, 0)


def write_report(
    directory: Path,
    checkpoint: str,
    file: Path,
    key: str,
    made: CalibrationReport,
    true_error: HeldOutError | None,
    warnings: Sequence[str],
    thumbnails: Sequence[NDArray[np.uint8]],
) -> None:
    """report.md, scales.png, contact_sheet.png and, with held-out samples, errors.png."""
    directory.mkdir(parents=True, exist_ok=True)
    pyplot = require_matplotlib()
    _draw_scales(pyplot, directory / "scales.png", made)
    errors = {"bf16 activations": made.held_out_error, "bf16 policy": true_error}
    drawn = {name: error for name, error in errors.items() if error is not None}
    if drawn:
        _draw_errors(pyplot, directory / "errors.png", drawn)
    sheet = contact_sheet(thumbnails, made.held_out)
    cv2.imwrite(str(directory / "contact_sheet.png"), sheet[..., ::-1])
    text = "\n".join(_lines(checkpoint, file, key, made, drawn, warnings))
    (directory / "report.md").write_text(text + "\n", encoding="utf-8")


def _draw_scales(pyplot: Any, file: Path, made: CalibrationReport) -> None:
    """Every projection's scale, each sample's maximum / 448 behind it, outliers marked."""
    names, scales = list(made.scales), np.array(list(made.scales.values()))
    reached = made.maxima.max(0, initial=0.0) > 0
    left_out = np.zeros(made.maxima.shape, bool) if made.outliers is None else made.outliers
    figure, axis = pyplot.subplots(figsize=(max(8.0, 0.07 * len(names) + 3), 5))
    places = np.arange(len(names))
    for sample, marked in zip(made.maxima / 448.0, left_out, strict=True):
        seen = reached & (sample > 0)
        axis.plot(places[seen & ~marked], sample[seen & ~marked], ".", color="0.75", markersize=3, zorder=1)
        axis.plot(places[marked], sample[marked], "x", color="tab:red", markersize=5, zorder=3)
    axis.plot(places[reached], scales[reached], "_", color="tab:blue", markersize=7, zorder=2, label="scale")
    median = float(np.median(scales[reached]))
    axis.axhline(CEILING * median, color="tab:orange", linewidth=1, label=f"{CEILING:g} x the median")
    if left_out.any():
        axis.plot([], [], "x", color="tab:red", label="sample left out as an outlier")
    axis.plot([], [], ".", color="0.75", label="maximum / 448 of a sample")
    axis.set_yscale("log")
    axis.set_ylabel("activation scale")
    step = max(1, len(names) // 40)
    axis.set_xticks(places[::step], [_short(name) for name in names[::step]], rotation=90, fontsize=6)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    _save(pyplot, figure, file)


def _draw_errors(pyplot: Any, file: Path, errors: Mapping[str, HeldOutError]) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for offset, (name, error) in enumerate(errors.items()):
        places = np.arange(len(error.per_sample)) + 0.4 * offset
        for axis, column in zip(axes, (1, 0), strict=True):
            axis.bar(places, [row[column] for row in error.per_sample], 0.38, label=f"against {name}")
    for axis, title in zip(axes, ("relative rms", "max-abs"), strict=True):
        axis.set_title(f"{title} of fp8 actions", fontsize=10)
        axis.set_xlabel("held-out sample")
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=8)
    _save(pyplot, figure, file)


def _save(pyplot: Any, figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _lines(
    checkpoint: str,
    file: Path,
    key: str,
    made: CalibrationReport,
    errors: Mapping[str, HeldOutError],
    warnings: Sequence[str],
) -> list[str]:
    number, settled = recommended_samples(made.maxima, made.outliers)
    chosen = made.estimator + (f" {made.percentile:g}" if made.percentile else "")
    lines = [
        f"# Calibration of {checkpoint}",
        "",
        f"- file: `{file}`, key `{key}`",
        f"- source: {made.source}: {made.samples} observations calibrated on, "
        f"{len(made.held_out)} held out",
        f"- estimator: {chosen}; {len(made.scales)} projections",
        f"- weights: {'rounded to nearest' if made.gain is None else f'compensated: {made.gain}'}",
        f"- recommended number of samples: {number}"
        + ("" if settled else f" or more ({made.samples} do not settle the scales)"),
        "",
        "## Warnings",
        "",
        *([f"- {warning}" for warning in warnings] or ["None."]),
        "",
        "## Error of fp8 actions on held-out samples",
        "",
    ]
    if errors:
        lines += ["| against | sample | max-abs | relative rms | cosine |", "|---|---|---|---|---|"]
        lines += [
            f"| {name} | {index} | {row[0]:.5f} | {row[1]:.5f} | {row[2]:.6f} |"
            for name, error in errors.items()
            for index, row in enumerate(error.per_sample)
        ]
        lines += ["", "![errors](errors.png)"]
    else:
        lines += ["Not measured: no observation was held out."]
    largest = sorted(made.scales.items(), key=lambda item: -item[1])[:LISTED]
    lines += ["", "## Scales", "", "![scales](scales.png)", "", "| largest | scale |", "|---|---|"]
    lines += [f"| {name} | {scale:.4g} |" for name, scale in largest]
    return [*lines, "", "## Frames", "", "![frames](contact_sheet.png)"]


def _short(name: str) -> str:
    return name.replace("paligemma.", "").replace("layers.", "")
