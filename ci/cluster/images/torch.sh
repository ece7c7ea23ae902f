#!/bin/bash
# torch.sh DIR: makes DIR, the image that the trainer is put on, as a folder for skopeo: Debian bookworm with its Python
# 3.11, and the wheels of torch and torchvision that requirements.txt locks, unmodified, CUDA libraries and all.
# Docker's v2.2 format, because Kubeflow Fairing reads no other; layers uncompressed, because packing and unpacking 5.7
# GB takes longer than moving them within one machine.
set -euo pipefail
umask 022
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
out=$1
need_room 12000 "$(dirname "$out")"
log=$CLUSTER_CACHE/torch-image.log
work=$(mktemp -d "$(dirname "$out")/torch.XXXXXX")
# shellcheck source-path=SCRIPTDIR source=debian.sh
. "$CLUSTER_DIR/images/debian.sh"
mkdir "$work/system" "$work/torch" "$work/image"
chmod 755 "$work"/*

say "image with PyTorch: debootstrap"
debian "$work/system" python3,python3-pip,python-is-python3

say "image with PyTorch: wheels"
site=usr/local/lib/python3.11/dist-packages
wheels "$work/torch/$site" --constraints "$CLUSTER_DIR/../../requirements.txt" torch torchvision >> "$log" 2>&1 ||
    fail "installing torch failed"
mkdir -p "$work/torch/usr/local/bin"
rm -rf "$work/torch/$site/bin"
printf '#!/usr/bin/python3\nfrom torch.distributed.run import main\nmain()\n' > "$work/torch/usr/local/bin/torchrun"
chmod 755 "$work/torch/usr/local/bin/torchrun"
# Compiled by the image's Python, as a pod's user may not write there, and torch would be compiled anew in each process.
mv "$work/torch/$site" "$work/system/packages"
chroot "$work/system" python3 -m compileall -q -j 0 -s /packages -p "/$site" /packages >> "$log" 2>&1 ||
    true # a few files are templates, or for another Python
mv "$work/system/packages" "$work/torch/$site"

# Several layers of a similar size, which a node fetches and unpacks side by side.
layers=("$work/system" "$work/torch")
for part in triton nvidia/cudnn nvidia/cu13 nvidia; do
    [ -d "$work/torch/$site/$part" ] || continue
    layer=$work/${part//\//-}
    mkdir -p "$layer/$site/$(dirname $part)"
    mv "$work/torch/$site/$part" "$layer/$site/$part"
    layers+=("$layer")
done
say "image with PyTorch: packing $(du -csm "${layers[@]}" | awk 'END {print $1}') MB"
"$CLUSTER_DIR/images/imagedir.py" "$work/image" "${layers[@]}"
rm -rf "$out"
mv "$work/image" "$out"
