"""ci/cluster, on the machine itself; run last, as the cluster of the other tests is taken down here."""
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[1] / "ci" / "cluster"


def run(script, *arguments, **variables):
    return subprocess.run([CLUSTER / script, *arguments], capture_output=True, text=True, timeout=400,
                          env={**os.environ, **variables})


def test_wrong_add_on():
    done = run("up", "no-such-thing")
    assert done.returncode == 1 and "no add-on is called no-such-thing; there are training-operator" in done.stderr


def test_only_root():
    done = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash",
                           CLUSTER / "up"], capture_output=True, text=True, cwd="/")
    if os.geteuid() or "Permission denied" in done.stderr:
        pytest.skip("needs root, and a checkout that others may read")
    assert done.returncode == 1 and "error: the cluster needs root" in done.stderr


def test_with_passes_the_exit_code_on(tmp_path):
    """Without a cluster of its own: one that is up is used and left up."""
    for name in "up", "down", "status", "traces", "packages.sh":
        (tmp_path / name).write_text("#!/bin/sh\necho $0 $* >> $(dirname $0)/calls\n")
        (tmp_path / name).chmod(0o755)
    for name in "with", "lib.sh":
        (tmp_path / name).write_bytes((CLUSTER / name).read_bytes())
    state = {"CLUSTER_STATE": str(tmp_path / "state"), "CLUSTER_CACHE": str(tmp_path / "cache")}
    for command, code in ("exit 3", 3), ("kill -9 $$", 137), ("true", 0):
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(["bash", tmp_path / "with", "bash", "-c", command], capture_output=True, text=True,
                              env={**os.environ, **state})
        assert done.returncode == code, done.stderr
        calls = [line.split("/")[-1] for line in (tmp_path / "calls").read_text().splitlines()]
        assert calls == ["down --quiet", "traces", "up training-operator base-image", "down"]
        assert "installs Debian packages" in done.stderr and state["CLUSTER_CACHE"] in done.stderr
    for number in signal.SIGINT, signal.SIGTERM:
        (tmp_path / "calls").unlink()
        process = subprocess.Popen(["bash", tmp_path / "with", "bash", "-c", "trap 'exit 7' INT TERM; echo here; "
                                    "while :; do sleep 0.1; done"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True, env={**os.environ, **state})
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.wait(20) == 7
        process.stdout.close()
        assert (tmp_path / "calls").read_text().splitlines()[-1].endswith("down")


# From here on the cluster itself, one after the other.

pytestmark = pytest.mark.slow
real = pytest.mark.cluster


@real
def test_up_again_is_quick_and_changes_nothing():
    state = Path(os.environ["KUBECONFIG"]).parent
    before = {path.name: path.read_text() for path in (state / "pid").iterdir()}
    done = run("up", "training-operator", "base-image")
    assert done.returncode == 0 and done.stdout.strip() == os.environ["KUBECONFIG"], done.stderr
    assert {path.name: path.read_text() for path in (state / "pid").iterdir()} == before
    assert "training-operator" in run("status").stdout


@real
def test_what_runs_in_the_background_does_not_hold_the_lock(tmp_path):
    """Or `up` would seem to be at work for as long; here with this machine's own namespaces."""
    (tmp_path / "pid").mkdir()
    (tmp_path / "log").mkdir()
    script = """. "$0"; lock=$CLUSTER_STATE/lock; exec 9> "$lock"; flock 9
        save_pid holder $$; run sleeper sleep 60; exec 9>&-
        wait_for 3 flock -n "$lock" true; free=$?; pkill -P $(alive sleeper); exit $free"""
    subprocess.run(["bash", "-c", script, CLUSTER / "lib.sh"], check=True, env={
        **os.environ, "CLUSTER_STATE": str(tmp_path)})


@real
def test_down_leaves_nothing():
    """Compared with what ci/cluster/with saw before it brought the cluster up."""
    kubeconfig = Path(os.environ["KUBECONFIG"])
    before = cache() / "traces-before"
    if not before.exists():
        pytest.skip("the cluster was up before the tests, so that nobody knows what was there before it")
    during = run("traces").stdout
    assert "port " in during and "kubelet" in during and f"folder {kubeconfig.parent}" in during
    done = run("down")
    assert done.returncode == 0, done.stderr
    new = set(run("traces").stdout.splitlines()) - set(before.read_text().splitlines())
    assert not new
    assert run("status").returncode == 3 and run("down").returncode == 0


def cache():
    return Path(subprocess.run(["bash", "-c", '. "$0"; echo "$CLUSTER_CACHE"', CLUSTER / "lib.sh"], check=True,
                               capture_output=True, text=True).stdout.rstrip("\n"))


@real
def test_a_port_that_is_taken():
    import socket

    with socket.create_server(("127.0.0.1", 6443)):
        done = run("up")
    assert done.returncode == 1 and "port 6443 on 127.0.0.1 is taken by another program" in done.stderr
    assert "CLUSTER_API_PORT" in done.stderr


@real
def test_a_part_that_does_not_come_up(tmp_path):
    """Its name, the end of its log, exit status 1; here a scheduler that ends at once."""
    for path in cache().iterdir():
        if path.name != "bin":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bin").mkdir()
    for path in (cache() / "bin").iterdir():
        (tmp_path / "bin" / path.name).symlink_to(path)
    (tmp_path / "bin/kube-scheduler").unlink()
    (tmp_path / "bin/kube-scheduler").write_text("#!/bin/sh\necho the fault that was asked for\nexit 1\n")
    (tmp_path / "bin/kube-scheduler").chmod(0o755)
    done = run("up", CLUSTER_CACHE=str(tmp_path), CLUSTER_TIMEOUT="15")
    assert done.returncode == 1 and "error: sched" in done.stderr and "the fault that was asked for" in done.stderr
    assert run("status").returncode == 1


@real
def test_up_after_an_unclean_stop():
    """On what the test before left, and after the cluster's first process was killed."""
    done = run("up")
    assert done.returncode == 0, done.stderr
    holder = int((Path(done.stdout.strip()).with_name("pid") / "holder").read_text().split()[0])
    os.kill(holder, signal.SIGKILL)
    time.sleep(1)
    status = run("status")
    assert status.returncode == 1 and "not running: " in status.stderr
    done = run("up")
    assert done.returncode == 0, done.stderr
    assert re.match("up\n", run("status").stdout)
    assert run("down").returncode == 0
    assert run("status").stdout == "down\n"
