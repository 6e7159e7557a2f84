# Source this file: ROS 2, this workspace and .venv/bin for the current shell (bash or zsh, any directory).
#   . scripts/env.sh
# Sourcing it twice changes nothing. It ends with status 1 and one line when `make setup` has not been run.

_flashrt_env() {
    local root="$1" shell="$2" venv="$1/.venv" nounset=0 failed=0
    if [ ! -f "$venv/flashrt.env" ]; then
        echo "flashrt: $root is not set up: run 'make setup' there first" >&2
        return 1
    fi
    # ROS set-up scripts read unset variables.
    case $- in *u*) nounset=1; set +u ;; esac

    # Written by scripts/setup.sh: FLASHRT_ROS (wheels or the prefix of an installed ROS), MUJOCO_GL.
    local FLASHRT_ROS="" FLASHRT_MUJOCO_GL=""
    . "$venv/flashrt.env"

    if [ "$FLASHRT_ROS" = wheels ]; then
        # What /opt/ros/jazzy/setup.bash does for an installed ROS.
        export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3
        export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1  # else every start of python executes itself again
        _flashrt_prepend AMENT_PREFIX_PATH "$venv"
        _flashrt_prepend CMAKE_PREFIX_PATH "$venv"
        local libs
        while IFS= read -r libs; do
            [ -n "$libs" ] && _flashrt_prepend LD_LIBRARY_PATH "$libs"
        done <<EOF
$(find "$venv"/lib/python3.12/site-packages -maxdepth 1 -name 'ros_*.libs')
EOF
        _flashrt_prepend LD_LIBRARY_PATH "$venv/lib"
    else
        . "$FLASHRT_ROS/setup.$shell" || failed=1
    fi
    # CMake's FindPython3 follows VIRTUAL_ENV.
    export VIRTUAL_ENV="$venv"
    _flashrt_prepend PATH "$venv/bin"
    export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
    # Off-screen rendering of the demo robot's cameras; a value set by the user wins.
    [ -n "$FLASHRT_MUJOCO_GL" ] && export MUJOCO_GL="${MUJOCO_GL:-$FLASHRT_MUJOCO_GL}"

    # FLASHRT_NO_OVERLAY: only what this workspace is built on (scripts/build_workspace.sh).
    if [ -z "${FLASHRT_NO_OVERLAY:-}" ] && [ -f "$root/install/local_setup.$shell" ]; then
        . "$root/install/local_setup.$shell" || failed=1
    fi
    [ "$nounset" = 1 ] && set -u
    return $failed
}

# _flashrt_prepend VARIABLE ENTRY: put ENTRY first in a colon-separated variable unless it is there.
_flashrt_prepend() {
    local value
    eval "value=\"\${$1:-}\""
    case ":$value:" in
        *":$2:"*) ;;
        *) eval "export $1=\"\$2\${value:+:\$value}\"" ;;
    esac
}

if [ -n "${BASH_VERSION:-}" ]; then
    _flashrt_env "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" bash
elif [ -n "${ZSH_VERSION:-}" ]; then
    # ${(%):-%x} is zsh's name of the file being sourced; bash could not even parse it outside eval.
    eval '_flashrt_env "$(cd "$(dirname "${(%):-%x}")/.." && pwd)" zsh'
else
    echo "flashrt: scripts/env.sh needs bash or zsh" >&2
    false
fi
