#!/usr/bin/env bash
# Serve in a tmux session, which goes on when you log out:
#
#   MODEL=/models/Qwen3-4B NAME=qwen3-4b-local CUDA_VISIBLE_DEVICES=0 deploy/tmux.sh start --max-batch-size 64
#   deploy/tmux.sh attach | status | logs | stop         (leave an attached session with Ctrl-b d)
#
# start waits until the model is loaded and prints the URL, or the error. Flags after it go to `python -m server`; all
# MICROBATCH_* variables count too. A server that was ready and failed is started again. stop lets it finish what it
# has accepted. Variables: SESSION (microbatch), MODEL, NAME, PORT (21010), LOG (out/SESSION.log), PYTHON
# (.venv/bin/python), START_TIMEOUT in seconds (900).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

SESSION=${SESSION:-microbatch}
PORT=${PORT:-${MICROBATCH_PORT:-21010}}
LOG=${LOG:-$ROOT/out/$SESSION.log}
[[ $LOG = /* ]] || LOG=$PWD/$LOG
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
START_TIMEOUT=${START_TIMEOUT:-900}
HANDOVER=$ROOT/out/$SESSION.env

die() {
    echo "microbatch: $*" >&2
    exit 1
}

running() { tmux has-session -t "=$SESSION" 2>/dev/null; }

pane() { tmux display-message -p -t "=$SESSION:" "$1"; }

option() { tmux show-options -qv -t "=$SESSION:" "@$1"; }

# The child of the pane's shell that is the server; none between two starts.
server() { pgrep -P "$(pane '#{pane_pid}')" -f -- '-m server' || true; }

# What the server at this address says of itself.
state() {
    "$PYTHON" - "$1" <<'PROBE' || echo silent
import json, sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    answer = opener.open(sys.argv[1] + "/health/ready", timeout=5)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    sys.exit(1)
try:
    print(json.load(answer)["state"])
except (ValueError, KeyError, TypeError):
    print("something else")
PROBE
}

start() {
    command -v tmux >/dev/null || die "tmux is not installed"
    [ -x "$PYTHON" ] || die "there is no $PYTHON: run make install first, or set PYTHON"
    ! running || die "the session $SESSION runs already: deploy/tmux.sh status, or set SESSION for another one"
    case " $* " in *" --host"* | *" --port"*) die "set the address with MICROBATCH_HOST and PORT" ;; esac
    local from root
    root=http://$(reachable "${MICROBATCH_HOST:-127.0.0.1}"):$PORT
    [ "$(state "$root")" = silent ] || die "something answers at $root already: set another PORT"
    mkdir -p "$(dirname "$LOG")" "$(dirname "$HANDOVER")"
    touch "$LOG"
    from=$(wc -c <"$LOG")
    # A tmux server that runs already has the environment of whoever started it, and arguments can be seen by everyone.
    (umask 077 && export -p >"$HANDOVER")
    # As words, which tmux runs by itself: some shells, such as fish, would stand between the pane and this script.
    tmux new-session -d -s "$SESSION" -c "$PWD" "$ROOT/deploy/tmux.sh" run "$HANDOVER" "$@" \; \
        set-option @root "$root" \; set-option @log "$LOG"
    if wait_ready; then
        echo "ready at $root/v1 (session $SESSION, log $LOG)"
    else
        tail -c "+$((from + 1))" "$LOG" | tail -n 20 >&2
        ! running || end
        die "it did not start; the lines above are the last of $LOG"
    fi
}

reachable() {
    case $1 in
        0.0.0.0) echo 127.0.0.1 ;;
        ::) echo '[::1]' ;;
        *:*) echo "[$1]" ;;
        *) echo "$1" ;;
    esac
}

wait_ready() {
    local end=$((SECONDS + START_TIMEOUT))
    while running && [ "$SECONDS" -lt "$end" ]; do
        if [ "$(state "$(option root)")" = ready ] && [ -n "$(server)" ]; then
            tmux set-option -t "=$SESSION:" @ready 1
            return 0
        fi
        sleep 0.5
    done
    return 1
}

# Inside the session: the server, and again after a failure once it had been ready.
run() {
    local own=$TMUX status
    # shellcheck source=/dev/null
    source "$1"
    rm -f "$1"
    shift
    export TMUX=$own PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    local flags=(--port "$PORT")
    [ -z "${MODEL:-}" ] || flags+=(--model "$MODEL")
    [ -z "${NAME:-}" ] || flags+=(--name "$NAME")
    while :; do
        set +e
        # -P: the working folder, from which paths are relative, may have a package of the same name.
        "$PYTHON" -P -m server "${flags[@]}" "$@" 2>&1 | tee -ai "$LOG"
        status=${PIPESTATUS[0]}
        set -e
        case $status in 0 | 2 | 130 | 143) exit "$status" ;; esac  # stopped, or told something that makes no sense
        [ "$(option ready)" = 1 ] || exit "$status"
        echo "the server ended with status $status and is started again" | tee -ai "$LOG"
        sleep 2
    done
}

status() {
    running || { echo "not running (no session $SESSION)"; exit 3; }
    local now
    now=$(state "$(option root)")
    echo "$now at $(option root)/v1 (session $SESSION, process $(server), log $(option log))"
    [ "$now" = ready ]
}

end() {
    local process
    process=$(server)
    if [ -z "$process" ]; then # between two starts
        tmux kill-session -t "=$SESSION"
        return
    fi
    tmux set-option -t "=$SESSION:" @ready 0 # whatever it ends with now, it is not started again
    kill -TERM "$process"
    while running; do sleep 0.2; done
}

stop() {
    running || { echo "not running (no session $SESSION)"; exit 3; }
    echo "stopping: what was accepted is finished first"
    end
    echo "stopped"
}

case ${1:-} in
    start | run) "$@" ;;
    status | stop) "$1" ;;
    attach) running || die "there is no session $SESSION"; exec tmux attach-session -t "=$SESSION" ;;
    logs) ! running || LOG=$(option log); exec tail -n 100 -F "$LOG" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
