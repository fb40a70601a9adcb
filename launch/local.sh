#!/usr/bin/env bash
# One run on this machine: one process with all GPUs (or the CPU), or several processes.
#
#   launch/local.sh [--processes N] [--devices D] [--port P] [--dry_run] -- FLAGS OF minillm_jax.main
#
#   --processes N   so many processes; the GPUs are shared out evenly among them (default 1)
#   --devices D     run on the CPU, with D devices in each process
#   --port P        where process 0 listens (default: a free port)
#   --dry_run       print the commands and end
#
# The output of several processes has the number of the process before each line. INT and TERM go
# to all of them, and they save; when one fails the others are ended, and its exit code is that of
# this script.
set -euo pipefail

python=${PYTHON:-python}
grace=25 # seconds from a signal to KILL: a run saves within 20

usage() {
    echo "error: $1; usage: launch/local.sh [--processes N] [--devices D] [--port P] [--dry_run]" \
        "-- --config FILE.py ..." >&2
    exit 2
}

number() { # OPTION VALUE
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$1 takes a number from 1"
}

processes=1 devices='' port='' dry=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --processes) number "$@" && processes=$2 && shift ;;
        --devices) number "$@" && devices=$2 && shift ;;
        --port) number "$@" && port=$2 && shift ;;
        --dry_run) dry=yes ;;
        *) usage "no option $1" ;;
    esac
    shift
done
[ $# -gt 1 ] || usage "nothing to run"
shift
run=("$python" -m minillm_jax.main "$@")

common=()
[ -z "$devices" ] || common+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")

if [ "$processes" = 1 ]; then
    [ -z "$dry" ] || { printf '%s\n' "${common[*]}${common:+ }$(printf '%q ' "${run[@]}")" && exit; }
    exec env "${common[@]}" "${run[@]}"
fi

share=0 # GPUs of each process
if [ -z "$devices" ] && command -v nvidia-smi > /dev/null; then
    gpus=$(nvidia-smi --list-gpus | wc -l)
    share=$((gpus / processes))
    [ $((share * processes)) = "$gpus" ] && [ "$share" -gt 0 ] ||
        usage "$gpus GPUs cannot be shared out evenly among $processes processes"
fi
[ -n "$port" ] || port=$("$python" -c '
import socket
with socket.socket() as found:
    found.bind(("", 0))
    print(found.getsockname()[1])')
common+=("JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=$processes")

set -m # or INT would be ignored in background processes
pids=()

end() { # SIGNAL CODE: end all processes, and this one; with 0 where TERM has ended all with 0
    trap '' INT TERM
    kill -s "$1" "${pids[@]}" 2> /dev/null || true
    for ((i = 0; i < 10 * grace; i++)); do
        kill -0 "${pids[@]}" 2> /dev/null || break
        sleep 0.1
    done
    kill -s KILL "${pids[@]}" 2> /dev/null || true
    local worst=0
    for pid in "${pids[@]}"; do wait "$pid" || worst=$?; done
    [ "$2" = 143 ] && [ "$worst" = 0 ] && exit 0
    exit "$2"
}
trap 'end INT 130' INT
trap 'end TERM 143' TERM

for ((rank = 0; rank < processes; rank++)); do
    own=("JAX_PROCESS_ID=$rank")
    [ "$share" = 0 ] ||
        own+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $((rank * share)) $((rank * share + share - 1)))")
    if [ -n "$dry" ]; then
        printf '%s\n' "${common[*]} ${own[*]} $(printf '%q ' "${run[@]}")"
        continue
    fi
    env "${common[@]}" "${own[@]}" "${run[@]}" < /dev/null \
        > >(sed -u "s/^/[$rank] /") 2> >(sed -u "s/^/[$rank] /" >&2) &
    pids+=($!)
done
for _ in "${pids[@]}"; do
    wait -n || end TERM $?
done
