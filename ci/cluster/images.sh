#!/bin/bash
# Makes images in $CLUSTER_CACHE/images; skips what is there and made from the same.
#     images.sh [IMAGE ...]        tutorial.local/pause:1 and those named, as archives for containerd
#     images.sh [--check] torch    the image with PyTorch, as a folder for skopeo
# With --check it makes nothing; its exit status is 1 if the image is to be made.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
images=$CLUSTER_CACHE/images
mkdir -p "$images"

# pack NAME PROGRAM PATH CONFIG: an image of one static program, which is PATH there
pack() {
    local archive=$images/$1.tar program=$2 config=$4 work
    [ ! "$archive" -nt "$program" ] || [ ! "$archive" -nt "$CLUSTER_DIR/images.sh" ] || return 0
    work=$(mktemp -d "$images/work.XXXXXX")
    mkdir -m 755 "$work/image" "$work/files"
    install -m 755 "$program" "$work/files/$3"
    "$CLUSTER_DIR/images/imagedir.py" --config "$config" "$work/image" "$work/files"
    archive "$1" "$work/image"
    rm -rf "$work"
}

archive() { # NAME FOLDER: packed, as containerd takes longer to check what it is given than to unpack
    rm -f "$images/part"
    skopeo copy --quiet --insecure-policy --dest-compress-format zstd "dir:$2" "oci-archive:$images/part:1"
    mv "$images/part" "$images/$1.tar"
}

stamp() { cat "$@" "$CLUSTER_DIR/images/debian.sh" "$CLUSTER_DIR/images/imagedir.py" | sha256sum; }

if [ "${*: -1}" = torch ]; then
    stamp=$(stamp "$CLUSTER_DIR/../../requirements.txt" "$CLUSTER_DIR/images/torch.sh")
    [ "$(cat "$images/torch/made-from" 2>/dev/null)" != "$stamp" ] || exit 0
    [ "$1" != --check ] || exit 1
    need_root
    "$CLUSTER_DIR/images/torch.sh" "$images/torch"
    echo "$stamp" > "$images/torch/made-from"
    exit
fi
pack pause "$(command -v catatonit)" catatonit '{"Entrypoint": ["/catatonit", "-P"]}'
for image; do
    path=manager # as the operators' manifests call it
    config='{"Entrypoint": ["/manager"], "User": "65532"}'
    case $image in
        coredns)
            program=coredns/coredns
            path=coredns
            config='{"Entrypoint": ["/coredns"]}'
            ;;
        training-operator) program=training-operator/training-operator.v1 ;;
        jobset) program=trainer/jobset ;;
        trainer) program=trainer/trainer-controller-manager ;;
        kueue) program=kueue/kueue ;;
        katib)
            stamp=$(stamp "$BUILT/katib/built-from" "$CLUSTER_DIR"/images/{katib.sh,requirements-katib.txt})
            [ "$(cat "$images/katib.made-from" 2>/dev/null)" != "$stamp" ] || continue
            need_root
            "$CLUSTER_DIR/images/katib.sh" "$images/katib"
            archive katib "$images/katib"
            rm -r "$images/katib"
            echo "$stamp" > "$images/katib.made-from"
            continue
            ;;
        *) die "no image is called $image" ;;
    esac
    pack "$image" "$BUILT/$program" $path "$config"
done
