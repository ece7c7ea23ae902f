#!/bin/bash
# First program in the cluster's own network, mount and pid namespaces: prepares them, then becomes their init process.
# Everything else of the cluster is entered into these namespaces, so that ending this one process ends every process,
# mount and interface of the cluster.
set -euo pipefail
STATE=$1
NODE_IP=$2
SERVICE_CIDR=$3
# private copies of the folders that the daemons write outside the state folder
for folder in run var/log var/lib/kubelet var/lib/cni; do
    mkdir -p "$STATE/private/$folder"
    mount --bind "$STATE/private/$folder" "/$folder"
done
mount --make-rshared /
ip link set lo up
ip link add node0 type bridge
ip addr add "$NODE_IP/24" dev node0
ip link set node0 up
ip route add "$SERVICE_CIDR" dev node0 src "$NODE_IP" # service addresses need a route before iptables rewrites them
ip route add unreachable default                      # connections out fail at once instead of hanging
sysctl -qw net.ipv4.ip_forward=1
sysctl -qw net.bridge.bridge-nf-call-iptables=1 2>/dev/null || true
# The kubelet writes machine-wide kernel settings: give it private files instead.
mkdir -p "$STATE/vsys"
while read -r setting value; do
    [ -e "/proc/sys/$setting" ] || continue
    echo "$value" > "$STATE/vsys/${setting//\//_}"
    mount --bind "$STATE/vsys/${setting//\//_}" "/proc/sys/$setting"
done <<END
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
mkdir -p /run/lock
: > "$STATE/node-ready"
exec catatonit -P
