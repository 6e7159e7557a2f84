"""A GPU that is lost to the process: which errors mean that, and what the policy makes of them.

Without a GPU the errors are simulated; what raises them in `TestPolicy` stands where the model runs.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import flashrt_runtime
from flashrt_runtime import Policy, device_loss
from flashrt_runtime.errors import CalibrationError, ClosedError, DeviceLostError
from flashrt_runtime.untrained.random import make_checkpoint

PROMPT, STATE = "pick up the red block", np.zeros(7, np.float32)
TRAP = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"


def accelerator_error(code: int, text: str) -> RuntimeError:
    """As torch raises it; a torch that has no type for it raises its base."""
    error = getattr(torch, "AcceleratorError", RuntimeError)(f"CUDA error: {text}\nSearch for `…'")
    error.error_code = code
    return error


@pytest.mark.parametrize("code", device_loss.LOST)
def test_each_is_known_by_code_by_text_and_by_name(code: int) -> None:
    name, text = device_loss.LOST[code]
    for error in (
        accelerator_error(code, text),
        RuntimeError(f"CUDA error: {text}\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError(f"CUDA driver error: {text}"),
        RuntimeError(f"Triton Error [CUDA]: {text}"),
        RuntimeError(f"row_norm: {name}: {text}"),
    ):
        assert device_loss.loss_of(error) == code


@pytest.mark.parametrize("code", device_loss.LOST)
def test_names_and_texts_are_those_of_cuda(code: int) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch has no CUDA")
    runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    runtime.cudaGetErrorName.restype = runtime.cudaGetErrorString.restype = ctypes.c_char_p
    found = runtime.cudaGetErrorName(code).decode(), runtime.cudaGetErrorString(code).decode()
    assert found == device_loss.LOST[code]


def headers() -> Iterator[Path]:
    """driver_types.h of torch's CUDA, then of an installed toolkit."""
    places = [Path(entry) / "nvidia" for entry in sys.path]
    yield from (file for place in places for file in place.glob("*/include/driver_types.h"))
    yield from Path("/usr/local").glob("cuda*/include/driver_types.h")


def test_they_are_those_of_which_cuda_says_so_and_three_more() -> None:
    header = next(headers(), None)
    if header is None:
        pytest.skip("no driver_types.h is installed")
    comment = r"/\*\*((?:(?!\*/).)*)\*/\s*(cudaError\w+)\s*=\s*(\d+)"
    said = {
        int(code): name
        for text, name, code in re.findall(comment, header.read_text(), re.DOTALL)
        if "must be terminated" in " ".join(text.replace("*", " ").split())
    }
    assert len(said) >= 10, f"{header} reads otherwise than expected"
    more = {214: "cudaErrorECCUncorrectable", 220: "cudaErrorNvlinkUncorrectable", 999: "cudaErrorUnknown"}
    ours = {code: name for code, (name, _) in device_loss.LOST.items()}
    assert ours.items() >= (said | more).items()
    assert ours.keys() - said.keys() - more.keys() <= {226, 721, 911}, "of which older headers say less"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB"),
        accelerator_error(2, "out of memory"),
        accelerator_error(801, "operation not supported"),
        accelerator_error(900, "operation not permitted when stream is capturing"),
        RuntimeError("expert_steps: cudaErrorNotSupported: operation not supported"),
        # a refused argument: a shape, or an address that is not aligned
        RuntimeError("skinny_gemm: cudaErrorInvalidValue: invalid argument"),
        accelerator_error(1, "invalid argument"),
        accelerator_error(46, "CUDA-capable device(s) is/are busy or unavailable"),
        accelerator_error(100, "no CUDA-capable device is detected"),
        accelerator_error(201, "invalid device context"),
        accelerator_error(709, "context is destroyed"),
        RuntimeError("CUDA error: no CUDA-capable device is detected"),
        RuntimeError("CUDA driver error: invalid device context"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa)`"),
        RuntimeError("unspecified launch failure of the rocket"),
        RuntimeError("cudaErrorUnknownToUs"),
        ValueError(TRAP),
        CalibrationError(TRAP),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:30]}",
)
def test_others_lose_nothing_and_stay_as_they_are(error: Exception) -> None:
    assert device_loss.loss_of(error) is None
    with pytest.raises(type(error)) as raised, device_loss.recognised():
        raise error
    assert raised.value is error


def test_what_is_left_is_never_freed() -> None:
    owner = object()
    before = sys.getrefcount(owner)
    device_loss.leave(owner)
    assert sys.getrefcount(owner) == before + 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("policy") / "tiny", size="tiny", preset="demo_arm")


@pytest.fixture
def images() -> list[np.ndarray]:
    return [np.full((48, 64, 3), 90 + index, np.uint8) for index in range(2)]


class TestPolicy:
    @pytest.fixture
    def policy(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Policy]:
        monkeypatch.setenv("FLASHRT_CACHE_DIR", str(tmp_path))
        loaded = flashrt_runtime.load_model(checkpoint, hardware="cpu", precision="fp8", num_steps=1)
        yield loaded
        loaded.close()

    @pytest.fixture
    def broken(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
        def trap(*_arguments: object) -> None:
            raise RuntimeError(TRAP)

        monkeypatch.setattr(policy._model, "sample", trap)
        return policy

    def test_predict_says_that_the_process_must_be_started_again(self, broken: Policy, images: list) -> None:
        for _ in range(2):
            with pytest.raises(
                DeviceLostError, match=r"cudaErrorLaunchFailure: unspecified.*start it again"
            ):
                broken.predict(images, PROMPT, STATE)

    def test_so_do_calibration_and_the_model_alone(
        self, policy: Policy, images: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy.predict(images, PROMPT, STATE)
        scales = {name: linear.activation_scale.clone() for name, linear in fp8_linears(policy)}

        def trap(*_arguments: object) -> None:
            raise RuntimeError(TRAP)

        for method in ("sample", "sample_actions"):
            monkeypatch.setattr(policy._model, method, trap)
        with pytest.raises(DeviceLostError):
            policy.calibrate([{"images": images, "prompt": PROMPT, "state": STATE}])
        with pytest.raises(DeviceLostError):
            policy.sample_actions(
                np.zeros((2, 3, 224, 224), np.float32), np.ones(2, bool), np.ones(3, np.int64),
                np.ones(3, bool), None, np.zeros(policy._model.noise_shape, np.float32),
            )
        assert {name: linear.activation_scale for name, linear in fp8_linears(policy)} == scales

    def test_so_does_rounding_which_goes_on_beside_the_policy(
        self, policy: Policy, images: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def trap(*_arguments: object) -> None:
            raise RuntimeError(TRAP)

        monkeypatch.setattr("flashrt_runtime.quantization.compensation._round", trap)
        released: list[bool] = []
        policy._model.release = lambda: released.append(True)
        with pytest.raises(DeviceLostError, match="cudaErrorLaunchFailure"):
            policy.calibrate(
                [{"images": images, "prompt": PROMPT, "state": STATE}], weights="compensated"
            )
        policy.close()
        assert not released

    def test_weights_that_it_leaves_mixed_do_not_hide_it(
        self, policy: Policy, images: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def trap(*_arguments: object) -> None:
            raise RuntimeError(TRAP)

        monkeypatch.setattr(type(policy._model), "weights_changed", trap)
        observation = {"images": images, "prompt": PROMPT, "state": STATE}
        with pytest.raises(DeviceLostError):
            policy.calibrate([observation], weights="compensated")
        monkeypatch.setattr(policy._model, "sample", trap)
        with pytest.raises(DeviceLostError):
            policy.predict(**observation)

    def test_what_was_on_the_gpu_is_left_alone_when_it_is_closed(self, broken: Policy, images: list) -> None:
        released: list[bool] = []
        broken._model.release = lambda: released.append(True)
        with pytest.raises(DeviceLostError):
            broken.predict(images, PROMPT, STATE)
        broken.close()
        assert not released
        with pytest.raises(ClosedError):
            broken.predict(images, PROMPT, STATE)

    def test_loading_says_so_too(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def trap(*_arguments: object) -> None:
            raise accelerator_error(700, "an illegal memory access was encountered")

        monkeypatch.setattr("flashrt_runtime.loading.load_weights", trap)
        with pytest.raises(DeviceLostError, match="cudaErrorIllegalAddress"):
            flashrt_runtime.load_model(checkpoint, hardware="cpu", precision="bf16")


def fp8_linears(policy: Policy) -> list:
    from flashrt_runtime.quantization.fp8 import fp8_linears

    return [(name, linear) for name, linear in fp8_linears(policy._model).items() if linear.static]


SCRIPT = """
import sys
import numpy as np, torch
import flashrt_runtime
from flashrt_runtime.errors import DeviceLostError

policy = flashrt_runtime.load_model(sys.argv[1], precision="bf16", num_steps=2, autotune=0)
images = [np.full((48, 64, 3), 90, np.uint8)] * 2
observation = images, "pick up the red block", np.zeros(7, np.float32)
policy.predict(*observation)
torch._assert_async(torch.zeros(1, device="cuda"))
for _ in range(3):
    try:
        policy.predict(*observation)
    except DeviceLostError as error:
        print("lost:", error)
policy.close()
del policy
print("closed")
"""


@pytest.mark.gpu
def test_a_real_loss_is_recognised_and_the_process_ends_by_itself(tmp_path: Path) -> None:
    """In a process of its own, as its GPU is lost for good."""
    checkpoint = make_checkpoint(tmp_path / "small", size="small", preset="demo_arm")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint)], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.count("lost: the GPU is lost to this process (cudaErrorAssert") >= 2, done.stderr
    assert done.stdout.endswith("closed\n"), done.stderr
    assert done.returncode == 0, done.stderr
