#!/usr/bin/env bash
# Style, types and package.xml; every check runs, the status tells whether all passed.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
status=0

check() {
    local title=$1
    shift
    echo "==> $title"
    "$@" || { status=1; failed+=("$title"); }
}

clang_format() {
    local file status=0
    for file in native_kernels/*.{cu,cuh,h,cpp}; do
        clang-format --dry-run --Werror "$file" 2> /dev/null && continue
        echo "$file: not formatted: run .venv/bin/clang-format -i $file"
        status=1
    done
    return $status
}

check "ruff" ruff check --quiet --output-format concise .
check "mypy" mypy --no-error-summary
check "clang-format" clang_format
check "package.xml" python scripts/check_package_xml.py package.xml
if [ $status -ne 0 ]; then
    echo "flashrt: failed: ${failed[*]}" >&2
fi
exit $status
