"""Loading maps the file and gives its pages back: host memory stays below the file's size."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flashrt_runtime.untrained import make_checkpoint

MEASURE = """
import sys
from pathlib import Path
from flashrt_runtime.checkpoints import open_checkpoint
from flashrt_runtime.loading import load_model

def peak():
    return read("VmHWM")  # ru_maxrss would begin at that of the test runner

def own():
    return read("RssAnon")

def read(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) * 1024

load_model(sys.argv[1], hardware="cpu", precision="bf16").close()  # imports and thread pools
before, private = peak(), own()
if sys.argv[3] == "open":
    checkpoint = open_checkpoint(sys.argv[2])
    assert all(bool(checkpoint.tensor(key).sum().isfinite()) for key in sorted(checkpoint.keys()))
else:
    policy = load_model(sys.argv[2], hardware="cpu", precision="bf16")
print(peak() - before, own() - private, (Path(sys.argv[2]) / "model.safetensors").stat().st_size)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """174 MB of float32, and a tiny one to warm up with."""
    folder = tmp_path_factory.mktemp("memory")
    return make_checkpoint(folder / "tiny"), make_checkpoint(folder / "small", size="small")


def measured(small, what):
    command = [sys.executable, "-c", MEASURE, *map(str, small), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return map(int, done.stdout.split())


def test_opening_and_reading_every_tensor_holds_little_of_it(small):
    peak, private, size = measured(small, "open")
    assert peak < 0.5 * size
    assert private < 0.15 * size


def test_loading_holds_the_model_and_little_more(small):
    """To bfloat16 on the CPU, where the model itself has half of the file's bytes."""
    peak, private, size = measured(small, "load")
    assert private < 0.65 * size
    assert peak < 1.0 * size
