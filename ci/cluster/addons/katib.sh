#!/bin/bash
# Installs Katib (namespace kubeflow) with MariaDB. Trials as Job and, with the training operator, as
# PyTorchJob (name training-operator first). Algorithms: random, tpe, cmaes, sobol.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
images=(katib-controller katib-db-manager katib-file-metrics-collector katib-suggestion-goptuna)
for b in "${images[@]}"; do
  [ -x "$BIN/$b" ] && [ -d "$CLUSTER_CACHE/manifests/katib" ] || die "not built: run $CLUSTER_DIR/programs.sh katib"; done
"$CLUSTER_DIR/images.sh" mariadb
# the webhook refuses it; without the webhook it would be accepted
hooks() { local m; m=$(k create --dry-run=server -f - 2>&1 <<<'{"apiVersion":"kubeflow.org/v1beta1","kind":"Experiment","metadata":{"name":"probe","namespace":"default"}}') || true
  case $m in *validator.experiment.katib.kubeflow.org*) ;; *) return 1 ;; esac; }
crd=$(k get crd pytorchjobs.kubeflow.org -o 'jsonpath={.metadata.creationTimestamp}' 2>/dev/null) || say "katib: no training operator, so no PyTorchJob as a trial"
if hooks; then
  # the controller looks for the kinds of job when it starts, and never again
  if [[ $crd > $(k -n kubeflow get pods -l katib.kubeflow.org/component=controller -o 'jsonpath={.items[0].status.startTime}') ]]; then
    say "katib: restarting the controller, which is older than PyTorchJob"
    k -n kubeflow rollout restart deployment/katib-controller >/dev/null; wait_rollout kubeflow katib-controller
  else say "katib: there"; exit 0; fi
else
  say "katib"
  node_import mariadb "${images[@]}"
  m=$CLUSTER_STATE/manifests/katib
  rm -rf "$m"; mkdir -p "$m"; cp -r "$CLUSTER_CACHE/manifests/katib/." "$m/"
  o=$m/installs/tutorial; mkdir -p "$o"; cp "$CLUSTER_DIR/manifests/katib/"*.yaml "$o/"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj /CN=katib-controller.kubeflow.svc \
    -addext subjectAltName=DNS:katib-controller.kubeflow.svc -keyout "$o/tls.key" -out "$o/tls.crt" 2>/dev/null
  sed -i "s#caBundle: .*#caBundle: $(base64 -w0 "$o/tls.crt")#" "$m/components/webhook/webhooks.yaml"
  k apply --server-side --force-conflicts -k "$o" > "$LOG/katib-apply.log" 2>&1 || die_log katib-apply "applying the manifests failed"
  for d in katib-mysql katib-controller katib-db-manager; do wait_rollout kubeflow $d; done
fi
wait_for 60 hooks || { k -n kubeflow logs deployment/katib-controller --tail=20 >&2; die "Katib's webhooks do not answer"; }
