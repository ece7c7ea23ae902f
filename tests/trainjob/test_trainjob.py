"""What the page uses: its manifests on the cluster, its reasons, and the wrapper that posts the progress."""

import json
import os
import subprocess
import sys

import certifi
import pytest
import yaml
from kubeflow.trainer import KubernetesBackendConfig, TrainerClient
from support import pytorchjob, trainjob
from support.page import PageError

from tests.support.cluster import REGISTRY, create, kubectl
from tests.support.cluster import namespace as namespace
from tests.support.project import PROJECT

cluster = pytest.mark.cluster
MANIFEST = yaml.safe_load((PROJECT / "jobs" / "trainjob-mnist.yaml").read_text())


@cluster
def test_manifests_fit_the_installed_kinds(namespace):
    """With all fields known."""
    for file in "trainingruntime-mnist.yaml", "trainjob-mnist.yaml", "queue-mnist.yaml":
        options = "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-n", namespace
        assert "created" in kubectl("create", *options, "-f", str(PROJECT / "jobs" / file))


@cluster
def test_cluster_without_the_kind():
    assert trainjob.KIND == {
        "api": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "operator": "Kubeflow Trainer v2",
    }
    assert pytorchjob.find_cluster(**trainjob.KIND)[1] == ""
    problem = pytorchjob.find_cluster("trainer.kubeflow.org/v9", "TrainJob", "Kubeflow Trainer v2")[1]
    assert problem.endswith("does not know TrainJobs: install Kubeflow Trainer v2")


@pytest.fixture
def start(namespace):
    """A function that creates a TrainJob on our own runtime, in a restricted namespace, and returns its name."""
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    kubectl("create", "-n", namespace, "-f", str(PROJECT / "jobs" / "trainingruntime-mnist.yaml"))
    base = f"{REGISTRY}/tutorial/mnist:base"

    def create_job(spec=(), **trainer):
        job = json.loads(json.dumps(MANIFEST))
        job["metadata"] |= {"namespace": namespace}
        job["spec"] |= {"runtimeRef": {"kind": "TrainingRuntime", "name": "mnist"}} | dict(spec)
        job["spec"]["trainer"] |= {"image": base, "args": [], "numNodes": 1} | trainer
        return create(job).split("/")[1]

    return create_job


@cluster
@pytest.mark.slow
@pytest.mark.parametrize("trainer, reason", [
    ({"image": "localhost:5000/no/such:1"}, "no/such:1: not found"),
    ({"command": ["sh", "-c", "echo this is why; exit 3"]}, "failed: jobset failed .*\n.*\n    this is why"),
])  # fmt: skip
def test_follow_raises_the_reason(start, namespace, trainer, reason):
    client = TrainerClient(KubernetesBackendConfig(namespace=namespace))
    with pytest.raises(PageError, match=reason):
        trainjob.follow(client, start(**trainer), patience=120)


@cluster
@pytest.mark.slow
def test_follow_a_job_that_was_suspended(start, namespace, capsys):
    """The SDK never says of it that it is running."""
    name = start({"suspend": True}, command=["echo", "here it is"])
    assert "Suspended" in trainjob.get_conditions(next(trainjob.watch(name, namespace)))
    kubectl("patch", f"trainjob/{name}", "-n", namespace, "--type=merge", "-p", '{"spec": {"suspend": false}}')
    trainjob.follow(TrainerClient(KubernetesBackendConfig(namespace=namespace)), name, patience=120)
    assert capsys.readouterr().out.endswith("here it is\n")


@cluster
@pytest.mark.slow
def test_watch_gives_up_and_says_why(start, namespace):
    with pytest.raises(PageError, match="cannot get trainjob/nobody: .*not found"):
        next(trainjob.watch("nobody", namespace))
    no_job = start(resourcesPerNode={"requests": {"cpu": "64"}, "limits": {"cpu": 1}})  # the API server refuses it
    kubectl("create", "quota", "pods", "--hard=pods=1", "-n", namespace)
    one_pod = start(numNodes=2, command=["sleep", "60"])
    for name, reason in (no_job, "must be less than or equal to cpu limit"), (one_pod, "exceeded quota"):
        with pytest.raises(PageError, match=rf"is not done after \d+ s\n.*{reason}"):
            list(trainjob.watch(name, namespace, patience=10))


@pytest.fixture
def run(tmp_path):
    """A function that runs the wrapper around a program that logs as the trainer does, and returns what it printed."""
    program = tmp_path / "program.py"
    program.write_text('import sys; print("Epoch: 1 ( 50.0%) - train_loss=1.5", sys.argv[1:])')

    def run_wrapper(**variables):
        command = [sys.executable, PROJECT / "jobs" / "trainjob_progress.py", program, "--epochs", "2"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run_wrapper


def test_wrapper_without_a_status_server_only_runs_the_trainer(run):
    assert run() == "Epoch: 1 ( 50.0%) - train_loss=1.5 ['--epochs', '2']\n"


def test_report_that_is_lost_does_not_stop_the_training(run, tmp_path):
    (tmp_path / "token").write_text("secret")
    server = {"URL": "https://127.0.0.1:9/status", "CA_CERT": certifi.where(), "TOKEN": str(tmp_path / "token")}
    printed = run(**{f"KUBEFLOW_TRAINER_SERVER_{name}": value for name, value in server.items()})
    assert "The progress was not posted: " in printed and "train_loss=1.5" in printed and "secret" not in printed
