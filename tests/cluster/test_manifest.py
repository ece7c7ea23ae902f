"""The manifest, checked against the operator's own schema."""

from pathlib import Path

import pytest
import yaml

import mnist

MANIFEST = Path(__file__).resolve().parents[2] / "pytorchjob-mnist.yaml"
OPERATOR = "github.com/kubeflow/training-operator@v1.9.3"


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


def pods(manifest):
    return [replica["template"]["spec"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]


def test_asks_for_what_the_page_says(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert "name" not in manifest["metadata"] and manifest["metadata"]["generateName"] == "pytorchjob-mnist-"
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"OnFailure"}
    policy = manifest["spec"]["runPolicy"]
    assert policy["cleanPodPolicy"] == "None" and policy["activeDeadlineSeconds"] and policy["ttlSecondsAfterFinished"]
    for replica in replicas.values():
        assert replica["template"]["metadata"]["annotations"]["sidecar.istio.io/inject"] == "false"
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["args"] == ["--epochs", "15", "--seed", "7", "--log-interval", "30"]


def test_its_arguments_are_the_trainers(manifest, capsys):
    for pod in pods(manifest):
        with pytest.raises(SystemExit) as stopped:  # the folder does not exist: all else was accepted
            mnist.main([*pod["containers"][0]["args"], "--data", "no/such/folder"])
        assert stopped.value.code == 1
        assert "no/such/folder" in capsys.readouterr().err
