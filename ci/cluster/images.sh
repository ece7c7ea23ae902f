#!/bin/bash
# Makes images in $CLUSTER_CACHE/images; skips what is there and made from the same.
#     images.sh [PROGRAM ...]      tutorial.local/pause:1 and one of each program, as archives for containerd
#     images.sh [--check] torch    the image with PyTorch, as a folder for skopeo
# With --check it makes nothing; its exit status is 1 if the image is to be made.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
images=$CLUSTER_CACHE/images
mkdir -p "$images"

# pack NAME PROGRAM CONFIG: an image of one static program
pack() {
    local archive=$images/$1.tar program=$2 config=$3 work
    [ ! "$archive" -nt "$program" ] || [ ! "$archive" -nt "$CLUSTER_DIR/images.sh" ] || return 0
    work=$(mktemp -d "$images/work.XXXXXX")
    mkdir -m 755 "$work/image" "$work/files"
    install -m 755 "$program" "$work/files/"
    "$CLUSTER_DIR/images/imagedir.py" --config "$config" "$work/image" "$work/files"
    skopeo copy --quiet --insecure-policy "dir:$work/image" "docker-archive:$work/archive:tutorial.local/$1:1"
    mv "$work/archive" "$archive"
    rm -rf "$work"
}

if [ "${*: -1}" = torch ]; then
    stamp=$(cat "$CLUSTER_DIR/../../requirements.txt" "$CLUSTER_DIR"/images/* | sha256sum)
    [ "$(cat "$images/torch/made-from" 2>/dev/null)" != "$stamp" ] || exit 0
    [ "$1" != --check ] || exit 1
    need_root
    "$CLUSTER_DIR/images/torch.sh" "$images/torch"
    echo "$stamp" > "$images/torch/made-from"
    exit
fi
pack pause "$(command -v catatonit)" '{"Entrypoint": ["/catatonit", "-P"]}'
for program; do
    case $program in
        coredns) config='{"Entrypoint": ["/coredns"]}' ;;
        training-operator) config='{"Entrypoint": ["/training-operator"], "User": "65532"}' ;;
        *) die "no image is made of $program" ;;
    esac
    pack "$program" "$BIN/$program" "$config"
done
