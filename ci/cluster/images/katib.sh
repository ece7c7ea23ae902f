#!/bin/bash
# katib.sh DIR: makes DIR, the image of all parts of Katib, as a folder for skopeo: Debian bookworm with MariaDB, and
# Python with the packages of requirements-katib.txt; Katib's services in Python and its four programs.
set -euo pipefail
umask 022
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
out=$1
need_room 2200 "$(dirname "$out")"
log=$CLUSTER_CACHE/katib-image.log
work=$(mktemp -d "$(dirname "$out")/katib.XXXXXX")
# shellcheck source-path=SCRIPTDIR source=debian.sh
. "$CLUSTER_DIR/images/debian.sh"
system=$work/system
mkdir "$system" "$work/image"
chmod 755 "$system"

say "image of Katib: debootstrap"
debian "$system" mariadb-server-core,python3,procps # procps: the metrics collector stops a trial with the help of pgrep
# The database as it is at first, so that a pod need not make it. The helper is in a big package and would find nothing.
ln -s /bin/true "$system/usr/bin/my_print_defaults"
chroot "$system" mariadb-install-db --force --user=root --datadir=/seed --skip-test-db --innodb-log-file-size=8M \
    >> "$log" 2>&1 || fail "mariadb-install-db failed"
chmod -R a+rX "$system/seed"

say "image of Katib: wheels"
site=$system/usr/local/lib/python3.11/dist-packages
wheels "$site" --no-binary hyperopt --no-binary future --require-hashes \
    --requirements "$CLUSTER_DIR/images/requirements-katib.txt" >> "$log" 2>&1 || fail "installing the packages failed"
mkdir "$system/opt/katib"
cp -r "$BUILT/katib/pkg" "$BUILT/katib/cmd" "$system/opt/katib/"
find "$system/opt/katib" -type f ! -name '*.py' -delete
# Every `up` unpacks the image, and each file takes its time: only compiled Python, half as many files.
chroot "$system" python3 -m compileall -q -b -j 0 /usr/local/lib/python3.11/dist-packages /opt/katib >> "$log" 2>&1 ||
    true # a few files are templates
find "$site" -type d \( -name tests -o -name __pycache__ -o -name tzdata \) -prune -exec rm -r {} +
find "$site" "$system/opt/katib" \( -name '*.py' -o -name '*.pyi' -o -name '*.h' \) -delete
rm -r "$system"/usr/share/{zoneinfo,bash-completion} "$system/var/lib/dpkg"
# Named as in the manifests' commands.
cp "$BUILT"/katib/{katib-controller,file-metricscollector,goptuna} "$system/"
cp "$BUILT/katib/db-manager" "$system/katib-db-manager"
cat > "$system/entrypoint" <<'END'
#!/bin/sh
# Katib's configuration names nothing but an image for the metrics collector, which gets options, and for medianstop.
case ${1:-medianstop} in
    -*) exec /file-metricscollector "$@" ;;
    medianstop) cd /opt/katib/cmd/earlystopping/medianstop/v1beta1 ;;
    *) cd "/opt/katib/cmd/suggestion/$1/v1beta1" ;;
esac
# Python as the first process would ignore SIGTERM, and the pod run on for its 30 s of grace.
python3 main.pyc &
trap 'kill $!' TERM
wait $!
END
chmod 755 "$system/entrypoint"

say "image of Katib: packing $(du -sm "$system" | cut -f1) MB"
path=/opt/katib:/opt/katib/pkg/apis/manager/v1beta1/python:/opt/katib/pkg/apis/manager/health/python
env="[\"PYTHONPATH=$path\", \"PYTHONUNBUFFERED=1\", \"OMP_NUM_THREADS=1\"]"
"$CLUSTER_DIR/images/imagedir.py" --config "{\"Entrypoint\": [\"/entrypoint\"], \"Env\": $env}" "$work/image" "$system"
rm -rf "$out"
mv "$work/image" "$out"
