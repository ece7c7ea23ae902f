# Shared settings and helpers; sourced by every script here.  README.md explains the settings.
CLUSTER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
CLUSTER_CACHE=${CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tutorial-cluster}      # built binaries and images, kept
CLUSTER_STATE=${CLUSTER_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/tutorial-cluster} # one running cluster, removed by down
CLUSTER_API_PORT=${CLUSTER_API_PORT:-6443}            # API server on 127.0.0.1
CLUSTER_REGISTRY_PORT=${CLUSTER_REGISTRY_PORT:-5000}  # image registry on 127.0.0.1, named localhost:PORT
CLUSTER_TIMEOUT=${CLUSTER_TIMEOUT:-120}               # seconds to wait for each component
NODE=node0 NODE_IP=10.240.0.10 POD_CIDR=10.233.0.0/24 SVC_CIDR=10.96.0.0/16 API_SVC_IP=10.96.0.1 DNS_IP=10.96.0.10
CGROUP=tutorial-cluster
BIN=$CLUSTER_CACHE/bin LOG=$CLUSTER_STATE/log PIDS=$CLUSTER_STATE/pid
KUBECONFIG_OUT=$CLUSTER_STATE/kubeconfig
REGISTRY=localhost:$CLUSTER_REGISTRY_PORT
export KUBECACHEDIR=$CLUSTER_STATE/kubectl-cache
# a proxy must never see the cluster's own addresses
export no_proxy="${no_proxy:+$no_proxy,}localhost,127.0.0.1,$NODE_IP,$SVC_CIDR,$POD_CIDR,.svc,.cluster.local"; export NO_PROXY=$no_proxy
export PATH=$BIN:/usr/local/sbin:/usr/sbin:/sbin:$PATH

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# die_log NAME MESSAGE: the message, then the end of the component's log
die_log() {
  local f=$LOG/$1.log; shift
  printf 'error: %s\n' "$*" >&2
  [ -s "$f" ] && { printf -- '--- last lines of %s\n' "$f" >&2; tail -n 25 "$f" | cut -c1-400 >&2; }
  exit 1
}
need_root() { [ "$(id -u)" = 0 ] || die "the cluster needs root, for its namespaces and mounts: run it as root"; }
need() { local m=; for c in "$@"; do command -v "$c" >/dev/null || m="$m $c"; done
  [ -z "$m" ] || die "not on PATH:$m (on Debian 12, $CLUSTER_DIR/packages.sh installs what it can)"; }

# A process is ours if its pid AND its start time are the recorded ones (pids get reused);
# a zombie counts as gone (some init processes are slow to reap).
start_time() { sed 's/.*) //; /^[ZX]/d' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
save_pid() { echo "$2 $(start_time "$2")" > "$PIDS/$1"; }
alive() { # NAME -> prints the pid
  local p t; [ -f "$PIDS/$1" ] && read -r p t < "$PIDS/$1" && [ -n "$p" ] && [ -n "$t" ] && [ "$(start_time "$p")" = "$t" ] && echo "$p"
}
inside() { nsenter -t "$(alive holder)" -m -n -p -- "$@"; } # COMMAND...: inside the cluster's namespaces
run() { # NAME COMMAND...: the same in the background, without the lock that up holds
  local n=$1; shift
  setsid nsenter -t "$(alive holder)" -m -n -p -- "$@" > "$LOG/$n.log" 2>&1 < /dev/null 9>&- &
  save_pid "$n" $!
}
# stopped: names the parts of the cluster that do not run
PARTS=(holder etcd containerd registry apiserver fwd kcm sched kubelet proxy)
stopped() { local n
  [ -e "$CLUSTER_STATE/complete" ] || { echo "${PARTS[@]}"; return; }
  for n in "${PARTS[@]}"; do [ -n "$(alive "$n")" ] || echo "$n"; done; }
# wait_for SECONDS COMMAND...: poll until the command succeeds
wait_for() { local end=$(( $(date +%s) + $1 )); shift
  until "$@" >/dev/null 2>&1; do [ "$(date +%s)" -lt $end ] || return 1; sleep 0.2; done; }
k() { kubectl --kubeconfig "$KUBECONFIG_OUT" "$@"; }
# node_import IMAGE...: from the cache straight into the node's containerd
node_import() { for i in "$@"; do
  ctr -a "$CLUSTER_STATE/run/containerd.sock" -n k8s.io images import "$CLUSTER_CACHE/images/$i.tar" > "$LOG/import.log" 2>&1 || die_log import "importing image $i failed"; done; }
wait_rollout() { # NAMESPACE DEPLOYMENT
  k -n "$1" rollout status "deployment/$2" --timeout="${CLUSTER_TIMEOUT}s" > /dev/null && return
  k -n "$1" get pods -o wide >&2; k -n "$1" get events --sort-by=.lastTimestamp | tail -n 10 >&2
  k -n "$1" logs "deployment/$2" --tail=20 >&2 || true
  die "deployment $1/$2 is not ready"; }
# the Debian mirror this machine's apt uses
debian_mirror() { local m=${DEBIAN_MIRROR:-}; [ -n "$m" ] || m=$(apt-get indextargets --format '$(REPO_URI)' | grep -E '/debian/?$' | sort -u | head -n 1)
  [ -n "$m" ] || die "no Debian mirror found in apt's sources: set DEBIAN_MIRROR"; echo "$m"; }
