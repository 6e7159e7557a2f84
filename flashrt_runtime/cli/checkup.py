"""The checks of `flashrt doctor`. None of them needs what it looks for, and none changes anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

CLOCK_LIMIT_MS = 5.0
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """status: "ok"; "note" (something works less well or not at all, the runtime still runs); "missing".

    found: what is there. fix: what to do, None where there is nothing to do.
    """

    status: Literal["ok", "note", "missing"]
    found: str
    fix: str | None = None

    def as_json(self) -> dict[str, str | None]:
        """Plain data."""
        return asdict(self)


def output_of(command: Sequence[str]) -> str | None:
    """What a program prints; None when it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """Version of an installed Python package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] != (3, 12):
        return Finding("note", found, "ROS 2 Jazzy's Python packages need 3.12; without ROS this one will do")
    return Finding("ok", found)


def check_ros() -> Finding:
    distribution = os.environ.get("ROS_DISTRO")
    if importlib.util.find_spec("rclpy") is None:
        return Finding(
            "note",
            f"ROS_DISTRO={distribution}, no rclpy" if distribution else "not found",
            "for the robot node: source /opt/ros/jazzy/setup.bash, or run make setup and . scripts/env.sh",
        )
    if distribution != "jazzy":
        return Finding("note", f"ROS_DISTRO={distribution or 'unset'}", "this package is tested with jazzy")
    if importlib.util.find_spec("flashrt_ros") is None or not _has_messages():
        return Finding("note", "jazzy, without flashrt_ros's messages", "colcon build, then source install/")
    return Finding("ok", "jazzy, with flashrt_ros")


def _has_messages() -> bool:
    try:
        return importlib.util.find_spec("flashrt_ros.msg") is not None
    except ImportError:
        return False


def check_gpu() -> Finding:
    import torch

    from ..options import FP8_CAPABILITY, MINIMUM_CAPABILITY

    if not torch.cuda.is_available():
        listed = output_of(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
        if listed:
            name = listed.strip().splitlines()[0]
            return Finding(
                "note", f"{name}, but torch cannot use it", "compare the lines driver and torch below"
            )
        return Finding("note", "none", "the CPU runs small policies only: a GPU of sm_87 or newer is needed")
    capability = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    found = f"{torch.cuda.get_device_name()}, sm_{capability[0]}{capability[1]}, {memory:.0f} GiB"
    if capability < MINIMUM_CAPABILITY:
        return Finding("note", found, "compute capability 8.0 or newer is needed; the CPU runs without")
    if capability < FP8_CAPABILITY:
        return Finding("ok", f"{found}: bf16 and fp16, no fp8")
    return Finding("ok", found)


def check_driver() -> Finding:
    version = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if version:
        return Finding("ok", version.strip().splitlines()[0])
    release = Path("/etc/nv_tegra_release")
    if release.is_file():
        return Finding("ok", release.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    if Path("/proc/driver/nvidia/version").is_file():
        return Finding("note", "loaded, but nvidia-smi does not answer", "restart, or install it again")
    return Finding("note", "none", "with an NVIDIA GPU: install its driver, 580 or newer for CUDA 13")


def check_cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        return Finding("note", "torch was built without CUDA", "install torch from PyPI's CUDA builds")
    if not torch.cuda.is_available():
        return Finding("note", f"{torch.version.cuda} in torch, not usable", "see the lines GPU and driver")
    return Finding("ok", f"{torch.version.cuda} in torch")


def check_nvcc() -> Finding:
    place = shutil.which("nvcc") or next(
        (str(path) for path in (Path("/usr/local/cuda/bin/nvcc"),) if path.is_file()), None
    )
    text = output_of([place, "--version"]) if place else None
    release = re.search(r"release ([\d.]+)", text or "")
    if place is None or release is None:
        return Finding("note", "none", "to build the kernels: install the CUDA toolkit, 12.8 or newer")
    if shutil.which("nvcc") is None:
        found = f"{release[1]} at {place}, not on PATH"
        return Finding("note", found, f"export PATH={Path(place).parent}:$PATH")
    return Finding("ok", f"{release[1]} at {place}")


def check_torch() -> Finding:
    version = version_of("torch")
    if version is None:
        return Finding("missing", "not installed", "make setup, or pip install torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("missing", f"{version} cannot be imported ({error})", "install it again")
    return Finding("ok", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")


def check_kernels() -> Finding:
    from ..errors import HardwareError
    from ..ops import native

    try:
        place = str(native.load().__file__)
    except HardwareError as error:
        return Finding("note", str(error), "torch's operations are used until then")
    reason = native.unavailable_reason()
    if reason is None:
        return Finding("ok", place)
    return Finding("note", f"{place}, not usable: {reason}", "see the line GPU; torch's operations are used")


def check_tokenizer() -> Finding:
    from ..checkpoints import tokenizer

    named = os.environ.get(tokenizer.ENVIRONMENT_VARIABLE)
    if named:
        there = Path(named).is_file()
        advice = f"correct or unset {tokenizer.ENVIRONMENT_VARIABLE}"
        return Finding("ok", named) if there else Finding("missing", f"{named}: no such file", advice)
    found = next(filter(Path.is_file, tokenizer.search_path()), None)
    if found is None:
        return Finding(
            "note",
            "PaliGemma's is not here",
            f"run {tokenizer.DOWNLOAD_COMMAND}, unless the checkpoint has its own tokenizer.model",
        )
    return Finding("ok", str(found))


def check_server() -> Finding:
    missing = [
        name
        for name in ("fastapi", "uvicorn", "websockets", "msgpack", "python-multipart", "prometheus-client")
        if version_of(name) is None
    ]
    if missing:
        return Finding("note", f"no {', '.join(missing)}", "for flashrt serve: pip install '.[server]'")
    return Finding("ok", f"fastapi {version_of('fastapi')}, uvicorn {version_of('uvicorn')}")


def check_middleware() -> Finding:
    if importlib.util.find_spec("rclpy") is None:
        return Finding("note", "no ROS", "see the line ROS")
    named = os.environ.get("RMW_IMPLEMENTATION")
    discovery = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    domain = os.environ.get("ROS_DOMAIN_ID", "0")
    shared = f"domain {domain}, discovery {discovery}"
    code = "import rclpy.utilities as u; print(u.get_rmw_implementation_identifier())"
    used = output_of([sys.executable, "-c", code])
    if used is None:
        return Finding(
            "note",
            f"{named or 'the default'} cannot be loaded",
            "install its package, or unset RMW_IMPLEMENTATION",
        )
    used = used.strip()
    profile = {"rmw_fastrtps_cpp": "FASTRTPS_DEFAULT_PROFILES_FILE", "rmw_cyclonedds_cpp": "CYCLONEDDS_URI"}
    variable = profile.get(used)
    if variable is not None and not os.environ.get(variable):
        return Finding(
            "ok", f"{used}, {shared}, no {variable}: raw images need the profile in config/"
        )
    return Finding("ok", f"{used}, {shared}")


def check_clock() -> Finding:
    """A camera on another machine is judged by its stamps: clocks must agree to a few milliseconds."""
    chrony = output_of(["chronyc", "-c", "tracking"])
    if chrony:
        fields = chrony.strip().split(",")
        offset_ms = abs(float(fields[4])) * 1e3 if len(fields) > 4 else float("inf")
        found = f"chrony, {offset_ms:.2f} ms off {fields[1] or 'its source'}" if len(fields) > 4 else "chrony"
        if offset_ms <= CLOCK_LIMIT_MS:
            return Finding("ok", found)
        return Finding("note", found, "wait for chrony to settle, or check its sources: chronyc sources")
    status = output_of(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if status is not None and status.strip() == "yes":
        return Finding("ok", "synchronised, says timedatectl")
    return Finding(
        "note",
        "not synchronised, or not known",
        "with sensors on several machines: install chrony (or ptp4l) on each of them",
    )


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": check_python,
    "ROS": check_ros,
    "torch": check_torch,
    "GPU": check_gpu,
    "driver": check_driver,
    "CUDA": check_cuda,
    "nvcc": check_nvcc,
    "kernels": check_kernels,
    "tokenizer": check_tokenizer,
    "server": check_server,
    "middleware (RMW)": check_middleware,
    "clock": check_clock,
}
