"""docs/node.md and README.md against the code that their tables come from."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_tables_of_the_node_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "node_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_stale_table_is_noticed(tmp_path: Path) -> None:
    """The check on a copy whose parameters' table has lost a row."""
    scripts, docs = tmp_path / "scripts", tmp_path / "docs"
    scripts.mkdir()
    docs.mkdir()
    (tmp_path / "flashrt_ros").symlink_to(ROOT / "flashrt_ros")
    (scripts / "node_tables.py").write_text((ROOT / "scripts" / "node_tables.py").read_text())
    lines = (ROOT / "docs" / "node.md").read_text().splitlines(keepends=True)
    stale = [line for line in lines if not line.startswith("| `dry_run` |")]
    assert len(stale) == len(lines) - 1
    (docs / "node.md").write_text("".join(stale))
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    command = [sys.executable, str(scripts / "node_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "out of date" in done.stderr
