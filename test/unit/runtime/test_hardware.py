"""Which device `hardware` means where CUDA finds no GPU; driver and torch are simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashrt_runtime import options
from flashrt_runtime.errors import HardwareError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A machine whose driver is loaded, for a torch with CUDA that finds no GPU."""
    files = [tmp_path / "driver", tmp_path / "device"]
    for file in files:
        file.touch()
    monkeypatch.setattr(options, "NVIDIA_DRIVER", files)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return files


@pytest.mark.parametrize("hardware", ["auto", "any", "hopper"])
def test_a_gpu_that_should_be_there_is_not_done_without(driver: list[Path], hardware: str) -> None:
    text = rf"hardware='{hardware}' needs a CUDA GPU .* driver is here .*Xid.*hardware='cpu' runs without"
    with pytest.raises(HardwareError, match=text):
        options.resolve_device(hardware)
    assert options.resolve_device("cpu").type == "cpu"


@pytest.mark.parametrize("missing", [0, 1], ids=["no driver", "not passed to the container"])
def test_auto_is_the_cpu_where_none_is_to_be_expected(driver: list[Path], missing: int) -> None:
    driver[missing].unlink()
    assert options.resolve_device("auto").type == "cpu"
    with pytest.raises(HardwareError, match=r"none was found: look at"):
        options.resolve_device("any")


@pytest.mark.parametrize("value", ["", "-1"])
def test_auto_is_the_cpu_where_the_gpu_is_hidden(
    driver: list[Path], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert options.resolve_device("auto").type == "cpu"


def test_auto_is_the_cpu_for_a_torch_without_cuda(
    driver: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert options.resolve_device("auto").type == "cpu"
