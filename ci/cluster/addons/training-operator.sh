#!/bin/bash
# Installs the Kubeflow training operator (v1) in namespace kubeflow, for PyTorchJob. The containers that it puts before
# a job's workers run on the add-on base-image.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
if ! is_ready kubeflow training-operator; then
    install_operator training-operator training-operator/manifests overlays/tutorial
    wait_rollout kubeflow training-operator
fi
bundle='{.webhooks[?(@.name=="validator.pytorchjob.training-operator.kubeflow.org")].clientConfig.caBundle}'
has_certificate() {
    k get validatingwebhookconfiguration validator.training-operator.kubeflow.org -o "jsonpath=$bundle" | grep .
}
wait_for 30 has_certificate || die "the operator did not put its certificate into its webhook"
