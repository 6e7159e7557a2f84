#!/usr/bin/env bash
# Checks, then tests: test.sh fast|all. Stops before the tests when a check fails; pytest's summary comes last.
# The compilation of the native kernels is part of the set-up where nvcc is present.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib.sh
scripts/lint.sh || die "the tests were not run because of the failed checks above"
. scripts/env.sh

markers="not slow and not gpu and not soak and not parity"
if [ "${1:-fast}" = all ]; then
    markers=""
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || markers="not gpu"
fi
# The ROS tests leave themselves out where there is no ROS; here there has to be one.
(cd / && python -c 'import rclpy, flashrt_ros.msg') ||
    die "the workspace's messages cannot be imported: run 'make clean' and try again"

echo "==> pytest ${markers:+-m \"$markers\"}"
# The sources come before install/ on sys.path; the nodes that ROS tests start are the installed ones.
exec python -m pytest -m "$markers" test
