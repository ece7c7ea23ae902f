#!/bin/bash
# katib.sh ADD-ON ...: installs Katib in namespace kubeflow, with MariaDB, for Experiments. Their trials are Jobs and,
# beside the add-ons training-operator and trainer, PyTorchJobs and TrainJobs. ADD-ON ...: all that come up now.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
is_ready kubeflow katib-controller || install_operator katib katib/manifests/v1beta1 installs/tutorial
# The controller looks for the kinds of jobs once, when it starts.
kinds=(pytorchjobs.kubeflow.org trainjobs.trainer.kubeflow.org)
[[ " $* " != *" training-operator "* ]] || wait_for 60 k get crd "${kinds[0]}" || die "there is no PyTorchJob"
[[ " $* " != *" trainer "* ]] || wait_for 60 k get crd "${kinds[1]}" || die "there is no TrainJob"
times() { k get "$@" --no-headers -o custom-columns=:metadata.creationTimestamp | sort; }
controller=(-n kubeflow pods -l katib.kubeflow.org/component=controller)
wait_rollout kubeflow katib-controller
known=$(times "${controller[@]}" | head -n 1)
newest=$(times crd "${kinds[@]}" --ignore-not-found | tail -n 1)
if [[ $newest > $known ]]; then
    k -n kubeflow rollout restart deployment/katib-controller >/dev/null
fi
for deployment in katib-mysql katib-db-manager katib-controller; do
    wait_rollout kubeflow $deployment
done
# Only a refusal tells that the webhooks answer.
experiment='{"apiVersion": "kubeflow.org/v1beta1", "kind": "Experiment", "metadata": {"name": "probe"}}'
refused() { { k create -n default --dry-run=server -f - <<< "$experiment" 2>&1 || true; } | grep 'denied the request'; }
wait_for 60 refused || die "Katib's webhooks do not answer"
