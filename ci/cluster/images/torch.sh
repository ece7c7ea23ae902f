#!/bin/bash
# torch.sh DIR: makes DIR, the image that the tutorial's trainer is put on, as skopeo's "dir:": Debian bookworm with its
# Python 3.11, and the wheels of torch and torchvision that requirements.txt locks, unmodified, CUDA libraries and all.
# Docker's v2.2 format, because Kubeflow Fairing reads no other; layers uncompressed, because packing and unpacking 5 GB
# takes longer than moving them within one machine.
set -euo pipefail
umask 022
. "$(dirname "$0")/../lib.sh"
lock=$CLUSTER_DIR/../../requirements.txt out=$1
need debootstrap tar python3
[ "$(uname -m)" = x86_64 ] || die "the image of torch can be made on x86-64 only"
room=$(df -Pm "$(dirname "$out")" | awk 'NR == 2 {print $4}')
[ "$room" -ge 12000 ] || die "$(dirname "$out") has $room MB left, and making the image of torch takes 12000: free some, or set CLUSTER_CACHE"
work=$(mktemp -d "$(dirname "$out")/torch.XXXXXX") log=$CLUSTER_CACHE/torch-image.log
fail() { tail -n 15 "$log" >&2; die "$1 (the whole log: $log)"; }
trap 'rm -rf --one-file-system "$work"' EXIT
mkdir "$work/system" "$work/torch" "$work/image"; chmod 755 "$work"/*

python3 "$CLUSTER_DIR/../environment.py"  # the environment's uv installs the wheels, from its cache
say "image of torch: debootstrap"
debootstrap --variant=minbase --include=python3,python3-pip,python-is-python3 bookworm "$work/system" "$(debian_mirror)" >"$log" 2>&1 ||
  fail "debootstrap failed"
(cd "$work/system"; rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/* usr/share/{doc,man,locale}/* etc/resolv.conf etc/hostname)

say "image of torch: wheels"
site=usr/local/lib/python3.11/dist-packages
python3 "$CLUSTER_DIR/../environment.py" uv pip install --quiet --target "$work/torch/$site" --python-version 3.11 --python-platform x86_64-manylinux_2_36 --only-binary :all: \
  --constraints "$lock" torch torchvision >>"$log" 2>&1 || fail "installing torch failed"
mkdir -p "$work/torch/usr/local/bin"
rm -rf "$work/torch/$site/bin"
printf '#!/usr/bin/python3\nfrom torch.distributed.run import main\nmain()\n' > "$work/torch/usr/local/bin/torchrun"
chmod 755 "$work/torch/usr/local/bin/torchrun"

# Several layers of a similar size, which a node fetches and unpacks side by side.
layers=("$work/system" "$work/torch")
for part in triton nvidia/cudnn nvidia/cu13 nvidia; do
  [ -d "$work/torch/$site/$part" ] || continue
  layer=$work/${part//\//-}; mkdir -p "$layer/$site/$(dirname $part)"
  mv "$work/torch/$site/$part" "$layer/$site/$part"; layers+=("$layer")
done
say "image of torch: packing $(du -csm "${layers[@]}" | awk 'END {print $1}') MB"
python3 "$CLUSTER_DIR/images/imagedir.py" "$work/image" "${layers[@]}"
rm -rf "$out"; mv "$work/image" "$out"
