#!/bin/bash
# Makes the images of the cluster as OCI archives in $CLUSTER_CACHE/images; skips what is there.
#   images.sh              the system images (pause, tools, coredns, operators whose binary is built)
#   images.sh torch        Debian bookworm with the torch of requirements.txt, for addons/base-image.sh
#   images.sh mariadb      Debian bookworm with MariaDB, for Katib
set -euo pipefail
. "$(dirname "$0")/lib.sh"
IMG=$CLUSTER_CACHE/images; mkdir -p "$IMG"
mk() { # NAME FILE-STAMP-SOURCE ARGS...: rebuilt when the source is newer than the archive
  local n=$1 src=$2; shift 2
  [ "$IMG/$n.tar" -nt "$src" ] && [ "$IMG/$n.tar" -nt "$CLUSTER_DIR/images.sh" ] && [ "$IMG/$n.tar" -nt "$CLUSTER_DIR/images/mkimage.py" ] && return
  python3 "$CLUSTER_DIR/images/mkimage.py" --name "tutorial.local/$n:1" --out "$IMG/$n.tar" "$@"
  say "image tutorial.local/$n:1: $(du -h "$IMG/$n.tar" | cut -f1)"
}
system() {
  mk pause "$BIN/clustertool" --file "$BIN/clustertool:/clustertool" --entrypoint '["/clustertool","pause"]'
  # sh is bash, nslookup is clustertool: busybox's sh would run busybox's nslookup, see clustertool
  local bb bash links=(); bb=$(command -v busybox) && bash=$(command -v bash-static) || die "busybox or bash-static is missing: run $CLUSTER_DIR/packages.sh"
  for c in $("$bb" --list); do case $c in sh | ash | nslookup | busybox) ;; *) links+=(--link "busybox:/bin/$c") ;; esac; done
  mk tools "$BIN/clustertool" --file "$bb:/bin/busybox" --file "$bash:/bin/sh" --file "$BIN/clustertool:/bin/nslookup" "${links[@]}" --cmd '["/bin/sh"]'
  [ ! -x "$BIN/coredns" ] || mk coredns "$BIN/coredns" --file "$BIN/coredns:/coredns" --entrypoint '["/coredns"]'
  [ ! -x "$BIN/training-operator" ] || mk training-operator "$BIN/training-operator" --file "$BIN/training-operator:/manager" --entrypoint '["/manager"]' --user 65532
  [ ! -x "$BIN/jobset" ] || mk jobset "$BIN/jobset" --file "$BIN/jobset:/manager" --entrypoint '["/manager"]' --user 65532
  [ ! -x "$BIN/trainer" ] || mk trainer "$BIN/trainer" --file "$BIN/trainer:/manager" --entrypoint '["/manager"]' --user 65532
  for n in katib-controller katib-db-manager katib-file-metrics-collector katib-suggestion-goptuna; do   # the manifests' commands are ./NAME
    [ ! -x "$BIN/$n" ] || mk $n "$BIN/$n" --file "$BIN/$n:/$n" --entrypoint "[\"/$n\"]"; done
}
case ${1:-system} in
  system) system ;;
  torch) # made anew when the lock or the way it is made changes
    stamp=$(cat "$CLUSTER_DIR/../../requirements.txt" "$CLUSTER_DIR/images/torch.sh" "$CLUSTER_DIR/images/imagedir.py" | sha256sum)
    [ "$(cat "$IMG/torch/made-from" 2>/dev/null)" = "$stamp" ] && exit
    need_root; "$CLUSTER_DIR/images/torch.sh" "$IMG/torch"; echo "$stamp" > "$IMG/torch/made-from" ;;
  mariadb) [ -s "$IMG/mariadb.tar" ] && exit; need_root; need debootstrap; "$CLUSTER_DIR/images/mariadb.sh" "$IMG" ;;
  *) die "unknown image: $1" ;;
esac
