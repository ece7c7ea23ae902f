#!/bin/bash
# Installs Kubeflow Trainer v2 (namespace kubeflow-system), JobSet (namespace jobset-system) and the
# ClusterTrainingRuntime torch-distributed with the image $CLUSTER_TORCH_IMAGE.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
CLUSTER_TORCH_IMAGE=${CLUSTER_TORCH_IMAGE:-$REGISTRY/tutorial/mnist:base}
for b in jobset trainer; do
  [ -x "$BIN/$b" ] && [ -d "$CLUSTER_CACHE/manifests/$b" ] || die "not built: run $CLUSTER_DIR/programs.sh trainer"; done
apply() { # NAME SUBDIR: the module's manifests with this directory's kustomization laid over
  local m=$CLUSTER_STATE/manifests/$1
  rm -rf "$m"; mkdir -p "$m"; cp -r "$CLUSTER_CACHE/manifests/$1/." "$m/"
  mkdir -p "$m/$2"; cp "$CLUSTER_DIR/manifests/$1/"*.yaml "$m/$2/"
  k apply --server-side -k "$m/$2" > "$LOG/$1-apply.log" 2>&1 || die_log "$1-apply" "applying the manifests of $1 failed"
}
if ! k get clustertrainingruntime torch-distributed >/dev/null 2>&1; then
  say "jobset and trainer"
  node_import tools jobset trainer
  apply jobset tutorial
  apply trainer overlays/tutorial
  wait_rollout jobset-system jobset-controller-manager
  wait_rollout kubeflow-system kubeflow-trainer-controller-manager
fi
# the webhook answers a little after the rollout; its refusal is the only sign
runtime() { sed "s#image: .*#image: $CLUSTER_TORCH_IMAGE#" "$CLUSTER_CACHE/manifests/trainer/base/runtimes/torch_distributed.yaml" |
  k apply --server-side --force-conflicts -f - > "$LOG/runtime-apply.log" 2>&1; }
wait_for 60 runtime || die_log runtime-apply "the ClusterTrainingRuntime was not accepted"
