#!/usr/bin/env bash
# colcon build of this package into build/ and install/, in the environment that scripts/env.sh gives.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
# The workspace's own earlier build must not be an underlay of the new one.
export AMENT_PREFIX_PATH=${AMENT_PREFIX_PATH//"$PWD/install/flashrt_ros:"/}
export CMAKE_PREFIX_PATH=${CMAKE_PREFIX_PATH//"$PWD/install/flashrt_ros:"/}

args=(--symlink-install --base-paths . --event-handlers console_direct+)
[ -z "${COLCON_LOG_PATH:-}" ] && export COLCON_LOG_PATH="$PWD/log"
MAKEFLAGS="-j${FLASHRT_JOBS:-$(nproc)}" colcon build "${args[@]}" --cmake-args \
    -DCMAKE_BUILD_TYPE=Release \
    -DPython3_EXECUTABLE="$VIRTUAL_ENV/bin/python" \
    "-DFLASHRT_CUDA_ARCHS=${FLASHRT_CUDA_ARCHS:-}"
