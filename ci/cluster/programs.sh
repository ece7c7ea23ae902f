#!/bin/bash
# Builds every Go program of the cluster into $CLUSTER_CACHE/bin from the Go module proxy.
# What is there already, built from the same go.mod, is skipped.
#   programs.sh            all       programs.sh k8s coredns ...   only these
set -euo pipefail
. "$(dirname "$0")/lib.sh"
export CGO_ENABLED=0 GOFLAGS='-mod=mod -buildvcs=false -trimpath' GOTOOLCHAIN=${GOTOOLCHAIN:-local}
mkdir -p "$BIN" "$CLUSTER_CACHE/stamp" "$CLUSTER_CACHE/manifests"

# build OUTPUT MODDIR PACKAGE [LDFLAGS]
build() {
  local out=$BIN/$1 mod=$CLUSTER_DIR/$2 pkg=$3 ld=${4:-} stamp
  stamp=$(cat "$mod/go.mod" "$mod"/*.go | sha256sum | cut -d' ' -f1)
  [ -x "$out" ] && [ "$(cat "$CLUSTER_CACHE/stamp/$1" 2>/dev/null)" = "$stamp" ] && return
  command -v go >/dev/null || die "go is not on PATH: install Go 1.24 or newer, which builds the programs of the cluster"
  [ -n "$announced" ] || { announced=1; say "building the cluster's programs from Go modules, once, some minutes"; }
  local tm=(); [ -x /usr/bin/time ] && tm=(/usr/bin/time -f "$1: %e s, peak %M KB")
  (cd "$mod" && "${tm[@]}" go build -ldflags "-s -w $ld" -o "$out.new" "$pkg") 2> >(grep -v '^go: downloading' >&2) ||
    die "building $1 failed (a version refused by the module proxy is final: choose another in $2/go.mod)"
  mv "$out.new" "$out"; echo "$stamp" > "$CLUSTER_CACHE/stamp/$1"; say "$1: built, $(du -h "$out" | cut -f1)"
}
moddir() { (cd "$CLUSTER_DIR/$1" && go mod download "$2" && go list -m -f '{{.Dir}}' "$2"); }
version() { sed -n "s#.*$2 \(v[0-9][^ ]*\).*#\1#p" "$CLUSTER_DIR/$1/go.mod" | head -1; }
# copy_manifests NAME MODDIR MODULE: the module's own manifests, made writable
copy_manifests() {
  local d=$CLUSTER_CACHE/manifests/$1 done=$CLUSTER_CACHE/stamp/manifests-$1 src
  ! cmp -s "$CLUSTER_DIR/$2/go.mod" "$done" || return 0
  src=$(moddir "$2" "$3")
  rm -rf "$d"; mkdir -p "$d"; cp -r "$src/${4:-manifests}/." "$d/"; chmod -R u+w "$d"; cp "$CLUSTER_DIR/$2/go.mod" "$done"
}

announced=
want=${*:-clustertool k8s etcd coredns operator trainer katib}
for w in $want; do case $w in
  clustertool) build clustertool src/clustertool . ;;
  k8s) v=$(version mod/k8s k8s.io/kubernetes); n=${v#v}; maj=${n%%.*} min=${n#*.}; min=${min%%.*}
    for c in kubectl kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy; do
      build $c mod/k8s k8s.io/kubernetes/cmd/$c "-X k8s.io/component-base/version.gitVersion=$v -X k8s.io/component-base/version.gitMajor=$maj -X k8s.io/component-base/version.gitMinor=$min"
    done ;;
  etcd) build etcd mod/etcd go.etcd.io/etcd/server/v3 ;;
  coredns) build coredns mod/coredns . ;;
  operator) build training-operator mod/operator github.com/kubeflow/training-operator/cmd/training-operator.v1
    copy_manifests training-operator mod/operator github.com/kubeflow/training-operator ;;
  trainer) # one module for both: JobSet is a dependency of Trainer and shares its Kubernetes libraries
    build jobset mod/trainer sigs.k8s.io/jobset
    copy_manifests jobset mod/trainer sigs.k8s.io/jobset config
    build trainer mod/trainer github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager
    copy_manifests trainer mod/trainer github.com/kubeflow/trainer/v2 ;;
  katib) # controller, database manager, sidecar of the trials, the one suggestion service that is Go
    katib=github.com/kubeflow/katib/cmd
    build katib-controller mod/katib $katib/katib-controller/v1beta1
    build katib-db-manager mod/katib $katib/db-manager/v1beta1
    build katib-file-metrics-collector mod/katib $katib/metricscollector/v1beta1/file-metricscollector
    build katib-suggestion-goptuna mod/katib $katib/suggestion/goptuna/v1beta1
    copy_manifests katib mod/katib github.com/kubeflow/katib manifests/v1beta1 ;;
  *) die "unknown part: $w" ;;
esac; done
