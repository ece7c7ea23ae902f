"""notebooks/trainjob.ipynb, run from top to bottom: by papermill on the cluster, and by nbval without one."""

import os
import re

import pytest

from tests.support.cluster import REGISTRY, kubectl, run_page, wait_until_gone
from tests.support.data import make_data
from tests.support.network import cut_off
from tests.support.pages import cell, figures, nbval, papermill, read, stable_outputs, text
from tests.support.project import PROJECT, copy_project

PAGE = read("trainjob")
LAUNCHERS = "alone", "pet-torchrun", "launch", "local", "sdk-train"
pytestmark = pytest.mark.slow
cluster = pytest.mark.cluster
of_mnist = pytest.mark.skipif("not os.environ.get('MNIST_DIR')", reason="smaller data train too quickly to suspend")


def log_line(name, page):
    """Return the trainer's line of the first epoch in the output of a cell."""
    return re.search("^Epoch: 1 - .*", text(cell(name, page)), re.MULTILINE)[0]


def test_committed_outputs_are_of_mnist_and_a_cluster():
    assert text(cell("data", PAGE)) == "MNIST\n"
    table = text(cell("what-ran", PAGE))
    assert " skipped " not in table and table.count("% of MNIST") == 6
    for name in LAUNCHERS:
        assert float(log_line(name, PAGE).split("=")[-1]) > 0.99


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page, run on the cluster with its own parameters."""
    return run_page("trainjob", tmp_path_factory.mktemp("it's a tarball"))


@cluster
@of_mnist
def test_all_steps_run_and_leave_nothing_behind(executed):
    table = text(cell("what-ran", executed))
    assert " skipped " not in table and " failed " not in table and "5 reasons found" in table
    kinds = "trainjobs,trainingruntimes,jobsets,jobs,pytorchjobs,pods,workloads,localqueues,configmaps"
    wait_until_gone(kinds, besides="configmap/kube-root-ca.crt")
    assert not kubectl("get", "clusterqueues,resourceflavors", "-o", "name")
    assert "Bound" in kubectl("get", "persistentvolumeclaim", "mnist-checkpoints")  # which holds data, and stays


@cluster
@of_mnist
def test_the_page_writes_what_is_there(executed):
    for file in "trainjob-mnist.yaml", "trainingruntime-mnist.yaml", "queue-mnist.yaml", "trainjob_progress.py":
        assert (executed.project / "jobs" / file).read_bytes() == (PROJECT / "jobs" / file).read_bytes()


@cluster
@of_mnist
def test_every_launcher_trains_the_same(executed):
    """Two processes log the same to the last digit, whoever started them."""
    assert len({log_line(name, executed) for name in ("pet-torchrun", "launch", "local")}) == 1
    assert "with 1 x" in text(cell("pet-python", executed)) and "with 3 x" in text(cell("sdk-train", executed))
    reference = text(cell("image-step", executed)).strip()
    assert re.fullmatch(rf"{REGISTRY}/tutorial/mnist@sha256:[0-9a-f]{{64}}", reference)


@cluster
@of_mnist
def test_suspended_job_goes_on_in_the_middle_of_an_epoch(executed):
    assert re.search(r"^[1-9]\d \[{'name': 'train_loss', ", text(cell("watch", executed)), re.MULTILINE)
    assert "is suspended" in text(cell("suspend", executed))
    assert re.search(r"Resuming from \S+: 0 epochs and [1-9]\d* steps are done", text(cell("resume", executed)))


@cluster
@of_mnist
def test_reasons_of_what_a_trainjob_does_not_say(executed):
    said = dict(line.split(maxsplit=1) for line in text(cell("silent-states", executed)).splitlines()[2:])
    assert [name for name in said if said[name] == "nothing"] == ["image", "policy", "retried"]
    assert "deadline" in said["room"] and said["failed"].startswith("Failed")
    reasons = dict(re.findall(r"^(\w+)\n((?:    .*\n?)+)", text(cell("reasons", executed)), re.MULTILINE))
    expected = {"image": "not found", "room": "Insufficient cpu", "policy": "violates PodSecurity"}
    expected |= dict.fromkeys(["retried", "failed"], "/no/such/folder")
    assert reasons.keys() == expected.keys() == said.keys()
    assert [name for name, words in expected.items() if words not in reasons[name]] == []
    assert re.search("""["']torch["'] not found""", text(cell("refused", executed)))  # says Trainer, or Kueue first


@cluster
@of_mnist
def test_queue_admits_one_job_after_the_other(executed):
    (figure,) = cell("queue-plot", executed).outputs
    times = re.findall(r"(\w+) from (\d+) to (\d+) s", figure.metadata["image/png"]["alt"])
    kinds, starts, ends = zip(*times)
    assert sorted(kinds) == ["PyTorchJob", "TrainJob", "TrainJob"]
    assert all(int(end) <= int(start) for end, start in zip(ends, starts[1:]))
    assert len(figures(executed)) == len(figures(PAGE)) == 4


def test_outputs_come_out_again_without_a_cluster(tmp_path):
    """nbval runs the page without network and cluster, and the solutions after it."""
    project = copy_project(tmp_path / "project")
    data = os.environ.get("MNIST_DIR") or make_data(tmp_path / "data")
    done = nbval(project, "trainjob", start=cut_off, MNIST_DIR=str(data), KUBECONFIG="no/such/kubeconfig")
    assert done.returncode == 0, done.stdout
    assert stable_outputs(PAGE).keys() >= {"fill-in"}


def test_strict_without_a_cluster_stops_before_it_trains(tmp_path):
    project, data = copy_project(tmp_path / "project"), make_data(tmp_path / "data")
    values = "-p", "strict", "True", "-p", "image", "localhost:9/a:1", "-p", "data_dir", data
    done, page = papermill(project, *values, name="trainjob", start=cut_off)
    assert done.returncode and "PageError: strict is set and there is no cluster: " in done.stderr
    assert not cell("alone", page).outputs
