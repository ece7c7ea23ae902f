#!/bin/bash
# mariadb.sh DIR: Debian bookworm with MariaDB's server, for Katib. Takes the variables
# MYSQL_ROOT_PASSWORD and MYSQL_DATABASE like the image mysql; data in /var/lib/mysql/datadir.
set -euo pipefail
. "$(dirname "$0")/../lib.sh"
mirror=$(debian_mirror)
out=$1; root=$(mktemp -d "$out/rootfs.XXXXXX"); log=$out/mariadb.log
trap 'rm -rf --one-file-system "$root"' EXIT
chmod 755 "$root"
say "debootstrap bookworm with mariadb-server-core"
debootstrap --variant=minbase --include=mariadb-server-core bookworm "$root" "$mirror" >"$log" 2>&1 || { tail -n 20 "$log" >&2; die "debootstrap failed"; }
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/{doc,man,locale}/* "$root/etc/resolv.conf"
chroot "$root" useradd -r -u 65532 -d /nonexistent mysql
# the system tables are made here, so that a start takes a second or two; its helper my_print_defaults
# is in a big client package and would find nothing
ln -s /bin/true "$root/usr/bin/my_print_defaults"
chroot "$root" mariadb-install-db --force --user=mysql --datadir=/seed --skip-test-db --innodb-log-file-size=8M >>"$log" 2>&1 || { tail -n 20 "$log" >&2; die "mariadb-install-db failed"; }
cat > "$root/entry.sh" <<'S'
#!/bin/sh
set -e
d=/var/lib/mysql/datadir
[ -d $d ] || { cp -a /seed $d.new; mv $d.new $d; }
printf '%s\n' "CREATE DATABASE IF NOT EXISTS \`$MYSQL_DATABASE\`;" \
  "CREATE USER IF NOT EXISTS 'root'@'%' IDENTIFIED BY '$MYSQL_ROOT_PASSWORD';" "GRANT ALL ON *.* TO 'root'@'%';" > /var/lib/mysql/init.sql
exec mariadbd --no-defaults --datadir=$d --socket=/var/lib/mysql/mysqld.sock --pid-file=/var/lib/mysql/mysqld.pid --init-file=/var/lib/mysql/init.sql --skip-name-resolve \
  --innodb-flush-log-at-trx-commit=2 --innodb-buffer-pool-size=32M --innodb-log-file-size=8M
S
chmod 755 "$root/entry.sh"; mkdir -p "$root/var/lib/mysql"; chown 65532 "$root/var/lib/mysql"
version=$(chroot "$root" mariadbd --version | grep -o '[0-9.]*-MariaDB' | head -n 1)
say "packing $version, $(du -sm "$root" | cut -f1) MB"
python3 "$CLUSTER_DIR/images/mkimage.py" --name tutorial.local/mariadb:1 --out "$out/mariadb.tar" --rootfs "$root" --user 65532 --entrypoint '["/entry.sh"]'
say "tutorial.local/mariadb:1: archive $(du -h "$out/mariadb.tar" | cut -f1)"
