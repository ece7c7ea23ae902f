#!/bin/bash
# Installs the Kubeflow training operator (v1) in namespace kubeflow, PyTorchJob enabled.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
[ -x "$BIN/training-operator" ] && [ -d "$CLUSTER_CACHE/manifests/training-operator" ] || die "not built: run $CLUSTER_DIR/programs.sh operator"
[ "$(k -n kubeflow get deployment training-operator -o 'jsonpath={.status.readyReplicas}' 2>/dev/null)" != 1 ] || { say "training-operator: there"; exit 0; }
say "training-operator"
node_import tools training-operator
m=$CLUSTER_STATE/manifests/training-operator
rm -rf "$m"; mkdir -p "$m"; cp -r "$CLUSTER_CACHE/manifests/training-operator/." "$m/"
mkdir -p "$m/overlays/tutorial"; cp "$CLUSTER_DIR/manifests/training-operator/"*.yaml "$m/overlays/tutorial/"
k apply --server-side -k "$m/overlays/tutorial" > "$LOG/training-operator-apply.log" 2>&1 || die_log training-operator-apply "applying the manifests failed"
wait_rollout kubeflow training-operator
webhook_ca() { [ -n "$(k get validatingwebhookconfiguration validator.training-operator.kubeflow.org -o 'jsonpath={.webhooks[?(@.name=="validator.pytorchjob.training-operator.kubeflow.org")].clientConfig.caBundle}')" ]; }
wait_for 30 webhook_ca || die "the operator did not put its certificate into its webhook"
