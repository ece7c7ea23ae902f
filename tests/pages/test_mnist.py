"""notebooks/mnist.ipynb, run from top to bottom by papermill with other values."""

import json
import os
import re
import shutil
import subprocess
import textwrap
import time

import nbformat
import pytest
import yaml
from support.pytorchjob import LABEL

import mnist
from tests.support.cluster import REGISTRY, kubectl
from tests.support.data import make_data
from tests.support.network import found_in
from tests.support.pages import PROJECT, cell, figures, papermill, read, stable_outputs, text
from tests.support.project import unpack_tarball

PAGE = read("mnist")
KEPT = PROJECT / "build" / "cluster"  # what CI keeps
pytestmark = pytest.mark.slow
cluster = pytest.mark.cluster


def test_committed_outputs_are_of_mnist():
    assert text(cell("data", PAGE)) == "MNIST\n"
    accuracy = re.findall(r"accuracy=(\S+)", text(cell("run", PAGE)))
    assert len(accuracy) == 5 and float(accuracy[-1]) > 0.99
    assert f"{float(accuracy[-1]):.2%} of MNIST" in text(cell("what-ran", PAGE))
    right = re.match(r"(\d+) of 10000", text(cell("model", PAGE)))[1]
    assert abs(int(right) / 10_000 - float(accuracy[-1])) < 0.0003  # bfloat16 may round in another order


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project as it is in the tarball, in a folder with a space in its name."""
    return unpack_tarball(tmp_path_factory.mktemp("it's a tarball"))


@pytest.fixture(scope="module")
def executed(project):
    """The page, run with small values: on the cluster if there is one, where its job is kept."""
    values = {"epochs": 2, "seed": 3, "workers": 1, "data_dir": make_data(project / "it's small")}
    variables = {"MPLBACKEND": "Agg"}  # a user may have it for other work; figures show all the same
    if REGISTRY:
        values |= {"strict": True, "keep_job": True, "image": f"{REGISTRY}/tutorial/mnist:page"}
        variables["KUBECONFIG"] = os.environ["KUBECONFIG"]
        values["base_image"] = f"{REGISTRY}/tutorial/mnist:base"
    else:
        values |= {"namespace": "team", "image": "localhost:9/a:1"}
    arguments = [word for name, value in values.items() for word in ("-p", name, str(value))]
    begun = time.monotonic()
    done, page = papermill(project, *arguments, "-r", "cpu", "500m", **variables)
    if REGISTRY:
        keep(page, time.monotonic() - begun)
    assert done.returncode == 0, done.stderr
    yield page
    if REGISTRY:
        kubectl("delete", "pytorchjobs", "--all", "--cascade=foreground")


def keep(page, seconds):
    """Keep the page and the logs of its pods for people to look at."""
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    nbformat.write(page, KEPT / "mnist.ipynb")
    for name in kubectl("get", "pods", "-o", "name").split():
        (KEPT / f"{name.split('/')[1]}.log").write_text(kubectl("logs", name, "--all-containers", "--prefix"))
    (KEPT / "seconds.txt").write_text(f"{seconds:.0f} s for the page with small values\n")


def test_values_reach_the_trainer(executed, project, capsys):
    """The page with injected values logs, line for line, what the trainer logs when it is given these values."""
    mnist.train(data=project / "it's small", epochs=2, seed=3)
    expected = re.findall("^Epoch.*", capsys.readouterr().out, re.MULTILINE)
    assert len(expected) == 2
    assert [line for line in text(cell("run", executed)).splitlines() if line in expected] == expected
    assert "with 2 x " in text(cell("rehearse", executed))
    table = text(cell("what-ran", executed))
    assert "train with 2 processes" in table and "the digits in it's small, not MNIST" in table


def test_values_reach_the_manifest(executed, project):
    job = yaml.safe_load((project / "build" / "pytorchjob-mnist.yaml").read_text())
    assert job["metadata"]["namespace"] == ("default" if REGISTRY else "team")
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["--epochs", "2", "--seed", "3"]
    assert container["resources"]["requests"]["cpu"] == "500m"
    assert container["image"].startswith(f"{REGISTRY}/tutorial/mnist@sha256:" if REGISTRY else "localhost:9/a:1")


def test_the_page_writes_what_is_there(executed, project):
    for file in "mnist.py", "pytorchjob-mnist.yaml":
        assert (project / file).read_bytes() == (PROJECT / file).read_bytes()


def test_figures_show_and_say_which_digits_they_are_of(executed):
    assert len(figures(executed)) == len(figures(PAGE)) >= 16
    drawn = [c for c in PAGE.cells if "page.show(" in c.source and c.id not in ("schedule", "all-reduce", "fast")]
    assert len(drawn) >= 13 and all("{digits.name}" in c.source for c in drawn)


def test_outputs_that_do_not_vary():
    """They are compared where the page is run in JupyterLab, in tests/site/test_lab.py."""
    compared = stable_outputs(PAGE).keys()
    assert compared >= {"get-resource-try", "get-resource-error", "data", "load", "balance", "mean", "shapes"}
    assert compared >= {"smoothing", "fast-others", "replicas", "manifest-check", "trouble-try"}


@cluster
def test_the_job_on_the_cluster(executed):
    rows = {line.split("  ")[0]: line for line in text(cell("what-ran", executed)).splitlines()}
    assert " skipped " not in str(rows) and {"build the image", "launch the job"} <= rows.keys()
    reference = text(cell("image-step", executed)).strip()
    assert re.fullmatch(rf"{REGISTRY}/tutorial/mnist@sha256:[0-9a-f]{{64}}", reference)
    job = text(cell("name", executed)).strip().split("/")[1]
    pods = json.loads(kubectl("get", "pods", "-l", f"{LABEL}={job}", "-o", "json"))["items"]
    assert sorted(pod["metadata"]["name"] for pod in pods) == [f"{job}-master-0", f"{job}-worker-0"]
    for pod in pods:
        assert pod["status"]["phase"] == "Succeeded"
        assert pod["status"]["containerStatuses"][0]["imageID"].endswith(reference.split("@")[1])
    log = kubectl("logs", f"{job}-master-0").splitlines()
    shown = text(cell("follow", executed)).splitlines()
    assert log == [line for line in shown if not line.startswith("(")]
    assert "Succeeded" in text(cell("describe", executed)) and text(cell("pods", executed)).count("Completed") == 2


@cluster
def test_the_job_trains_as_the_rehearsal_does(executed):
    losses = [re.findall(r"train_loss=(\S+)", text(cell(name, executed))) for name in ("rehearse", "follow")]
    assert len(losses[0]) == 2
    assert [float(loss) for loss in losses[1]] == pytest.approx([float(loss) for loss in losses[0]], abs=0.002)


@cluster
def test_commands_for_a_terminal(executed, project):
    """They are pasted as the page has them."""
    commands = textwrap.dedent(re.search(r"(?m)(^    .*\n)+", cell("terminal", PAGE).source)[0])
    assert "kubectl create" in commands and "kubectl delete" in commands
    done = subprocess.run(["bash", "-euc", commands], cwd=project, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "-master-0" in done.stdout and "accuracy=0." in done.stdout and "condition met" in done.stdout
    assert '" deleted' in done.stdout.splitlines()[-1]


@cluster
def test_no_secret_in_what_was_kept(executed):
    """The keys of the cluster."""
    keys = re.findall(r"(?:key-data|token): (\S{20,})", (PROJECT / os.environ["KUBECONFIG"]).read_text())
    assert keys and not any(found_in(KEPT, secret[:40]) for secret in keys)
