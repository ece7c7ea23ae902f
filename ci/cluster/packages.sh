#!/bin/bash
# Installs the Debian packages that the cluster needs and that are missing (names of Debian 12), and those that are
# named in MORE_PACKAGES. Needs root.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
packages=(containerd runc containernetworking-plugins iptables iproute2 conntrack util-linux procps openssl curl
    ca-certificates socat catatonit skopeo buildah docker-registry debootstrap python3)
read -ra more <<< "${MORE_PACKAGES:-}"
packages+=("${more[@]}")
missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -Wf '${Status}' "$package" 2>/dev/null) || true
    [[ $status == *"ok installed" ]] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
need_root
say "apt-get install ${missing[*]}"
# The packages' own services must not start: the cluster runs its own copies.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod 755 $policy
fi
export DEBIAN_FRONTEND=noninteractive
mkdir -p "$CLUSTER_CACHE"
log=$CLUSTER_CACHE/packages.log
if ! { apt-get update -q && apt-get install -yq --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "apt-get could not install them (the whole log: $log)"
fi
