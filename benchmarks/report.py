"""docs/gpu_report.{json,md,png} from measured rows; nothing in them is written by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Wall, 2 views, 10 steps, chunk 10: measured side by side on one H200 with the same random checkpoint.
ANCHORS = {"FlashRT 0.1.0 fp8 (H200)": 14.68, "LeRobot 0.6.1 compiled (H200)": 57.1}
FLOOR_MS = {1: 1.61, 2: 2.38, 3: 3.17}  # fp8, H200: the larger of operations and bytes over this GPU's rates
# tables of other benchmarks: their Markdown output, kept in gpu/ beside the report
SECTIONS = {
    "16 bits against float32, realistic frames": "fidelity.md",
    "The same with attention peaked": "fidelity_peaked.md",
    "Pi0-FAST": "fast.md",
    "FP8: calibration and drift": "calibration.md",
    "The same with peaked attention": "calibration_peaked.md",
    "The same with 50 actions a chunk": "calibration_chunk50.md",
    "From disk to the first action": "load.md",
    "Every kernel alone": "kernels.md",
}
STAGES = ("images", "vision", "embed", "prefix", "expert", "staging", "h2d", "d2h")


def command(module: str) -> str:
    """This run's command as anybody would give it: without where it wrote, and from which sources."""
    words, kept = iter(sys.argv[1:]), [f"python -m benchmarks.{module}"]
    for word in words:
        if word in ("--commit", "--out", "--checkpoint"):
            next(words, None)
        else:
            kept.append(word)
    return " ".join(kept)


def write(directory: Path, header: dict[str, str], rows: dict[str, Any]) -> None:
    """Merge rows into the JSON (a row keeps the header of its own run) and write table and chart from it."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "gpu_report.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content |= header
    for key, row in rows.items():
        content[key] = row | {
            "gpu": header["gpu"],
            "commit": header["commit"],
            "command": header["command"],
            "date": header["date"],
        }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    render(directory, content)
    print(f"wrote {file}, gpu_report.md and gpu_report.png")


def gate(held: bool, text: str) -> str:
    """A bound in a report, and whether it holds."""
    return f"{'holds' if held else 'EXCEEDED'}: {text}"


def render(directory: Path, content: dict[str, Any]) -> None:
    """Table and chart of gpu_report.json's content and the sections beside it."""
    (directory / "gpu_report.md").write_text(table(content, directory / "gpu"), encoding="utf-8")
    chart(content, directory / "gpu_report.png")


def table(content: dict[str, Any], directory: Path) -> str:
    """The report as Markdown, with what other benchmarks left in `directory`."""
    latencies = {key: row for key, row in content.items() if isinstance(row, dict) and "graph_p50_ms" in row}
    peers = {key: row for key, row in content.items() if key.startswith("lerobot.")}
    lines = [
        "# GPU report",
        "",
        f"Torch {content['torch']}, last run {content['date']}; a row has its own commit and GPU. "
        "Written by `benchmarks/bench_policy.py`; random weights of the published dimensions, random images.",
        "",
        "| policy | graph p50 | p95 | p99 | wall p50 | p99 | host | GiB | load s | first action s | of |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in latencies.items():
        names = (
            "graph_p50_ms", "graph_p95_ms", "graph_p99_ms", "wall_p50_ms", "wall_p99_ms", "host_ms",
            "peak_gib", "load_s", "first_action_s",
        )  # fmt: skip
        cells = [f"{row[name]:.2f}" for name in names]
        lines.append(f"| {key} | {' | '.join(cells)} | {origin(row)} |")
    lines += ["", "Times in ms. Stages, each a graph of its own (staging is host work):", ""]
    lines += [f"| policy | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    for key, row in latencies.items():
        lines.append(f"| {key} | {' | '.join(f'{row["stages_ms"][stage]:.3f}' for stage in STAGES)} |")
    lines += ["", "Prompt and state changes (200 in a row):", ""]
    lines += ["| policy | extra ms | device allocations | captures |", "|---|---|---|---|"]
    for key, row in latencies.items():
        change = row["prompt_change"]
        lines.append(
            f"| {key} | {change['extra_ms']:.3f} | {change['device_allocations']} | {change['captures']} |"
        )
    if peers:
        lines += ["", "| peer | wall p50 ms | p99 | first call s | over ours, same run | of |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [f"{peer_line(key, row)} {origin(row)} |" for key, row in peers.items()]
    rates = content.get("rates")
    if rates:
        ceilings = ", ".join(f"{name} {value:.4g}" for name, value in rates["ceilings"].items())
        lines += [
            "",
            f"Rates in {rates['precision']}, weights rotated out of L2 ({origin(rates)}). Ceilings "
            f"measured: {ceilings}.",
            "",
        ]
        lines += ["| operation | us | TFLOP/s | TB/s |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {row['us']:.1f} | {row['tflop_s']:.0f} | {row['tb_s']:.2f} |"
            for name, row in rates.items()
            if isinstance(row, dict) and "us" in row
        ]
    for title, name in SECTIONS.items():
        file = directory / name
        if file.is_file():
            lines += ["", f"## {title}", "", file.read_text(encoding="utf-8").strip()]
    lines += ["", "## Commands", ""]
    commands = dict.fromkeys(row["command"] for row in content.values() if isinstance(row, dict))
    return "\n".join([*lines, *(f"- `{command}`" for command in commands)]) + "\n"


def origin(row: dict[str, Any]) -> str:
    """Commit and GPU of a row."""
    return f"{row['commit']}, {row['gpu']}"


def peer_line(key: str, row: dict[str, Any]) -> str:
    """A peer's row of the table: its wall over ours is of one run."""
    wall = row["wall_p50_ms"]
    ours = row.get("ours_wall_ms", {}).items()
    ratios = ", ".join(f"{wall / own:.1f} x {key} ({own:.2f})" for key, own in ours)
    cells = f"{wall:.1f} | {row['wall_p99_ms']:.1f} | {row['first_call_s']:.0f}"
    return f"| {key} | {cells} | {ratios or '–'} |"


def label(key: str, row: dict[str, Any], content: dict[str, Any]) -> str:
    """A row's name in the chart, with its GPU where that is not the one of the last run."""
    return key if row["gpu"] == content["gpu"] else f"{key} ({row['gpu'].removeprefix('NVIDIA ')})"


def chart(content: dict[str, Any], path: Path) -> None:
    """Bars of wall p50: ours, the peers, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    bars = {
        f"floor fp8, {views} view{'s' * (views > 1)} (H200)": value for views, value in FLOOR_MS.items()
    }
    colours = ["#999999"] * len(bars)
    rows = {key: row for key, row in content.items() if isinstance(row, dict) and "wall_p50_ms" in row}
    times = {label(key, row, content): row["wall_p50_ms"] for key, row in rows.items()}
    measured = {name: time for name, time in times.items() if name.startswith("lerobot.")}
    ours = {name: time for name, time in times.items() if name not in measured}
    bars |= ours | ANCHORS | measured
    colours += ["#1f77b4"] * len(ours) + ["#d62728"] * (len(ANCHORS) + len(measured))
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(bars) + 1.2))
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1.0, 2.0 * max(bars.values()))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"ms per predict, wall p50 ({content['gpu']}; 2 views unless named)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    render(Path("docs"), json.loads(Path("docs/gpu_report.json").read_text(encoding="utf-8")))
