#!/bin/bash
# Builds the modules of mod/, each into a folder of $BUILT with its programs and its own manifests; what is there from
# the same go.mod is skipped.
#     programs.sh [--check] MODULE ...
# With --check it builds nothing; its exit status is 1 if something is to be built.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"
export CGO_ENABLED=0 GOFLAGS='-buildvcs=false -trimpath' GOTOOLCHAIN=${GOTOOLCHAIN:-local}
check=
announced=
if [ "${1:-}" = --check ]; then
    check=1
    shift
fi
mkdir -p "$BUILT"

# build MODULE [LDFLAGS]: the programs that its go.mod names as tools, or its own
build() {
    local module=$CLUSTER_DIR/mod/$1 folder=$BUILT/$1 stamp package packages=(tool) start=$SECONDS
    stamp=$(cat "$module"/* | sha256sum | cut -d' ' -f1)
    [ "$(cat "$folder/built-from" 2>/dev/null)" != "$stamp" ] || return 0
    [ -z "$check" ] || exit 1
    command -v go >/dev/null || die "go is not on PATH: install Go 1.26 or newer, which builds the cluster's programs"
    [ -n "$announced" ] || say "building the cluster's programs from Go modules, once, some minutes"
    announced=1
    [ ! -e "$module/main.go" ] || packages=(.)
    if [ "$1" = katib ]; then # one by one, as three of four are called v1beta1
        mapfile -t packages < <(grep -o 'github.com/kubeflow/katib/cmd/.*' "$module/go.mod")
    fi
    rm -rf "$folder" "$folder.new"
    mkdir "$folder.new"
    for package in "${packages[@]}"; do
        (cd "$module" && go build -ldflags "-s -w ${2:-}" -o "$folder.new/" "$package") \
            2> >(grep -v '^go: downloading' >&2) ||
            die "building $1 failed (a version that the module proxy refuses: choose another in mod/$1/go.mod)"
        [ ! -e "$folder.new/v1beta1" ] || mv "$folder.new/v1beta1" "$folder.new/$(basename "${package%/*}")"
    done
    manifests "$1" "$folder.new"
    echo "$stamp" > "$folder.new/built-from"
    mv "$folder.new" "$folder"
    say "$1: built in $((SECONDS - start)) s"
}

# The manifests of an operator are in its Go module, as is what Katib has in Python.
manifests() {
    local -A parts=(
        [training-operator]="github.com/kubeflow/training-operator/manifests"
        [trainer]="github.com/kubeflow/trainer/v2/manifests sigs.k8s.io/jobset/config"
        [kueue]="sigs.k8s.io/kueue/config"
        [katib]="github.com/kubeflow/katib/manifests github.com/kubeflow/katib/pkg github.com/kubeflow/katib/cmd"
    )
    local part source
    for part in ${parts[$1]:-}; do
        source=$(cd "$CLUSTER_DIR/mod/$1" && go mod download "${part%/*}" && go list -m -f '{{.Dir}}' "${part%/*}")
        cp -r "$source/${part##*/}" "$2/"
    done
    chmod -R u+w "$2"
}

for module; do
    flags=
    if [[ $module = kubernetes-* ]]; then
        version=$(sed -nE 's/.*k8s.io\/kubernetes v([0-9.]+).*/\1/p' "$CLUSTER_DIR/mod/$module/go.mod")
        IFS=. read -r major minor _ <<< "$version"
        package=k8s.io/component-base/version
        flags="-X $package.gitVersion=v$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
    fi
    build "$module" "$flags"
done
