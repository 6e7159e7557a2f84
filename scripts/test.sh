#!/usr/bin/env bash
# Checks, then tests: test.sh fast|all. Stops before the tests when a check fails; pytest's summary comes last.
# The compilation of the native kernels is part of the set-up where nvcc is present.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/lint.sh || { echo "flashrt: the tests were not run because of the failed checks above" >&2; exit 1; }
. scripts/env.sh

markers="not slow and not gpu and not soak and not parity"
if [ "${1:-fast}" = all ]; then
    markers=""
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || markers="not gpu"
fi
echo "==> pytest ${markers:+-m \"$markers\"}"
# Not `python -m pytest`: that puts the source tree before install/, whose flashrt_ros has the messages.
exec pytest -m "$markers" test
