#!/usr/bin/env python
"""Runs LeRobot on the cases of `parity_cases.py` and writes what is kept of them. Needs `make parity-env`.

    .venv-parity/bin/python test/parity/oracles/lerobot_oracle.py --out test/data/goldens  # makes the goldens
    .venv-parity/bin/python test/parity/oracles/lerobot_oracle.py --out DIR --full CASE …  # whole stages

One file per policy, `lerobot_<policy>.npz` with entries `<case>/<array>`; with --full one file per case; with
--save also a policy directory per case as LeRobot writes it.
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

import parity_cases  # noqa: E402
from parity_formula import shapes  # noqa: E402


def load_worker():
    """`flashrt_runtime/parity/lerobot_worker.py`, by path: the package itself is not installed here."""
    path = HERE.parents[2] / "flashrt_runtime" / "parity" / "lerobot_worker.py"
    spec = importlib.util.spec_from_file_location("lerobot_worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_case(worker, case, save: Path | None = None) -> dict[str, np.ndarray]:
    """All stages of one case; the policy is saved to `save`, if given."""
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
    if save is not None:
        save_policy(worker, model, case, save)
    return worker.run(model, case.policy, case.inputs(), case.steps)


def save_policy(worker, model, case, folder: Path) -> None:
    """config.json by LeRobot's own code, and the tensors under the names it saves them by.

    Its output heads are zero here: a reader that takes one for the token embedding shows.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.config.num_inference_steps = case.steps
    model.config._save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text()) | {"flashrt_dims": case.dims}
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    for head in worker.HEADS:
        tensors[f"model.{head}"].zero_()
    save_file(tensors, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="keep whole stages, one file per case")
    parser.add_argument("--save", action="store_true", help="also save each policy as LeRobot does")
    parser.add_argument("cases", nargs="*", help="names; default: every tiny case")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [parity_cases.BY_NAME[name] for name in arguments.cases] or parity_cases.CASES
    worker = load_worker()
    kept: dict[str, dict[str, np.ndarray]] = {}
    for case in chosen:
        stages = run_case(worker, case, arguments.out / case.name if arguments.save else None)
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
