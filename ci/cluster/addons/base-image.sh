#!/bin/bash
# Pushes an image with the torch of requirements.txt to the cluster's registry, for trainers to be put on: as
# tutorial/mnist:base. Images that share its repository share its layers.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
name=$REGISTRY/tutorial/mnist:base
"$CLUSTER_DIR/images.sh" torch
there=$(skopeo inspect --tls-verify=false --format '{{.Digest}}' "docker://$name" 2>/dev/null) || there=
[ "$there" != "sha256:$(sha256sum < "$CLUSTER_CACHE/images/torch/manifest.json" | cut -d' ' -f1)" ] || exit 0
say "base-image"
skopeo copy --quiet --insecure-policy --preserve-digests --dest-tls-verify=false "dir:$CLUSTER_CACHE/images/torch" "docker://$name" \
  > "$LOG/base-image.log" 2>&1 || die_log base-image "pushing $name failed"
