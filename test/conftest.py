"""Unit tests run in a plain checkout too: without an installed package, its sources are used."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

for package in ("flashrt_runtime", "flashrt_ros"):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(ROOT))

SCHEDULING = os.sched_getscheduler(0), os.sched_getparam(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and item.get_closest_marker("hopper") and not _has_hopper():
        pytest.skip("of kernels for compute capability 9.0 alone, which this GPU or build has not")


@functools.cache
def _has_hopper():
    import torch

    from flashrt_runtime.ops import native

    return not torch.cuda.is_available() or native.capability(torch.device("cuda")) == (9, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    """A test that gives the main thread another priority fails, rather than the timing of those after it:
    every process that they start inherits it."""
    yield
    found = os.sched_getscheduler(0)
    if found != SCHEDULING[0]:
        os.sched_setscheduler(0, *SCHEDULING)
        pytest.fail(f"the main thread was left with scheduling policy {found}, it had {SCHEDULING[0]}")
