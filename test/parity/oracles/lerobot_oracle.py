#!/usr/bin/env python
"""Runs LeRobot on the cases of `cases.py` and writes what is kept of them. Needs `make parity-env`.

    .venv-parity/bin/python test/parity/oracles/lerobot_oracle.py --out test/data/goldens  # makes the goldens
    .venv-parity/bin/python test/parity/oracles/lerobot_oracle.py --out DIR --full CASE …  # whole stages

One file per policy, `lerobot_<policy>.npz` with entries `<case>/<array>`; with --full one file per case.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cases as parity_cases  # noqa: E402
from formula import shapes  # noqa: E402


def load_worker():
    """`flashrt_runtime/parity/lerobot_worker.py`, by path: the package itself is not installed here."""
    path = HERE.parents[2] / "flashrt_runtime" / "parity" / "lerobot_worker.py"
    spec = importlib.util.spec_from_file_location("lerobot_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_case(worker, case) -> dict[str, np.ndarray]:
    """All stages of one case."""
    model = worker.build(case.policy, case.dims, case.horizon, case.views)
    ours = {name: tuple(shape) for name, shape in shapes(case.policy, case.dims).items()}
    theirs = {
        name: tuple(value.shape) for name, value in model.named_parameters() if name not in worker.HEADS
    }
    if ours != theirs:
        raise SystemExit(
            f"{case.name}: keys or shapes differ: {sorted(set(ours.items()) ^ set(theirs.items()))[:6]}"
        )
    worker.load(model, case.weights())
    return worker.run(model, case.policy, case.inputs(), case.steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="keep whole stages, one file per case")
    parser.add_argument("cases", nargs="*", help="names; default: every tiny case")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [parity_cases.BY_NAME[name] for name in arguments.cases] or parity_cases.CASES
    worker = load_worker()
    kept: dict[str, dict[str, np.ndarray]] = {}
    for case in chosen:
        stages = run_case(worker, case)
        if arguments.full:
            np.savez(arguments.out / f"{case.name}.npz", **stages)
            continue
        entries = parity_cases.golden(case, stages)
        kept.setdefault(case.policy, {}).update(
            {f"{case.name}/{name}": value for name, value in entries.items()}
        )
        total = float(np.abs(stages["actions"]).astype(np.float64).sum())
        print(case.name, f"sum |actions| {total:.6f}", flush=True)
    for policy, entries in kept.items():
        path = arguments.out / f"lerobot_{policy}.npz"
        np.savez_compressed(path, **entries)
        print(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()[:12])
    print(json.dumps(versions()))


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    from importlib.metadata import version

    return {name: version(name) for name in ("lerobot", "transformers", "torch", "numpy")}


if __name__ == "__main__":
    main()
