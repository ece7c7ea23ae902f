"""The Flyte page's image and its PyTorchJob on a real cluster, which ci/test --cluster brings up."""
import base64
import gzip
import io
import json
import os
import re
import secrets
import subprocess
import sys
import tarfile
import urllib.request
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import mnist  # noqa: E402
from digits import get_digits  # noqa: E402
from test_flyte import folder_of, package, place, templates  # noqa: E402,F401
from test_job import REGISTRY, build_by_dockerfile, create, follow, namespace  # noqa: E402,F401

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
NAME = "tutorial/mnist"
KEY = secrets.token_hex(20)  # the form of W&B's keys
PASSWORD = secrets.token_hex(20)  # of a package index


def pip_configuration(folder):
    """Return buildah's options that give the build this machine's package index, as a user would by a secret."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(?:global|:env:)\.(index-url|trusted-host|cert)='(.*)'$", listing, re.MULTILINE))
    options = []
    if "cert" in found:
        options = ["--volume", f"{Path(found['cert']).resolve()}:/etc/pip.pem:ro"]
        found["cert"] = "/etc/pip.pem"
    config = ConfigParser(interpolation=None)
    config["global"] = found
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
        file.write(f"# {PASSWORD}\n")
    return ["--secret", f"id=pip,src={folder / 'pip.conf'}", *options]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The Dockerfile's target flyte, with a key and a password around that must not get into it."""
    name = f"{REGISTRY}/{NAME}:flyte"
    options = pip_configuration(tmp_path_factory.mktemp("pip"))
    build_by_dockerfile(PROJECT, name, "--target", "flyte", *options, WANDB_API_KEY=KEY)
    return name


def ask_registry(path, kind="application/vnd.docker.distribution.manifest.v2+json"):
    request = urllib.request.Request(f"http://{REGISTRY}/v2/{NAME}/{path}", headers={"Accept": kind})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return answer.read()


def test_no_secret_is_in_the_image(image):
    """Of all layers that are not the base image's, and of its configuration, every byte."""
    manifest, base = (json.loads(ask_registry(f"manifests/{tag}")) for tag in ("flyte", "base"))
    config = ask_registry(f"blobs/{manifest['config']['digest']}")
    known = {layer["digest"] for layer in base["layers"]}
    layers = [layer["digest"] for layer in manifest["layers"] if layer["digest"] not in known]
    assert layers and len(layers) < len(manifest["layers"])
    everything, files = config, {}
    for layer in layers:
        blob = ask_registry(f"blobs/{layer}")
        blob = gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob
        everything += blob
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            files |= {member.name: member.size for member in tar if member.isfile()}
    assert b"def start_records" in everything and "app/flyte_mnist.py" in files  # the search finds what is there
    for secret in KEY, PASSWORD:
        for form in secret.encode(), base64.b64encode(secret.encode()):
            assert form not in everything
    assert not files.get("etc/pip.conf")  # at most the empty file on which the secret was mounted
    assert not [name for name in files if "ubyte" in name]  # no data
    assert json.loads(config)["config"]["User"] == "1000"


def make_job(template, image, arguments, volume, namespace):
    """Return a PyTorchJob as Flyte's plugin makes it of a task's template, with its replicas and resources."""
    from flyte_tools import amounts, pytorch_job

    def spec(group):
        resources = {kind: {name.lower(): amount for name, amount in amounts(getattr(group.resources, kind)).items()}
                     for kind in ("requests", "limits")}
        resources["requests"]["cpu"] = "100m"  # the other tests' pods are on the node, too
        container = {"name": "pytorch", "image": image, "args": arguments, "resources": resources,
                     "env": [{"name": entry.key, "value": entry.value} for entry in template.container.env],
                     "volumeMounts": [{"name": "store", "mountPath": "/store"}],
                     "securityContext": {"runAsNonRoot": True, "allowPrivilegeEscalation": False,
                                         "capabilities": {"drop": ["ALL"]}}}
        pod = {"containers": [container], "automountServiceAccountToken": False,
               "volumes": [{"name": "store", "hostPath": {"path": str(volume)}}]}
        return {"replicas": group.replicas, "restartPolicy": "Never", "template": {"spec": pod}}

    job = pytorch_job(template)
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob",
            "metadata": {"generateName": "flyte-", "namespace": namespace},
            "spec": {"pytorchReplicaSpecs": {"Master": spec(job.master_replicas), "Worker": spec(job.worker_replicas)}}}


def test_the_task_as_a_pytorchjob(image, namespace, templates):  # noqa: F811
    """What the task's template asks for, made by hand in place of Flyte, with the template's own arguments."""
    from flyte_tools import Pod
    from flytekit.types.directory import FlyteDirectory

    from flyte_mnist import Hyperparameters, train_job

    volume = Path(os.environ["KUBECONFIG"]).parent / "flyte"  # the blob store
    volume.mkdir()
    folder_of(get_digits().folder, volume / "data", train=10_000, test=2_000)
    pod = Pod(templates["train_job"], volume / "pod", train_job, hyperparameters=Hyperparameters(epochs=2),
              data=FlyteDirectory("/store/data", remote_directory=False))
    for path in [volume, *volume.rglob("*")]:
        path.chmod(0o777)
    arguments = [argument.replace(str(volume), "/store") for argument in pod.command(attempt=1)]
    printed = follow(create(make_job(templates["train_job"], image, arguments, volume, namespace)), namespace)
    assert "with 3 x cpu" in printed and "Without" not in printed
    logged = [float(accuracy) for accuracy in re.findall(r"^accuracy=(\S+)$", printed, re.MULTILINE)]
    literals = pod.literals(attempt=1)
    accuracies = [literal.scalar.primitive.float_value for literal in literals["accuracies"].collection.literals]
    assert accuracies == logged and len(accuracies) == 2 and accuracies[-1] > 0.9
    model = volume / Path(literals["model"].scalar.blob.uri).relative_to("/store")
    mnist.Net().load_state_dict(torch.load(model, weights_only=True))
