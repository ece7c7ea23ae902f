# Functions of the scripts beside it, which source this file: Debian bookworm as the first part of an image. They set
# $out, $log, and $work, a folder that is removed at their end.
# shellcheck shell=bash disable=SC2154
need debootstrap skopeo tar
[ "$(uname -m)" = x86_64 ] || die "the images of Debian can be made on x86-64 only"
trap 'rm -rf --one-file-system "$work"' EXIT

fail() {
    tail -n 15 "$log" >&2
    die "$1 (the whole log: $log)"
}

debian_mirror() { # this machine's
    local mirror=${DEBIAN_MIRROR:-}
    # shellcheck disable=SC2016
    [ -n "$mirror" ] || mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -E -m 1 '/debian/?$')
    [ -n "$mirror" ] || die "no Debian mirror found in apt's sources: set DEBIAN_MIRROR"
    echo "$mirror"
}

# debian FOLDER PACKAGES: a minimal system with these packages, without what only a person would read
debian() {
    debootstrap --variant=minbase --include="$2" bookworm "$1" "$(debian_mirror)" > "$log" 2>&1 ||
        fail "debootstrap failed"
    (cd "$1" && rm -rf var/{cache/apt,lib/apt/lists,log}/* usr/share/{doc,man,locale}/* etc/resolv.conf etc/hostname)
}

# wheels FOLDER ARG...: installs packages for the system's Python by the environment's uv, from its cache
wheels() (
    # shellcheck source=/dev/null
    . "$CLUSTER_DIR/../environment.sh"
    uv pip install --quiet --target "$1" --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
        --only-binary :all: "${@:2}"
)
