"""Unit tests run in a plain checkout too: without an installed package, its sources are used."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

for package in ("flashrt_runtime", "flashrt_ros"):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(ROOT))
