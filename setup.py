"""Adds the native kernels to `pip install .` when a CUDA compiler is found; the rest is in pyproject.toml.

FLASHRT_BUILD_KERNELS=0 leaves them out, =1 makes a missing compiler an error. FLASHRT_CUDA_ARCHS ("87;90a")
names the architectures, by default that of this machine's GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeKernels(build_ext):
    """Builds native_kernels/ with its own CMake project."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "kernels"
        options = [
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DFLASHRT_CUDA_ARCHS={os.environ.get('FLASHRT_CUDA_ARCHS', '')}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        subprocess.run(["cmake", "-S", str(ROOT / "native_kernels"), "-B", str(build), *options], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)
        (built,) = build.glob("_native*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


def kernels() -> list[Extension]:
    """The extension to build, or none."""
    wanted = os.environ.get("FLASHRT_BUILD_KERNELS", "auto")
    if wanted == "0":
        return []
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    if missing and wanted == "1":
        raise SystemExit(f"FLASHRT_BUILD_KERNELS=1 needs {' and '.join(missing)} on PATH")
    return [] if missing else [Extension("flashrt_runtime._native", sources=[])]


setup(ext_modules=kernels(), cmdclass={"build_ext": CMakeKernels})
