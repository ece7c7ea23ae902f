"""ci/cluster, on the machine itself; run last: the cluster of the other tests is taken down, and one comes up again."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[2] / "ci" / "cluster"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
real = pytest.mark.cluster


def run(*command, **variables):
    environment = {**os.environ, **variables, "PATH": f"{CLUSTER}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd="/", env=environment)


def test_only_root():
    done = run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash", CLUSTER / "up")
    if "Permission denied" in done.stderr:
        pytest.skip("needs a checkout that others may read")
    assert done.returncode == 1 and "error: the cluster needs root" in done.stderr


def test_a_version_of_kubernetes_that_is_not_there():
    done = run("up", "--kubernetes", "1.20")
    assert done.returncode == 1
    assert re.fullmatch(r"error: there is no Kubernetes 1.20 here; there are( 1\.\d\d)+\n", done.stderr)
    done = run("up", "--kubernetes")
    assert done.returncode == 1 and done.stderr.endswith("--kubernetes needs a version like 1.33\n")


def test_too_little_room(tmp_path):
    """One line, before anything is built."""
    folders = {"CLUSTER_STATE": f"{tmp_path}/state", "CLUSTER_CACHE": f"{tmp_path}/cache"}
    done = run("unshare", "-m", "bash", "-c", f"mount -t tmpfs -o size=50m none {tmp_path} && up base-image", **folders)
    line = rf"error: the cluster needs .*\d{{5}} MB of the 50 MB that are free on {tmp_path}[,:].*\n"
    assert done.returncode == 1 and re.fullmatch(line, done.stderr)


def test_with_passes_signals_and_the_exit_status_on(tmp_path):
    """With stand-ins for what brings the cluster up and down."""
    calls = tmp_path / "calls"
    for name in "up", "down", "traces":
        (tmp_path / name).write_text(f'#!/bin/sh\necho ${{0##*/}} $* >> "{calls}"\n')
        (tmp_path / name).chmod(0o755)
    run("cp", CLUSTER / "with", CLUSTER / "lib.sh", tmp_path)
    folders = {"CLUSTER_STATE": f"{tmp_path}/state", "CLUSTER_CACHE": f"{tmp_path}/cache"}
    trap = "trap 'exit 7' INT TERM; echo here; while :; do sleep 0.1; done"
    for script, number, status in ("echo here; exit 3", 0, 3), (trap, signal.SIGINT, 7), (trap, signal.SIGTERM, 7):
        calls.unlink(missing_ok=True)
        command = ["bash", tmp_path / "with", "bash", "-c", script]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | folders) as process:
            assert process.stdout.readline() == "here\n"
            process.send_signal(number)
            assert process.wait(20) == status
        up = "up training-operator base-image trainer kueue katib"
        assert calls.read_text().splitlines() == ["down --quiet", "traces", up, "down"]


@real
def test_up_again_changes_nothing_and_brings_lost_images_back():
    state = Path(os.environ["KUBECONFIG"]).parent
    version = (state / "kubernetes").read_text().strip()
    before = {path.name: path.read_text() for path in (state / "pid").iterdir()}
    images = ["ctr", "-a", state / "run/containerd.sock", "-n", "k8s.io", "images"]
    assert run(*images, "rm", "tutorial.local/pause:1").returncode == 0
    assert "the node has lost images of the cluster: pause;" in run("status").stderr
    done = run("up", "training-operator", "base-image")
    assert done.returncode == 0 and done.stdout.strip() == os.environ["KUBECONFIG"], done.stderr
    other = next(path.name[11:] for path in CLUSTER.glob("mod/kubernetes-*") if path.name[11:] != version)
    assert f"error: a cluster with Kubernetes {version} is up:" in run("up", "--kubernetes", other).stderr
    assert {path.name: path.read_text() for path in (state / "pid").iterdir()} == before
    status = run("status").stdout
    assert f"Kubernetes: {version}\n" in status and "kueue katib training-operator trainer\n" in status


@real
def test_down_leaves_nothing():
    """Compared with what ci/cluster/with saw before it brought the cluster up."""
    during = run("traces").stdout
    assert "port " in during and "kubelet" in during and f"folder {Path(os.environ['KUBECONFIG']).parent}" in during
    assert run("down").returncode == 0
    before = run("bash", "-c", '. "$0"; cat "$CLUSTER_CACHE/traces-before"', CLUSTER / "lib.sh").stdout
    assert before or pytest.skip("the cluster was up before the tests, so that nobody knows what was there before it")
    assert not set(run("traces").stdout.splitlines()) - set(before.splitlines())
    assert run("status").returncode == 3 and run("down").returncode == 0


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 1 GB for the state of a cluster."""
    folder = tmp_path_factory.mktemp("disk")
    make = "truncate -s 1G image && mkfs.ext4 -q -m 0 image && mkdir disk && mount -o loop image disk"
    subprocess.run(make, shell=True, cwd=folder, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTER_STATE", f"{folder}/disk/state")
        yield folder / "disk"
        run("down")
    subprocess.run(["umount", folder / "disk"], check=True)


@real
def test_what_keeps_the_cluster_from_coming_up(disk, tmp_path):
    """A port that is taken; a scheduler that ends at once: its name and its log."""
    with socket.create_server(("127.0.0.1", 6443)):
        done = run("up")
    assert done.returncode == 1 and "port 6443 on 127.0.0.1 is taken by another program" in done.stderr
    run("bash", "-c", '. "$0"; cp -rs "$CLUSTER_CACHE/." "$1"', CLUSTER / "lib.sh", tmp_path)
    for scheduler in tmp_path.glob("built/*/kube-scheduler"):
        scheduler.unlink()
        scheduler.symlink_to("/bin/ls")
    done = run("up", CLUSTER_CACHE=str(tmp_path))
    assert done.returncode == 1 and "error: sched stopped" in done.stderr and "unrecognized option" in done.stderr
    assert run("status").returncode == 1


@real
def test_full_disk_after_an_unclean_stop(disk):
    """`up` clears away what was left; then the node keeps its images, which no registry has, and starts pods."""
    done = run("up")
    assert done.returncode == 0, done.stderr
    kubectl = ["kubectl", "--kubeconfig", done.stdout.strip()]
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    subprocess.run(["fallocate", "-l", str(free - 4_000_000), disk / "filler"], check=True)
    stats = [*kubectl, "get", "--raw", "/api/v1/nodes/node0/proxy/stats/summary"]
    deadline = time.monotonic() + 60
    while json.loads(run(*stats).stdout)["node"]["fs"]["availableBytes"] > 5e6:
        assert time.monotonic() < deadline
        time.sleep(1)
    time.sleep(12)  # the kubelet looks for pressure every 10 s
    assert run("status").returncode == 0
    pod = ["--image=tutorial.local/coredns:1", "--image-pull-policy=Never", "--restart=Never"]
    assert run(*kubectl, "run", "probe", *pod, "--command", "--", "/coredns", "-version").returncode == 0
    succeeded = ["--for=jsonpath={.status.phase}=Succeeded", "--timeout=30s"]
    assert run(*kubectl, "wait", "pod/probe", *succeeded).returncode == 0
    os.kill(int((disk / "state/pid/holder").read_text().split()[0]), signal.SIGKILL)
    assert "not running: " in run("status").stderr
