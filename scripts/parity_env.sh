#!/usr/bin/env bash
# Sets up .venv-parity: LeRobot, and in .venv-parity/openpi openpi's torch model, for the parity tests and
# `flashrt parity --against lerobot`. Needs a finished `make setup`, whose torch it uses (no second 3 GB).
# Safe to run again: a step is skipped while its requirements are unchanged.
#
# Use: .venv-parity/bin/python … for LeRobot; PYTHONPATH=.venv-parity/openpi .venv-parity/bin/python … for openpi.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=.venv-parity
STAMPS=$VENV/.stamps
LOGS=build/logs
REQ=scripts/requirements
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
. scripts/lib.sh

main() {
    [ -f .venv/.setup-complete ] || die ".venv is not complete: run 'make setup' first"
    local key
    key="$(.venv/bin/python -V) $PWD"
    if [ "$(cat "$VENV/.made-for" 2> /dev/null)" != "$key" ]; then
        rm -rf "$VENV"
        run parity-venv "virtual environment for parity" .venv/bin/python -m venv "$VENV"
        echo "$key" > "$VENV/.made-for"
    fi
    mkdir -p "$STAMPS"
    run_once parity "LeRobot" "$REQ/parity.txt" install -r "$REQ/parity.txt"
    share_torch
    run_once parity_openpi "openpi (torch)" "$REQ/parity_openpi.txt" install_openpi
    run_once parity_check "import of both" "$STAMPS/parity $STAMPS/parity_openpi $REQ/torch.txt" check
}

install() {
    "$VENV/bin/python" -m pip install -qq --no-deps "$@"
}

install_openpi() {
    rm -rf "$VENV/openpi"
    install --target "$VENV/openpi" -r "$REQ/parity_openpi.txt"
}

# A .pth line is appended to sys.path: what this environment has itself comes first, torch and its CUDA libraries
# are found in .venv.
share_torch() {
    local site
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    .venv/bin/python -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("torch").origin).parent.parent)' > "$site/zz_torch_of_venv.pth"
}

check() {
    "$VENV/bin/python" -c 'import lerobot.policies.pi05.modeling_pi05, lerobot.policies.pi0.modeling_pi0
import lerobot.policies.pi0_fast.modeling_pi0_fast'
    PYTHONPATH=$VENV/openpi JAX_PLATFORMS=cpu "$VENV/bin/python" -c 'import openpi.models_pytorch.pi0_pytorch
import openpi.models.pi0_fast'
}

main
