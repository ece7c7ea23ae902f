#!/bin/bash
# Builds the cluster's Go programs into $CLUSTER_CACHE/bin; those that are there from the same go.mod are skipped.
#     programs.sh [--check] PART ...    parts: k8s etcd coredns operator
# With --check it builds nothing; its exit status is 1 if something is to be built.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
export CGO_ENABLED=0 GOFLAGS='-mod=mod -buildvcs=false -trimpath' GOTOOLCHAIN=${GOTOOLCHAIN:-local}
check=
announced=
if [ "${1:-}" = --check ]; then
    check=1
    shift
fi
mkdir -p "$BIN" "$CLUSTER_CACHE/stamp" "$CLUSTER_CACHE/manifests"

# build PROGRAM MODULE-FOLDER PACKAGE [LDFLAGS]
build() {
    local program=$1 module=$CLUSTER_DIR/mod/$2 package=$3 ldflags=${4:-} stamp
    stamp=$(cat "$module/go.mod" "$module"/*.go | sha256sum | cut -d' ' -f1)
    [ ! -x "$BIN/$program" ] || [ "$(cat "$CLUSTER_CACHE/stamp/$program" 2>/dev/null)" != "$stamp" ] || return 0
    [ -z "$check" ] || exit 1
    command -v go >/dev/null || die "go is not on PATH: install Go 1.24 or newer, which builds the cluster's programs"
    [ -n "$announced" ] || say "building the cluster's programs from Go modules, once, some minutes"
    announced=1
    local start=$SECONDS
    (cd "$module" && go build -ldflags "-s -w $ldflags" -o "$BIN/$program.new" "$package") \
        2> >(grep -v '^go: downloading' >&2) ||
        die "building $program failed (a version that the module proxy refuses: choose another in mod/$2/go.mod)"
    mv "$BIN/$program.new" "$BIN/$program"
    echo "$stamp" > "$CLUSTER_CACHE/stamp/$program"
    say "$program: built in $((SECONDS - start)) s"
}

build_kubernetes() {
    local version program major minor flags
    version=$(sed -n 's/^require k8s.io\/kubernetes v//p' "$CLUSTER_DIR/mod/k8s/go.mod")
    IFS=. read -r major minor _ <<< "$version"
    flags="-X k8s.io/component-base/version.gitVersion=v$version -X k8s.io/component-base/version.gitMajor=$major"
    flags="$flags -X k8s.io/component-base/version.gitMinor=$minor"
    for program in kubectl kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy; do
        build $program k8s k8s.io/kubernetes/cmd/$program "$flags"
    done
}

# The operator's own manifests are in its module.
copy_operator_manifests() {
    local module=$CLUSTER_DIR/mod/operator copy=$CLUSTER_CACHE/manifests/training-operator source
    local stamp=$CLUSTER_CACHE/stamp/manifests-training-operator
    ! cmp -s "$module/go.mod" "$stamp" || return 0
    [ -z "$check" ] || exit 1
    source=$(cd "$module" && go mod download github.com/kubeflow/training-operator &&
        go list -m -f '{{.Dir}}' github.com/kubeflow/training-operator)
    rm -rf "$copy"
    mkdir "$copy"
    cp -r "$source/manifests/." "$copy/"
    chmod -R u+w "$copy"
    cp "$module/go.mod" "$stamp"
}

for part; do
    case $part in
        k8s) build_kubernetes ;;
        etcd) build etcd etcd go.etcd.io/etcd/server/v3 ;;
        coredns) build coredns coredns . ;;
        operator)
            build training-operator operator github.com/kubeflow/training-operator/cmd/training-operator.v1
            copy_operator_manifests
            ;;
        *) die "unknown part: $part" ;;
    esac
done
