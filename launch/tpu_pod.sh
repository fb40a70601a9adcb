#!/usr/bin/env bash
# One run on a Cloud TPU slice of any size, with a process on each of its hosts.
#
#   launch/tpu_pod.sh COMMAND --name N --zone Z [OPTIONS] [-- FLAGS OF minillm_jax.main]
#
#   create     ask for the slice and wait until it is there
#   install    copy this checkout (its last commit) to every host, with Python and jax for TPU
#   run        run minillm_jax.main with FLAGS on every host
#   train      all of these; after a preemption again, on a new slice, until the run is complete
#   delete     give the slice back
#
#   --name N --zone Z       the slice, and the zone that has it
#   --type T                accelerator, such as v5litepod-16 (create, train)
#   --version V             image of the hosts (create, train), default tpu-ubuntu2204-base
#   --project P             project, default that of gcloud
#   --nfs SERVER:/SHARE     mounted on every host as /mnt/minillm (install, train)
#   --spot                  ask for preemptible hosts
#   --dry_run               print the gcloud commands and end
#
# A new slice has empty disks, and all hosts need one work directory: give one in a bucket that the
# service account of the slice may write, -- --workdir gs://BUCKET/RUN ...; or mount a share, such as
# one of Filestore, and give a folder of it, --nfs 10.0.0.2:/share -- --workdir /mnt/minillm/RUN ...
set -euo pipefail

wait_seconds=${MINILLM_POLL:-30} # between two looks at the state of the slice
python=3.12
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    echo "error: $1; usage: launch/tpu_pod.sh create|install|run|train|delete --name N --zone Z" \
        "[--type T] [--version V] [--project P] [--nfs SERVER:/SHARE] [--spot] [--dry_run] [-- --config FILE.py ...]" >&2
    exit 2
}

say() { echo "launch: $*" >&2; }

command=${1:-}
[[ $command =~ ^(create|install|run|train|delete)$ ]] || usage "no command ${command:-given}"
shift
name='' zone='' type='' nfs='' version=tpu-ubuntu2204-base dry='' where=() options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --spot) options+=(--spot) && shift && continue ;;
        --dry_run) dry=yes && shift && continue ;;
    esac
    [ -n "${2:-}" ] || usage "$1 takes a value"
    case $1 in
        --name) name=$2 ;;
        --zone) zone=$2 ;;
        --type) type=$2 ;;
        --nfs) nfs=$2 ;;
        --version) version=$2 ;;
        --project) where+=("--project=$2") ;;
        *) usage "no option $1" ;;
    esac
    shift 2
done
[ -n "$name" ] && [ -n "$zone" ] || usage "--name and --zone are needed"
where+=("--zone=$zone")
if [[ $command =~ ^(create|train)$ ]]; then
    [ -n "$type" ] || usage "$command needs --type"
fi
if [[ $command =~ ^(run|train)$ ]]; then
    [ $# -gt 1 ] || usage "nothing to run"
    shift
fi

do_() { # run a command, or print it
    if [ -n "$dry" ]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}

tpus() { do_ gcloud compute tpus "$@" "${where[@]}"; }

on_all() { # SCRIPT: on every host; fails if it does on one
    tpus tpu-vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 --command="$1"
}

state() { # of the queued resource, empty if there is none
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format='value(state.state)' 2> /dev/null || true
}

create() { # 75: the slice was lost again while it was made
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
        --runtime-version="$version" "${options[@]}" || return
    if [ -n "$dry" ]; then
        tpus queued-resources describe "$name" '--format=value(state.state)'
        return
    fi
    local now
    until now=$(state) && [ "$now" = ACTIVE ]; do
        say "the slice $name is ${now:-unknown}"
        [[ ! $now =~ ^(FAILED|SUSPENDED)$ ]] || return 75
        sleep "$wait_seconds"
    done
}

delete() { tpus queued-resources delete "$name" --force --quiet; }

install() {
    local archive mount=''
    [ -z "$nfs" ] || mount="mountpoint -q /mnt/minillm || {
sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common; sudo mkdir -p /mnt/minillm
sudo mount -t nfs $(printf '%q' "$nfs") /mnt/minillm; }"
    archive=$(mktemp -d)/minillm_jax.tar.gz
    [ -z "$(git -C "$here" status --porcelain)" ] || say "changes that are not committed stay here"
    do_ git -C "$here" archive --format=tar.gz --output="$archive" HEAD &&
        tpus tpu-vm scp "$archive" "$name:minillm_jax.tar.gz" --worker=all || return
    rm -rf "${archive%/*}"
    on_all "set -e; $mount
mkdir -p minillm_jax; tar -xzf minillm_jax.tar.gz -C minillm_jax; cd minillm_jax
python3 -m pip install --quiet --user uv; uv() { python3 -m uv --quiet \"\$@\"; }
[ -d .venv ] || uv venv --python $python .venv
uv pip install --python .venv/bin/python -r requirements.txt 'jax[tpu]' gcsfs"
}

# What an earlier start left would hold the TPU: a lost connection ends no process. jax finds the
# other hosts by the metadata of the slice.
run() {
    on_all "cd minillm_jax
if [ -f run.pid ] && kill \$(cat run.pid) 2> /dev/null; then
    for _ in \$(seq 25); do kill -0 \$(cat run.pid) 2> /dev/null || break; sleep 1; done
fi
echo \$\$ > run.pid
MINILLM_STOP_CODE=75 MINILLM_DISTRIBUTED=auto exec .venv/bin/python -m minillm_jax.main $(printf '%q ' "$@")"
}

until_gone() { # CODE: wait until a preemption shows, long where the code looks like one
    local polls=1
    # 75: a run that TERM has stopped; 255: ssh lost its host. The state lags behind both.
    [[ ! $1 =~ ^(75|255)$ ]] || polls=10
    while ((polls-- > 0)) && [ "$(state)" = ACTIVE ]; do sleep "$wait_seconds"; done
}

train() {
    if [ -n "$dry" ]; then
        create && install && run "$@"
        echo "# after a preemption, before all of this again:"
        delete
        return
    fi
    # Two that run on one slice would end each other in turn for ever.
    local code now stops=5
    while true; do
        code=0 now=$(state)
        if [ "$now" != ACTIVE ]; then
            [ -z "$now" ] || delete || return
            create || code=$?
        fi
        if [ "$code" = 0 ]; then
            { install && run "$@"; } || code=$?
            [ "$code" != 0 ] || return 0
            until_gone "$code"
        elif [ "$code" != 75 ]; then
            return "$code"
        fi
        if [ "$(state)" = ACTIVE ]; then
            if [ "$code" = 75 ] && ((--stops > 0)); then
                say "stopped and saved, and the slice is still there: starting again on it"
                continue
            fi
            say "failed with exit code $code, and the slice is still there: not a preemption"
            return "$code"
        fi
        say "the slice is gone: starting again on a new one"
    done
}

"$command" "$@"
