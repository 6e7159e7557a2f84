"""The GPU report is what the benchmarks left, and the figures quoted from it are its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import report

DOCS = Path(__file__).parents[3] / "docs"
CONTENT = json.loads((DOCS / "gpu_report.json").read_text(encoding="utf-8"))


def test_the_tables_are_those_of_the_rows() -> None:
    written = (DOCS / "gpu_report.md").read_text(encoding="utf-8")
    assert written == report.table(CONTENT, DOCS / "gpu")


@pytest.mark.parametrize("key", [key for key, row in CONTENT.items() if "graph_p50_ms" in row])
def test_a_row_says_where_it_comes_from(key: str) -> None:
    row = CONTENT[key]
    assert {"commit", "command", "date", "peak_gib", "load_s", "graph_p99_ms", "wall_p99_ms"} <= row.keys()
    assert 0 < row["graph_p50_ms"] <= row["graph_p99_ms"]
    assert row["graph_p50_ms"] < row["wall_p50_ms"] <= row["wall_p99_ms"]
    assert "benchmarks.bench_policy" in row["command"]


def test_a_bar_of_another_gpu_says_so() -> None:
    content = {"gpu": "NVIDIA H100"}
    assert report.label("pi05.fp8.views2", {"gpu": "NVIDIA H100"}, content) == "pi05.fp8.views2"
    assert report.label("lerobot.eager", {"gpu": "NVIDIA H200"}, content) == "lerobot.eager (H200)"


def test_a_peer_has_ours_of_the_same_run() -> None:
    peers = [row for key, row in CONTENT.items() if key.startswith("lerobot.")]
    assert peers
    for row in peers:
        assert row["ours_wall_ms"].keys() <= CONTENT.keys(), "no row of ours was measured beside it"
        assert min(row["ours_wall_ms"].values()) > 0


def figures(file: Path, before: str) -> list[float]:
    """The numbers of the table cell behind the one that begins with `before`."""
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(before)}[^|]*\|([^|]*)\|", text, re.MULTILINE)
    assert found is not None, f"{file.name} has no row {before!r}"
    return [float(number) for number in re.findall(r"\d+\.\d+", found[1])]


def test_the_headline_is_the_report_s() -> None:
    quoted = figures(DOCS.parent / "README.md", "Pi0.5, FP8, 2 views, 10 steps")
    row = CONTENT["pi05.fp8.views2"]
    assert quoted == [round(row["graph_p50_ms"], 1), round(row["wall_p50_ms"], 1)]
    peer = CONTENT["lerobot.compiled.views2"]
    times = peer["wall_p50_ms"] / peer["ours_wall_ms"]["pi05.fp8.views2"]
    beside = figures(DOCS.parent / "README.md", "… LeRobot's, compiled")
    assert beside == [round(peer["wall_p50_ms"], 1), round(times, 1)]


def test_the_table_of_aims_is_the_report_s() -> None:
    rows = [CONTENT[f"pi05.fp8.views{views}"] for views in (1, 2, 3)]
    aims = DOCS / "performance.md"
    assert figures(aims, "graph p50 at 1, 2, 3 views") == [round(row["graph_p50_ms"], 2) for row in rows]
    assert figures(aims, "wall − graph")[:3] == [
        pytest.approx(row["wall_p50_ms"] - row["graph_p50_ms"], abs=0.0051) for row in rows
    ]
    assert figures(aims, "bf16, 2 views") == [round(CONTENT["pi05.bf16.views2"]["graph_p50_ms"], 2)]
    ratio = CONTENT["pi05.fp8.views2.chunk50"]["graph_p50_ms"] / rows[1]["graph_p50_ms"]
    assert figures(aims, "chunk 50 ≤ 1.15")[0] == round(ratio, 2)
    above = 100 * (CONTENT["pi0.fp8.views2"]["graph_p50_ms"] / rows[1]["graph_p50_ms"] - 1)
    assert f"| Pi0 within 10 % of Pi0.5 | {above:.0f} % above |" in aims.read_text(encoding="utf-8")
