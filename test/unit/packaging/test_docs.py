"""The documentation site builds without a broken link, and speaks of what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from flashrt_ros.core.reasons import Reason

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def test_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("load_model", "predict", "set_prompt", "calibrate", "ObservationError"):
        assert name in api, f"the API page lacks {name}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", yaml.dump(yaml.safe_load(text)["nav"])))
    assert listed == {path.name for path in DOCS.glob("*.md")}


def test_every_reason_has_its_advice() -> None:
    rows = re.findall(r"^\| (\d+) (\w+) \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [
        (int(reason), reason.name) for reason in Reason if reason is not Reason.OK
    ]


def test_the_readme_is_short_and_shows_the_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 200
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"
