#!/usr/bin/env bash
# The demo with a random tiny checkpoint, made first when there is none or another version made it.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
checkpoint=build/demo/checkpoint

# Another version of the code may write other weights: its sources are the version.
version=$(cat flashrt_runtime/__init__.py $(find flashrt_runtime/checkpoints -name '*.py' | LC_ALL=C sort) | sha256sum)
if [ ! -d "$checkpoint" ] || [ "$(cat "$checkpoint.version" 2> /dev/null)" != "$version" ]; then
    rm -rf "$checkpoint"
    flashrt make-checkpoint --size tiny --preset demo_arm --out "$checkpoint"
    echo "$version" > "$checkpoint.version"
fi
# -P: not the source tree in the current directory, whose flashrt_ros has no messages.
exec python -P -m flashrt_ros.demo --checkpoint "$checkpoint" "$@"
