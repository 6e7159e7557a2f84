# Shared by the scripts: messages, steps with a log and a stamp, system packages.
# Sourced with STAMPS and LOGS set to directories.

say() { printf '==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
die() { printf 'flashrt: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" > /dev/null 2>&1; }

# run LOG TITLE COMMAND...: output goes to a log; a sign of life every 20 s, the log's end on failure.
run() {
    local log=$LOGS/$1.log title=$2 status=0 started=$SECONDS beat=20 pid
    shift 2
    mkdir -p "$LOGS"
    say "$title"
    "$@" > "$log" 2>&1 < /dev/null &
    pid=$!
    while kill -0 "$pid" 2> /dev/null; do
        sleep 0.2
        if [ $((SECONDS - started)) -ge $beat ]; then
            note "... $beat s"
            beat=$((beat + 20))
        fi
    done
    wait "$pid" || status=$?
    if [ $status -ne 0 ]; then
        tail -n 40 "$log" >&2
        die "failed: $title (status $status; the whole output is in $log)"
    fi
    note "done in $((SECONDS - started)) s"
}

# run_once NAME TITLE "INPUT..." COMMAND...: run, unless it has succeeded before with the same inputs. An input is
# a file (its content counts) or any other word (itself).
run_once() {
    local name=$1 title=$2 inputs=$3 input key
    shift 3
    key=$({
        for input in $inputs; do
            if [ -f "$input" ]; then sha256sum "$input"; else echo "$input"; fi
        done
        echo "$*"
    } | sha256sum)
    [ "$(cat "$STAMPS/$name" 2> /dev/null)" != "$key" ] || return 0
    rm -f "$STAMPS/$name"
    run "$name" "$title" "$@"
    echo "$key" > "$STAMPS/$name"
}

# system_packages PURPOSE PACKAGE...: install with apt where that is allowed (as root, or FLASHRT_APT=1 with sudo that
# asks for no password), else say what to install and stop.
system_packages() {
    local purpose=$1 sudo=()
    shift
    local advice="$purpose: missing system packages: run 'apt-get install $*' as root and try again"
    [ "${FLASHRT_APT:-}" != 0 ] || die "$advice (FLASHRT_APT=0 forbids it here)"
    have apt-get || die "$purpose: missing system packages: install what Debian calls: $*"
    if [ "$(id -u)" -ne 0 ]; then
        [ "${FLASHRT_APT:-}" = 1 ] || die "$advice, or set FLASHRT_APT=1 to use sudo"
        sudo -n true 2> /dev/null || die "$advice (FLASHRT_APT=1 needs sudo without a password)"
        sudo=(sudo -n)
    fi
    run apt "$purpose: apt-get install $*" bash -c \
        "${sudo[*]} apt-get update -qq && ${sudo[*]} env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $*"
}
