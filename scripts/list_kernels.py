"""List the CUDA kernels in a binary: architectures, registers and spilled bytes a thread (by cuobjdump).

Usage: python list_kernels.py _native.so   (cuobjdump: CUDA's, else that of the wheel nvidia-cuda-cuobjdump)
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path


def cuobjdump() -> str:
    """Path of the tool."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    for path in Path(sysconfig.get_paths()["platlib"]).glob("nvidia/cu*/bin/cuobjdump"):
        path.chmod(0o755)  # pip does not make a wheel's data files executable
        return str(path)
    raise SystemExit("list_kernels.py: no cuobjdump: put CUDA's bin directory on PATH")


def demangle(names: list[str]) -> list[str]:
    """C++ names without parameters and anonymous namespaces."""
    command = ["c++filt", "--no-params"]
    plain = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)::|^void ", "", name) for name in plain.splitlines()]


def main() -> int:
    binary = sys.argv[1]
    report = subprocess.run([cuobjdump(), "-res-usage", binary], capture_output=True, text=True, check=True)
    usage: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    arch = function = ""
    for line in report.stdout.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+).* LOCAL:(\d+)", line):
            usage[function][arch] = int(match[1]), int(match[2])
    if not usage:
        print(f"list_kernels.py: no kernel in {binary}", file=sys.stderr)
        return 1

    every = {arch for archs in usage.values() for arch in archs}
    archs = sorted(every, key=lambda arch: int(re.sub(r"\D", "", arch)))
    rows = sorted(zip(demangle(list(usage)), usage.values(), strict=True), key=lambda row: row[0])
    width = max(len(name) for name, _ in rows)
    print(f"{len(rows)} kernels in {binary}; registers a thread (+ spilled bytes) on each architecture")
    print(" " * width, *(f"{arch:>8}" for arch in archs))
    for name, per_arch in rows:
        cells = []
        for arch in archs:
            registers, local = per_arch.get(arch, (0, 0))
            cells.append(f"{registers}+{local}" if local else str(registers or "-"))
        print(name.ljust(width), *(f"{cell:>8}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
