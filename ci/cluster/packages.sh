#!/bin/bash
# Installs the Debian packages that the cluster needs and that are missing (names of Debian 12). Needs root.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
packages=(containerd runc containernetworking-plugins iptables iproute2 conntrack util-linux procps openssl curl
          ca-certificates skopeo buildah docker-registry debootstrap busybox-static bash-static python3)
missing=()
for p in "${packages[@]}"; do
  dpkg-query -Wf '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0
need_root
say "apt-get install ${missing[*]}"
# the packages' own services must not start: the cluster runs its own copies
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' > $policy; chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
mkdir -p "$CLUSTER_CACHE"; log=$CLUSTER_CACHE/packages.log
{ apt-get update -q && apt-get install -yq --no-install-recommends "${missing[@]}"; } > "$log" 2>&1 ||
  { tail -n 15 "$log" >&2; die "apt-get could not install them (the whole log: $log)"; }
