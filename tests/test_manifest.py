"""The manifest, checked against the models of kubeflow-training and the operator's own schema."""
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from kubeflow.training import models
from kubeflow.training.api_client import ApiClient

MANIFEST = Path(__file__).resolve().parents[1] / "pytorchjob-mnist.yaml"
OPERATOR = "github.com/kubeflow/training-operator@v1.9.3"


@pytest.fixture
def manifest():
    return yaml.safe_load(MANIFEST.read_text())


def pods(manifest):
    return [replica["template"]["spec"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]


def test_fits_the_models_of_kubeflow_training(manifest):
    """What the models do not know is lost on the way there and back."""
    client = ApiClient()
    job = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), models.KubeflowOrgV1PyTorchJob)
    assert client.sanitize_for_serialization(job) == manifest


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    """The schema of PyTorchJob from the operator's Go module, with fields that it does not name forbidden."""
    if not shutil.which("go"):
        pytest.skip("the operator's schema comes from its Go module, and there is no go here")
    folder = tmp_path_factory.mktemp("operator")
    done = subprocess.run(["go", "mod", "download", "-json", OPERATOR], cwd=folder, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "GOFLAGS": "-mod=mod"})
    if done.returncode:
        pytest.skip(f"the operator's Go module cannot be had: {done.stdout[-200:]}{done.stderr[-200:]}")
    crd = Path(json.loads(done.stdout)["Dir"], "manifests/base/crds/kubeflow.org_pytorchjobs.yaml")
    version, = yaml.safe_load(crd.read_text())["spec"]["versions"]
    assert version["name"] == "v1"
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"]["properties"] = {"generateName": {"type": "string"}}

    def close(node):
        if isinstance(node, dict):
            if "properties" in node and isinstance(node["properties"], dict):
                node.setdefault("additionalProperties", False)
            for child in node.values():
                close(child)
        elif isinstance(node, list):
            for child in node:
                close(child)

    close(schema)
    return schema


@pytest.mark.slow
def test_fits_the_operators_schema(manifest, schema):
    jsonschema.validate(manifest, schema)
    manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate(manifest, schema)


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
        container, = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["args"] == ["--epochs", "15", "--seed", "7", "--log-interval", "256"]


def test_its_arguments_are_the_trainers(manifest, capsys):
    import mnist

    for pod in pods(manifest):
        with pytest.raises(SystemExit) as stopped:  # the folder does not exist: all else was accepted
            mnist.main([*pod["containers"][0]["args"], "--data", "no/such/folder"])
        assert stopped.value.code == 1
        assert "no/such/folder" in capsys.readouterr().err


def test_pod_security_restricted(manifest):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, what "restricted" asks of these fields."""
    for pod in pods(manifest):
        assert not pod.get("hostNetwork") and not pod.get("hostPID")
        assert all(volume.keys() == {"name", "emptyDir"} for volume in pod["volumes"])
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_gpu_lines_are_ready(manifest):
    text = MANIFEST.read_text()
    assert text.count("# nvidia.com/gpu: 1") == 2
    for pod in pods(yaml.safe_load(text.replace("# nvidia.com/gpu", "nvidia.com/gpu"))):
        for kind in "requests", "limits":
            assert pod["containers"][0]["resources"][kind]["nvidia.com/gpu"] == 1
