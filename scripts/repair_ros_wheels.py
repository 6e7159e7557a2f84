"""Make the ROS 2 wheels of a virtual environment usable for building packages.

The CMake files exported by the message wheels name the include directories of the machine that built
the wheels (/opt/python/cp312-cp312/...). Every package that depends on a message package inherits these
paths and CMake stops: "Imported target ... includes non-existent path". They are replaced by the include
directories of this interpreter and of its numpy. Nothing else needs repair, an apt installation of ROS
needs none, and a second run changes nothing.

Usage: python repair_ros_wheels.py   (with the interpreter of the virtual environment)
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy

BUILD_MACHINE = r"/opt/(?:python|_internal)/[^;\"\s)]*"
NUMPY_INCLUDE = re.compile(BUILD_MACHINE + r"/numpy/(?:_core|core)/include")
PYTHON_INCLUDE = re.compile(BUILD_MACHINE + r"/include/python3\.\d+")


def repair(prefix: Path) -> int:
    """Rewrite the exported CMake files under `prefix`; return how many changed."""
    python_include = sysconfig.get_paths()["include"]
    numpy_include = numpy.get_include()
    changed = 0
    for path in [*prefix.glob("share/*/cmake/*.cmake"), *prefix.glob("lib/cmake/**/*.cmake")]:
        text = path.read_text()
        repaired = PYTHON_INCLUDE.sub(python_include, NUMPY_INCLUDE.sub(numpy_include, text))
        if repaired != text:
            path.write_text(repaired)
            changed += 1
    return changed


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("repair_ros_wheels.py: run it with the interpreter of the virtual environment", file=sys.stderr)
        return 1
    print(f"repaired {repair(Path(sys.prefix))} exported CMake files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
