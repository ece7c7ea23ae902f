#!/bin/bash
# End-to-end test of a running cluster, from outside its namespaces, the way a user's notebook is.
#   test/run.sh              headless service, image build and push, PyTorchJob; TrainJob if trainer is installed
#   test/run.sh --failures   also: failing job, missing image, deleted worker, Pod Security "restricted"
#   test/run.sh --katib      only Katib: experiments with Jobs and PyTorchJobs as trials, then what goes wrong
# Wants the add-ons training-operator and base-image, for --katib also katib. It works in the namespace cluster-test, which
# it deletes before and after, and in the registry's folder cluster-test.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
T=$CLUSTER_DIR/test; export KUBECONFIG=$KUBECONFIG_OUT NS=cluster-test
need buildah curl
fail() { printf 'FAIL: %s\n' "$*" >&2
  { kubectl -n $NS get pytorchjob; kubectl -n $NS get pods -o wide; kubectl -n $NS get events --sort-by=.lastTimestamp | tail -n 15
    for p in $(kubectl -n $NS get pods -o name); do echo "--- $p"; kubectl -n $NS logs --all-containers --tail=8 "$p"; done; } >&2 2>&1 || true
  exit 1; }
ok() { say "ok: $*"; }
fresh() { kubectl delete namespace $NS --ignore-not-found --wait --timeout=90s >/dev/null; kubectl create namespace $NS >/dev/null
  wait_for 20 kubectl -n $NS get serviceaccount default || fail "no service account"; }
job() { # NAME IMAGE RESTARTPOLICY ARGS [restricted]: with the latter the pods fit Pod Security "restricted"
  local pod='{}' container='{}'
  [ "${5:-}" != restricted ] || { pod='{runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}'
    container='{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}'; }
  sed "s#@NAME@#$1#; s#@IMAGE@#$2#; s#@RESTART@#$3#; s#@ARGS@#$4#; s#@BACKOFF@#6#; s#@POD_SECURITY@#$pod#; s#@SECURITY@#$container#" \
    "$T/pytorchjob.yaml" | kubectl -n $NS apply -f - >/dev/null; }
state() { kubectl -n $NS wait --for=condition="$2" "pytorchjob/$1" --timeout="$3" >/dev/null || fail "PyTorchJob $1 is not $2"; }
logs() { kubectl -n $NS logs -l training.kubeflow.org/job-name="$1" --tail=-1 --prefix -c pytorch; }
reason() { kubectl -n $NS get events -o jsonpath='{range .items[*]}{.reason} {.message}{"\n"}{end}' | grep -q "$1"; }
make_image() { # NAME FOLDER: sets image, made from the Dockerfile there and in the registry, tagged by the folder's contents
  local base=$REGISTRY/tutorial/mnist:base d=$CLUSTER_STATE/buildah store
  image=$REGISTRY/cluster-test/$1:$(cat "$2"/* | sha256sum | cut -c1-12)
  ! in_registry "$image" || return 0
  in_registry "$base" || die "the registry has no $base: run $CLUSTER_DIR/up base-image"
  store=(--storage-driver overlay --root "$d/root" --runroot "$d/run"); mkdir -p "$d/tmp"
  TMPDIR=$d/tmp buildah "${store[@]}" bud --quiet --isolation chroot --tls-verify=false --build-arg BASE="$base" -t "$image" "$2" \
    > "$LOG/buildah.log" 2>&1 || die_log buildah "the image does not build"
  TMPDIR=$d/tmp buildah "${store[@]}" push --quiet --tls-verify=false "$image" >> "$LOG/buildah.log" 2>&1 || die_log buildah "the image was not pushed"
  buildah "${store[@]}" rmi --all --force >/dev/null
  ok "image built from a Dockerfile and pushed as $image"
}
in_registry() { # IMAGE
  local n=${1#*/}
  curl -fs -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
    -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' "http://$REGISTRY/v2/${n%:*}/manifests/${n##*:}"; }
# --- Katib
experiment() { # NAME JOB-KIND ALGORITHM [FURTHER-ARGS [SED]]
  local other=Job; [ "$2" = PyTorchJob ] || other=PyTorchJob
  sed "/#$other\$/d; s/ *#$2\$//; s#@NAME@#$1#; s#@IMAGE@#$image#; s#@ALGORITHM@#$3#; s#@ARGS@#${4:-}#; ${5:-}" "$T/katib.yaml" | kubectl -n $NS create -f - 2>&1; }
estate() { kubectl -n $NS wait --for=condition="$2" "experiment/$1" --timeout=240s >/dev/null || efail "Experiment $1 is not $2"; }
eget() { kubectl -n $NS get experiment "$1" -o jsonpath="$2"; }
efail() { { kubectl -n $NS get experiment,suggestion,trial; kubectl -n kubeflow get pods; kubectl -n kubeflow logs deployment/katib-controller --tail=10 | cut -c1-300; } >&2 2>&1 || true; fail "$@"; }
refused() { local m; m=$(experiment "${@:2}") && efail "not refused: ${*:2}"; case $m in *"$1"*) ;; *) efail "refused, but not for '$1': $m" ;; esac; }
katib_test() {
  local n kind algorithm s start all
  kubectl label namespace $NS katib.kubeflow.org/metrics-collector-injection=enabled >/dev/null
  make_image trial "$T/katib-image"
  for s in "rj Job random" "tj Job tpe" ${pytorch:+"rp PyTorchJob random" "tp PyTorchJob tpe"}; do
    read -r n kind algorithm <<<"$s"; start=$SECONDS
    # without the setting, tpe's first ten trials are random ones
    experiment "$n" "$kind" "$algorithm" '' 's#: tpe}#: tpe, algorithmSettings: [{name: n_startup_trials, value: "2"}]}#' >/dev/null || efail "Experiment $n was not accepted"
    estate "$n" Succeeded
    [ "$(eget "$n" '{.status.trialsSucceeded}')" = 4 ] || efail "not four trials of $n succeeded"
    all=$(kubectl -n $NS get trials -l katib.kubeflow.org/experiment="$n" -o jsonpath='{range .items[*]}{.status.observation.metrics[?(@.name=="accuracy")].max}{"\n"}{end}' | sort -g)
    [ "$(grep -c '^[01]\.[0-9]' <<<"$all")" = 4 ] || efail "a trial of $n has no accuracy"
    [ "$(eget "$n" '{.status.currentOptimalTrial.observation.metrics[?(@.name=="accuracy")].max}')" = "$(tail -n 1 <<<"$all")" ] || efail "the optimal trial of $n is not the best one"
    ok "Experiment, 4 trials, 2 at a time, $kind, $algorithm: Succeeded in $((SECONDS - start)) s, accuracy" $all
  done
  refused 'failed to find suggestion config for algorithm: nosuch' bad Job nosuch
  refused 'in spec.trialParameters not found in spec.trialTemplate' bad Job random '' '/args:/d'
  ok "an unknown algorithm and a wrong template are refused"
  experiment failing Job random ', "--fail"' >/dev/null; experiment silent Job random ', "--silent"' >/dev/null
  estate failing Failed; [ "$(eget failing '{.status.trialsFailed}')" -ge 1 ] || efail "no failed trials are counted"
  ok "failing trials: Failed after maxFailedTrialCount"
  estate silent Failed; [ "$(eget silent '{.status.trialMetricsUnavailable}')" -ge 1 ] || efail "no trials without metrics are counted"
  ok "trials that print no metrics: Failed, MetricsUnavailable"
  # the image's own command, looked up in the registry by the webhook
  experiment cmd Job random '' '/command:/d; s#args: .*#env: [{name: A, value: "${trialParameters.learningRate} ${trialParameters.batchSize}"}]#' >/dev/null
  estate cmd Succeeded; ok "a template without a command: the image's command is wrapped"
  kubectl -n $NS delete experiment --all >/dev/null
  experiment early "${pytorch:-Job}" random ', "--epoch-seconds=60"' >/dev/null
  early() { kubectl -n $NS get experiment,suggestion,trial,pods,deployments -o name | grep /early; }
  running() { [ "$(kubectl -n $NS get pods --field-selector=status.phase=Running -o name | grep -c /early-)" = 3 ]; }
  no_early() { ! early; }
  wait_for 60 running || efail "the experiment to delete does not run"
  kubectl -n $NS delete experiment early >/dev/null
  wait_for 60 no_early || efail "left over: $(early)"; ok "a deleted Experiment takes trials, pods and suggestion service with it"
}

kubectl get nodes --no-headers | grep -q ' Ready ' || fail "the node is not Ready"
curl -fs "http://$REGISTRY/v2/" >/dev/null || fail "the registry does not answer"
ok "API server and registry answer outside the namespaces"

pytorch=; ! kubectl get crd pytorchjobs.kubeflow.org >/dev/null 2>&1 || pytorch=PyTorchJob
if [ "${1:-}" = --katib ]; then
  kubectl get crd experiments.kubeflow.org >/dev/null 2>&1 || die "Katib is not installed: run $CLUSTER_DIR/up training-operator base-image katib"
  fresh
  katib_test; kubectl delete namespace $NS --wait=false >/dev/null; say "all passed"; exit 0
fi
fresh
kubectl -n $NS apply -f "$T/headless.yaml" >/dev/null
kubectl -n $NS wait --for=jsonpath='{.status.phase}'=Succeeded pod/peer-1 --timeout=60s >/dev/null || fail "headless service"
kubectl -n $NS logs peer-1 -c c | grep -q 'got hello' || fail "peer-1 got nothing"
ok "two pods met through a headless service and CoreDNS"

[ -n "$pytorch" ] || { kubectl delete namespace $NS --wait=false >/dev/null; say "no training-operator: stopping here"; exit 0; }
make_image train "$T/image"
job cnn "$image" OnFailure '["--steps", "20"]'
state cnn Succeeded 300s  # with the first pull of the image, which is 5.7 GB
[ "$(logs cnn | grep -c 'of 3 on cnn-.*master cnn-master-0:23456')" = 3 ] || fail "not three ranks"
[ "$(logs cnn | grep -c 'done, replicas agree')" = 3 ] || fail "the replicas did not agree"
ok "PyTorchJob, 1 master and 2 workers, DDP over gloo: Succeeded"

if [ "${1:-}" = --failures ]; then
  job fails "$image" Never '["--fail"]'
  job noimage "$REGISTRY/missing:1" OnFailure '[]'
  job killed "$image" OnFailure '["--steps", "25", "--step-seconds", "1"]'
  state fails Failed 90s; ok "a failing job becomes Failed"
  pulling() { kubectl -n $NS get pod noimage-master-0 -o jsonpath='{.status.containerStatuses[0].state.waiting.reason}' | grep -q ImagePullBackOff; }
  wait_for 60 pulling || fail "no ImagePullBackOff"; ok "a missing image shows ImagePullBackOff"
  started() { kubectl -n $NS logs killed-worker-1 -c pytorch | grep -q 'step 5 '; }
  wait_for 120 started || fail "the job to disturb does not run"
  kubectl -n $NS delete pod killed-worker-1 --grace-period=1 --wait=false >/dev/null
  state killed Succeeded 240s
  [ "$(kubectl -n $NS get pod killed-master-0 -o jsonpath='{.status.containerStatuses[0].restartCount}')" -ge 1 ] || fail "the master was not restarted"
  ok "a deleted worker is made again, the others restart, the job succeeds"
  fresh; kubectl label namespace $NS pod-security.kubernetes.io/enforce=restricted >/dev/null
  job restr "$image" OnFailure '[]'
  wait_for 30 reason 'FailedCreatePod.*violates PodSecurity "restricted' || fail "pods were not refused"; ok "Pod Security restricted refuses the pods"
  job fits "$image" OnFailure '["--steps", "20"]' restricted
  state fits Succeeded 150s; ok "and takes those that fit it, with the operator's init container"
fi

if kubectl get clustertrainingruntime torch-distributed >/dev/null 2>&1; then
  fresh
  sed "s#@NAME@#cnn#; s#@IMAGE@#$image#" "$T/trainjob.yaml" | kubectl -n $NS apply -f - >/dev/null
  kubectl -n $NS wait --for=condition=Complete trainjob/cnn --timeout=180s >/dev/null || fail "the TrainJob did not complete"
  [ "$(kubectl -n $NS logs -l jobset.sigs.k8s.io/jobset-name=cnn --tail=-1 | grep -c 'done, replicas agree')" = 2 ] || fail "not two ranks"
  ok "TrainJob, 2 nodes with torchrun: Complete"
fi
kubectl delete namespace $NS --wait=false >/dev/null
say "all passed"
