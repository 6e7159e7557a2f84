#!/usr/bin/env bash
# Run a command in the environment of scripts/env.sh, from the current directory: in_env.sh COMMAND...
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$@"
