#!/bin/bash
# Pushes an image with the torch of requirements.txt to the cluster's registry, for trainers to be put on: as
# tutorial/mnist:base. Images that share its repository share its layers. The node fetches it in the background, so that
# the first job need not wait for its 5.7 GB.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
name=$REGISTRY/tutorial/mnist:base
"$CLUSTER_DIR/images.sh" torch
there=$(skopeo inspect --tls-verify=false --format '{{.Digest}}' "docker://$name" 2>/dev/null) || there=
[ "$there" != "sha256:$(sha256sum < "$CLUSTER_CACHE/images/torch/manifest.json" | cut -d' ' -f1)" ] || exit 0
say "base-image"
skopeo copy --quiet --insecure-policy --preserve-digests --dest-tls-verify=false "dir:$CLUSTER_CACHE/images/torch" "docker://$name" \
  > "$LOG/base-image.log" 2>&1 || die_log base-image "pushing $name failed"
# from the registry and not from the folder: only so has the node the layers as a pod's image names them
run base-image-pull ctr -a "$CLUSTER_STATE/run/containerd.sock" -n k8s.io images pull --hosts-dir "$CLUSTER_STATE/certs.d" "$name"
