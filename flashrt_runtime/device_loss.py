"""When the GPU is lost to this process: the CUDA errors after which every later call of it fails.

A kernel that trapped or went astray, an uncorrectable memory error or a GPU that fell off its bus end the
process's CUDA context. CUDA has no way back from there but a new process. Those are the errors of which
driver_types.h says so ("the process must be terminated and relaunched"), and three of which it does not:
214 and 220, hardware that failed during execution, and 999, an error without a name, which is also that of a
GPU that fell off its bus.

Not among them is what may end by itself or is a mistake of the caller: too little memory, an argument or a
kernel that is refused, devices that are busy (46), a context that is not current (201) or was taken down
(709). Nor is 100, no device: another process has none either. CUBLAS_STATUS_EXECUTION_FAILED alone is not
taken for a loss, as cuBLAS has it for other failures too; after a loss torch's next call names that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator

from .errors import DeviceLostError, FlashRTError

EXIT_STATUS = os.EX_TEMPFAIL  # of a process that ends because of it: started again it may well run

# Names and texts of driver_types.h by code: torch's error has the code, an older torch's only the text, the
# bindings of native_kernels the name.
LOST: dict[int, tuple[str, str]] = {
    214: ("cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"),
    220: ("cudaErrorNvlinkUncorrectable", "uncorrectable NVLink error detected during the execution"),
    226: ("cudaErrorContained", "Invalid access of peer GPU memory over nvlink or a hardware error"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    702: ("cudaErrorLaunchTimeout", "the launch timed out and was terminated"),
    710: ("cudaErrorAssert", "device-side assert triggered"),
    714: ("cudaErrorHardwareStackError", "hardware stack error"),
    715: ("cudaErrorIllegalInstruction", "an illegal instruction was encountered"),
    716: ("cudaErrorMisalignedAddress", "misaligned address"),
    717: ("cudaErrorInvalidAddressSpace", "operation not supported on global/shared address space"),
    718: ("cudaErrorInvalidPc", "invalid program counter"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    721: ("cudaErrorTensorMemoryLeak", "tensor memory not completely freed"),
    810: ("cudaErrorMpsClientTerminated", "the MPS client has been terminated by the server"),
    911: ("cudaErrorExternalDevice", "an async error has occured in external entity outside of CUDA"),
    999: ("cudaErrorUnknown", "unknown error"),
}
_NAMED = re.compile(rf"\b({'|'.join(name for name, _ in LOST.values())})\b")
_BEGINNINGS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")  # torch's two, Triton's
_TEXTS = {f"{begin}: {text}": code for begin in _BEGINNINGS for code, (_, text) in LOST.items()}
_CODES = {name: code for code, (name, _) in LOST.items()}


def loss_of(error: BaseException) -> int | None:
    """The code of an error by which the GPU is lost, as a key of `LOST`; None for any other error."""
    if not isinstance(error, RuntimeError) or isinstance(error, FlashRTError):
        return None
    code = getattr(error, "error_code", None)
    if isinstance(code, int):
        return code if code in LOST else None
    text = str(error)
    if (named := _NAMED.search(text)) is not None:
        return _CODES[named[1]]
    return next((code for words, code in _TEXTS.items() if words in text), None)


@contextlib.contextmanager
def recognised() -> Iterator[None]:
    """Raises DeviceLostError in place of what the block raises when by that the GPU is lost."""
    try:
        yield
    except RuntimeError as error:
        if (code := loss_of(error)) is None:
            raise
        name, text = LOST[code]
        raise DeviceLostError(
            f"the GPU is lost to this process ({name}: {text}), every later use of it fails: end the process "
            "and start it again"
        ) from error


def leave(*owners: object) -> None:
    """Never free these, which own memory of a lost GPU: a destructor that raises ends the process at once."""
    for owner in owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))
