#!/usr/bin/env bash
# Native kernels for every supported architecture, into build/kernels; lists what the binary holds.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
. scripts/lib.sh
LOGS=$PWD/build/logs
STAMPS=$VIRTUAL_ENV/.stamps
# Orin; Ada; H100, H200; B200; Thor; RTX 50
archs=${FLASHRT_CUDA_ARCHS:-87;89;90a;100a;110a;120a}
have nvcc || die "make kernels needs a CUDA compiler: put nvcc (CUDA 13.0 or newer for sm_110a) on PATH"

configure_and_build() {
    cmake -S native_kernels -B build/kernels -DCMAKE_BUILD_TYPE=Release \
        -DPython3_EXECUTABLE="$VIRTUAL_ENV/bin/python" "-DFLASHRT_CUDA_ARCHS=$archs"
    cmake --build build/kernels --parallel "${FLASHRT_JOBS:-$(nproc)}"
}
run kernels-build "native kernels for $archs" configure_and_build
have cuobjdump || run_once kernels "cuobjdump" scripts/requirements/kernels.txt \
    python -m pip install -qq -r scripts/requirements/kernels.txt
python scripts/list_kernels.py build/kernels/_native*.so
