#!/usr/bin/env bash
# Make `play_launch` (PyPI) usable where ROS is installed from wheels: it reads real launch files without
# `launch` and `launch_ros`, which no wheel has. Only the launch-file tests use it.
#
#   scripts/setup_play_launch.sh OUT_DIR      -> OUT_DIR/play_launch, a wrapper ready to run
#
# Exit 77 with one line of reason where something it needs is missing, so that a test can skip with it.
set -euo pipefail

VERSION=0.16.0
out=${1:?usage: setup_play_launch.sh OUT_DIR}
python=${PYTHON:-python3}

unavailable() { echo "play_launch unavailable: $1" >&2; exit 77; }

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -f "$out/.complete-$VERSION" ] && exit 0

# The binary embeds CPython 3.10: its shared library may come from the system or from pyenv.
find_library() {
    local name=$1 folder
    ldconfig -p 2>/dev/null | awk -v name="$name" '$1 == name { print $NF; exit }' | grep . && return
    for folder in ${LD_LIBRARY_PATH//:/ } "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/lib /usr/lib /usr/local/lib; do
        [ -e "$folder/$name" ] && echo "$folder/$name" && return
    done
    return 1
}
python_library=$(find_library libpython3.10.so.1.0) || unavailable "no libpython3.10.so.1.0 (pyenv's 3.10 has it)"
find_library libz3.so.4 >/dev/null || unavailable "no libz3.so.4 (Debian and Ubuntu: libz3-4)"
compiler=$(command -v "${CC:-gcc}") || unavailable "no C compiler"
command -v nm >/dev/null || unavailable "no nm (binutils)"

rm -rf "$out/packages" "$out/lib"
mkdir -p "$out/lib"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$out/packages" \
    "play_launch==$VERSION" >&2 || unavailable "pip could not install play_launch==$VERSION"
binary=$out/packages/play_launch/bin/play_launch

# No wheel has composition_interfaces. Resolving a launch file never calls into it, so a library that only
# defines the symbols the binary links against is enough.
for kind in generator typesupport; do
    nm -D --undefined-only "$binary" | awk '/composition_interfaces__srv/ { print "void *" $2 "(void) { return 0; }" }' \
        | { if [ "$kind" = generator ]; then grep -v typesupport; else grep typesupport; fi; } \
        | "$compiler" -x c -shared -fPIC -o "$out/lib/libcomposition_interfaces__rosidl_${kind}_c.so" - \
        || unavailable "the stand-in for composition_interfaces does not compile"
done

# `ament_index_python` must be importable by the embedded 3.10: it is pure Python, so ours will do.
index=$("$python" -c 'import ament_index_python, os; print(os.path.dirname(os.path.dirname(ament_index_python.__file__)))' \
    2>/dev/null) || unavailable "ament_index_python is not importable: source scripts/env.sh first"
mkdir -p "$out/python"
ln -sfn "$index/ament_index_python" "$out/python/ament_index_python"

cat > "$out/play_launch" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH="$out/packages/play_launch/lib:$out/lib:$(dirname "$python_library"):\$LD_LIBRARY_PATH"
export PYTHONPATH="$out/python:\$PYTHONPATH"
exec "$binary" "\$@"
WRAPPER
chmod +x "$out/play_launch"
touch "$out/.complete-$VERSION"
