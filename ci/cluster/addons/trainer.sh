#!/bin/bash
# Installs Kubeflow Trainer v2 in namespace kubeflow-system and JobSet, on which it is built, in jobset-system, for
# TrainJob; and the ClusterTrainingRuntime torch-distributed on the add-on base-image.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
if ! is_ready kubeflow-system kubeflow-trainer-controller-manager; then
    install_operator jobset trainer/config tutorial &
    # Trainer ends with an error where the API server does not know its kinds and those of JobSet yet.
    k create -k "$BUILT/trainer/manifests/base/crds" > "$LOG/trainer-crds.log" 2>&1 || true # else they are applied below
    wait $! || exit 1
    install_operator trainer trainer/manifests overlays/tutorial
    wait_rollout jobset-system jobset-controller-manager
    wait_rollout kubeflow-system kubeflow-trainer-controller-manager
fi
# The webhooks answer a little after the rollout; only a refusal tells that they do not yet.
runtime() {
    sed "s#image: .*#image: $REGISTRY/tutorial/mnist:base#" \
        "$BUILT/trainer/manifests/base/runtimes/torch_distributed.yaml" |
        k apply --server-side --force-conflicts -f - > "$LOG/runtime-apply.log" 2>&1
}
wait_for 60 runtime || die_log runtime-apply "the ClusterTrainingRuntime torch-distributed was not accepted"
