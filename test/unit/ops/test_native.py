"""Finding and loading the compiled kernels, without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashrt_runtime import ops
from flashrt_runtime.errors import HardwareError
from flashrt_runtime.ops import native


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    native.load.cache_clear()
    native.unavailable_reason.cache_clear()
    yield
    native.load.cache_clear()
    native.unavailable_reason.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler: the kernels are not built")
def test_kernels_compiled_and_loadable() -> None:
    module = native.load()
    assert module.interface_version == native.INTERFACE_VERSION
    assert callable(module.add_rms_norm)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler: the kernels are not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a GPU")
def test_launch_without_gpu_raises() -> None:
    with pytest.raises(RuntimeError, match="add_rms_norm: cudaError"):
        native.load().add_rms_norm(0, 0, 0, 0, 0, 1, 8, 1e-6, 0, 0, 0)


def test_bad_sizes_raise_before_any_launch() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler: the kernels are not built")
    for rows, width, dtype in [(-1, 8, 0), (1, 0, 0), (1, 8, 7)]:
        with pytest.raises(RuntimeError, match="add_rms_norm: cudaErrorInvalidValue"):
            native.load().add_rms_norm(0, 0, 0, 0, 0, rows, width, 1e-6, dtype, dtype, 0)


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated pair of GPUs: addresses, 0 for what is left out, and that device's stream while it is
    current.
    """
    current, calls = [0], []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    streams = {0: 70, 1: 71}
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda of: SimpleNamespace(cuda_stream=streams[of.index])
    )
    monkeypatch.setattr(
        native, "load", lambda: SimpleNamespace(kernel=lambda *given: calls.append((current[-1], given)))
    )
    x = torch.zeros(4)
    native.launch("kernel", torch.device("cuda", 1), x, None, 4, 1e-6, True)
    assert calls == [(1, (x.data_ptr(), 0, 4, 1e-6, True, 71))]
    assert current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_second_gpu_while_the_first_is_current() -> None:
    x = torch.randn(4, 64)
    scale = torch.tensor(0.5)
    expected = ops.rms_norm(x.to("cuda:0"), torch.ones(64, device="cuda:0"), 1e-6, scale.to("cuda:0"))
    found = ops.rms_norm(x.to("cuda:1"), torch.ones(64, device="cuda:1"), 1e-6, scale.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(found.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def test_missing_module_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(HardwareError, match=r"found 0: put a CUDA compiler on PATH and run colcon build"):
        native.load()


def test_broken_module_is_a_hardware_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_native.so").write_bytes(b"not a library")
    monkeypatch.setenv(native.DIRECTORY_VARIABLE, str(tmp_path))
    with pytest.raises(HardwareError, match="cannot be loaded"):
        native.load()


def test_module_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = importlib.util.module_from_spec(importlib.util.spec_from_loader("other", loader=None))
    other.__file__ = "other.so"
    other.interface_version = native.INTERFACE_VERSION + 1
    monkeypatch.setattr(native, "_import_native", lambda: other)
    with pytest.raises(HardwareError, match="interface version"):
        native.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a GPU")
def test_reason_without_gpu() -> None:
    assert not native.available()
    assert native.unavailable_reason() == "torch sees no CUDA device"
