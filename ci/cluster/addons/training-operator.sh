#!/bin/bash
# Installs the Kubeflow training operator (v1) in namespace kubeflow, for PyTorchJob. The containers that it puts before
# a job's workers run on the add-on base-image.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
ready=$(k -n kubeflow get deployment training-operator -o 'jsonpath={.status.readyReplicas}' 2>/dev/null) || ready=
if [ "$ready" = 1 ]; then
    say "training-operator: there"
    exit
fi
say "training-operator"
node_import training-operator
manifests=$CLUSTER_STATE/manifests/training-operator
overlay=$manifests/overlays/tutorial
rm -rf "$manifests"
mkdir -p "$overlay"
cp -r "$CLUSTER_CACHE/manifests/training-operator/." "$manifests/"
cp "$CLUSTER_DIR/manifests/training-operator/init-container.yaml" "$overlay/"
sed "s#@REGISTRY@#$REGISTRY#" "$CLUSTER_DIR/manifests/training-operator/kustomization.yaml" \
    > "$overlay/kustomization.yaml"
k apply --server-side -k "$overlay" > "$LOG/training-operator-apply.log" 2>&1 ||
    die_log training-operator-apply "applying the manifests failed"
wait_rollout kubeflow training-operator
bundle='{.webhooks[?(@.name=="validator.pytorchjob.training-operator.kubeflow.org")].clientConfig.caBundle}'
has_certificate() {
    k get validatingwebhookconfiguration validator.training-operator.kubeflow.org -o "jsonpath=$bundle" | grep .
}
wait_for 30 has_certificate || die "the operator did not put its certificate into its webhook"
