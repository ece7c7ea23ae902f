# Settings and functions of the scripts here, which source this file. README.md explains the settings.
# shellcheck shell=bash disable=SC2034
CLUSTER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
CLUSTER_CACHE=${CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tutorial-cluster}
CLUSTER_STATE=${CLUSTER_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/tutorial-cluster}
CLUSTER_API_PORT=${CLUSTER_API_PORT:-6443}
CLUSTER_REGISTRY_PORT=${CLUSTER_REGISTRY_PORT:-5000}
CLUSTER_TIMEOUT=${CLUSTER_TIMEOUT:-120}

NODE=node0
NODE_IP=10.240.0.10
POD_CIDR=10.233.0.0/24
SERVICE_CIDR=10.96.0.0/16
API_SERVICE_IP=10.96.0.1
DNS_IP=10.96.0.10
CGROUP=tutorial-cluster
BUILT=$CLUSTER_CACHE/built
NEWEST_KUBERNETES=1.35
# The minor version, one of mod/kubernetes-*: what is asked for, or that of the cluster that is there, or the newest.
[ ! -f "$CLUSTER_STATE/kubernetes" ] || running=$(cat "$CLUSTER_STATE/kubernetes")
CLUSTER_KUBERNETES=${CLUSTER_KUBERNETES:-${running:-$NEWEST_KUBERNETES}}
LOG=$CLUSTER_STATE/log
PIDS=$CLUSTER_STATE/pid
KUBECONFIG_FILE=$CLUSTER_STATE/kubeconfig
REGISTRY=localhost:$CLUSTER_REGISTRY_PORT
# The processes of the cluster: `holder` is init of its namespaces, the api-port and registry-port lead into them.
PARTS=(holder etcd containerd registry apiserver api-port registry-port kcm sched kubelet proxy)

export KUBECACHEDIR=$CLUSTER_STATE/kubectl-cache
# A proxy must never see the cluster's own addresses.
no_proxy="${no_proxy:+$no_proxy,}localhost,127.0.0.1,$NODE_IP,$SERVICE_CIDR,$POD_CIDR,.svc,.cluster.local"
export no_proxy NO_PROXY=$no_proxy
export PATH=$BUILT/kubernetes-$CLUSTER_KUBERNETES:/usr/local/sbin:/usr/sbin:/sbin:$PATH

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# die_log NAME MESSAGE: the message, then the end of the log NAME
die_log() {
    local log=$LOG/$1.log
    shift
    printf 'error: %s\n' "$*" >&2
    if [ -s "$log" ]; then
        printf -- '--- last lines of %s\n' "$log" >&2
        tail -n 25 "$log" | cut -c1-400 >&2
    fi
    exit 1
}

need_root() { [ "$(id -u)" = 0 ] || die "the cluster needs root, for its namespaces and mounts: run it as root"; }

need() {
    local command
    for command; do
        command -v "$command" >/dev/null ||
            die "$command is not on PATH (on Debian 12, $CLUSTER_DIR/packages.sh installs what is missing)"
    done
}

# need_room MB FOLDER [MB FOLDER ...]: says how much room is needed and stops where the file systems have less. Folders
# on the same file system share its room.
need_room() {
    local folder answer
    answer=$(while [ $# -gt 0 ]; do
        folder=$2
        until [ -e "$folder" ]; do folder=$(dirname "$folder"); done
        echo "$1 $(df -BM --output=avail,target "$folder" | tail -n 1)"
        shift 2
    done | awk '{
        mb = $1; available = $2 + 0; sub(/^[^ ]+ +[^ ]+ +/, ""); need[$0] += mb; free[$0] = available
    } END {
        for (fs in need) {
            printf "%s%d MB of the %d MB that are free on %s", separator, need[fs], free[fs], fs
            separator = ", "
            lacking += need[fs] > free[fs]
        }
        exit lacking > 0
    }') || die "the cluster needs $answer: make room, or set CLUSTER_CACHE and CLUSTER_STATE to folders elsewhere"
    say "room needed: $answer"
}

# wait_for SECONDS COMMAND...: repeats the command until it succeeds
wait_for() {
    local end=$(($(date +%s) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $end ] || return 1
        sleep 0.2
    done
}

# A recorded process is ours if its start time is the recorded one too, as process ids are used again. A zombie counts
# as gone: some init processes are slow to reap.
start_time() { sed 's/.*) //; /^[ZX]/d' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

save_pid() { echo "$2 $(start_time "$2")" > "$PIDS/$1"; }

# alive NAME: prints the process id; fails where it does not run
alive() {
    local pid started
    [ -f "$PIDS/$1" ] && read -r pid started < "$PIDS/$1" || return 1
    [ -n "$started" ] && [ "$(start_time "$pid")" = "$started" ] && echo "$pid"
}

# stopped: names the parts of the cluster that do not run
stopped() {
    local part
    for part in "${PARTS[@]}"; do
        [ -e "$CLUSTER_STATE/complete" ] && alive "$part" >/dev/null || echo "$part"
    done
}

# start NAME COMMAND...: in the background with a log, and without the lock that up holds
start() {
    local name=$1
    shift
    setsid "$@" > "$LOG/$name.log" 2>&1 < /dev/null 9>&- &
    save_pid "$name" $!
}

k() { kubectl --kubeconfig "$KUBECONFIG_FILE" "$@"; }
node_ctr() { ctr -a "$CLUSTER_STATE/run/containerd.sock" -n k8s.io "$@"; }

# node_import IMAGE...: from the cache into the node's containerd
node_import() {
    local image
    mkdir -p "$CLUSTER_STATE/images"
    for image; do
        node_ctr images import --base-name "tutorial.local/$image" "$CLUSTER_CACHE/images/$image.tar" \
            > "$LOG/import.log" 2>&1 || die_log import "the image $image could not be imported"
        touch "$CLUSTER_STATE/images/$image"
    done
}

# lost_images: names those that were imported and are no longer there
lost_images() {
    local image images
    images=$(node_ctr images ls -q) || die "containerd does not answer (log: $LOG/containerd.log)"
    for image in "$CLUSTER_STATE"/images/*; do
        grep -qx "tutorial.local/${image##*/}:1" <<< "$images" || echo "${image##*/}"
    done
}

# install_operator NAME MANIFESTS OVERLAY: applies the folder MANIFESTS of $BUILT with manifests/NAME as its OVERLAY
install_operator() {
    local copy=$CLUSTER_STATE/manifests/$1 file
    say "$1"
    node_import "$1"
    rm -rf "$copy"
    mkdir -p "$copy"
    cp -r "$BUILT/$2/." "$copy/"
    mkdir -p "$copy/$3"
    for file in "$CLUSTER_DIR/manifests/$1"/*; do
        sed "s#@REGISTRY@#$REGISTRY#" "$file" > "$copy/$3/${file##*/}"
    done
    k apply --server-side -k "$copy/$3" > "$LOG/$1-apply.log" 2>&1 ||
        die_log "$1-apply" "applying the manifests of $1 failed"
}

# is_ready NAMESPACE DEPLOYMENT
is_ready() { [ "$(k -n "$1" get deployment "$2" -o 'jsonpath={.status.readyReplicas}' 2>/dev/null)" = 1 ]; }

wait_rollout() { # NAMESPACE DEPLOYMENT
    k -n "$1" rollout status "deployment/$2" --timeout="${CLUSTER_TIMEOUT}s" >/dev/null && return
    {
        k -n "$1" get pods -o wide
        k -n "$1" get events --sort-by=.lastTimestamp | tail -n 10
        k -n "$1" logs "deployment/$2" --tail=20 || true
    } >&2
    die "deployment $1/$2 is not ready"
}
