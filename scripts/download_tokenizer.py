#!/usr/bin/env python3
"""Fetch PaliGemma's tokenizer (4 MB) into the cache, checksum verified; does nothing when it is there.

The same as `flashrt download-tokenizer`, from a source tree: scripts/download_tokenizer.py [--out FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashrt_runtime.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["download-tokenizer"]
    main()
