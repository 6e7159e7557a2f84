#!/usr/bin/env bash
# colcon build of this package into build/ and install/, in the environment that scripts/env.sh gives.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Not on top of whatever workspace the calling shell has sourced, this one's earlier build included.
unset AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH PYTHONPATH
FLASHRT_NO_OVERLAY=1 . scripts/env.sh

# Links to files that are gone would be left in install/.
[ ! -d install ] || find install -xtype l -delete

args=(--symlink-install --base-paths . --event-handlers console_direct+)
[ -z "${COLCON_LOG_PATH:-}" ] && export COLCON_LOG_PATH="$PWD/log"
MAKEFLAGS="-j${FLASHRT_JOBS:-$(nproc)}" colcon build "${args[@]}" --cmake-args \
    -DCMAKE_BUILD_TYPE=Release \
    -DPython3_EXECUTABLE="$VIRTUAL_ENV/bin/python" \
    "-DFLASHRT_CUDA_ARCHS=${FLASHRT_CUDA_ARCHS:-}"
