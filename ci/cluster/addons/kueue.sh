#!/bin/bash
# Installs Kueue in namespace kueue-system: quotas and queues for Job, JobSet, PyTorchJob and TrainJob. Only jobs that
# name a queue are held back.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
if ! is_ready kueue-system kueue-controller-manager; then
    install_operator kueue kueue/config tutorial
    wait_rollout kueue-system kueue-controller-manager
fi
# As with Trainer, only a refusal tells that the webhooks do not answer yet.
flavor='{"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}'
probe() { k create --dry-run=server -f - <<< "$flavor"; }
wait_for 60 probe || die "Kueue's webhooks do not answer"
