"""The Flyte page's image and its PyTorchJob on the cluster."""

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
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from tests.support.cluster import REGISTRY, build_by_dockerfile, create, follow
from tests.support.cluster import namespace as namespace
from tests.support.data import make_data

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
PROJECT = Path(__file__).resolve().parents[2]
NAME = "tutorial/mnist"
KEY, PASSWORD = secrets.token_hex(20), secrets.token_hex(20)  # of W&B, in the form of its keys; of a package index


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The Dockerfile's target flyte, built with a key and a password around that must not get into it."""
    pip = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = dict(re.findall(r"^(?:global|:env:)\.(index-url|trusted-host|cert)='(.*)'$", pip.stdout, re.MULTILINE))
    configuration = tmp_path_factory.mktemp("pip") / "pip.conf"
    options = ["--target", "flyte", "--secret", f"id=pip,src={configuration}"]
    if "cert" in settings:
        options += ["--volume", f"{Path(settings['cert']).resolve()}:/etc/pip.pem:ro"]
        settings["cert"] = "/etc/pip.pem"
    configuration.write_text("\n".join(["[global]", *map(" = ".join, settings.items()), f"# {PASSWORD}"]))
    build_by_dockerfile(PROJECT, f"{REGISTRY}/{NAME}:flyte", *options, WANDB_API_KEY=KEY)
    return f"{REGISTRY}/{NAME}:flyte"


def fetch(path):
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    request = urllib.request.Request(f"http://{REGISTRY}/v2/{NAME}/{path}", headers={"Accept": kind})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return answer.read()


def test_no_secret_is_in_the_image(image):
    """Of all layers that are not the base image's, and of its configuration, every byte."""
    manifest, base = (json.loads(fetch(f"manifests/{tag}")) for tag in ("flyte", "base"))
    config = fetch(f"blobs/{manifest['config']['digest']}")
    layers, known = ([layer["digest"] for layer in image["layers"]] for image in (manifest, base))
    assert layers[: len(known)] == known
    content, files = config, []
    for layer in layers[len(known) :]:
        blob = fetch(f"blobs/{layer}")
        blob = gzip.decompress(blob) if blob.startswith(b"\x1f\x8b") else blob
        content += blob
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            files += tar.getnames()
    assert b"def start_run" in content and "app/flyte_mnist.py" in files  # the search finds what is there
    for secret in KEY.encode(), PASSWORD.encode():
        assert secret not in content and base64.b64encode(secret) not in content
    assert not [name for name in files if "ubyte" in name]  # no data
    assert json.loads(config)["config"]["User"] == "1000"


def make_job(template, arguments, volume, namespace):
    """Return a PyTorchJob as Flyte's plugin makes it of a task's template, with its replicas and resources."""
    env = [{"name": entry.key, "value": entry.value} for entry in template.container.env]
    container = {"name": "pytorch", "image": template.container.image, "args": arguments, "env": env}
    container["volumeMounts"] = [{"name": "store", "mountPath": "/store"}]
    volumes = [{"name": "store", "hostPath": {"path": str(volume)}}]
    specs, plugin = {}, MessageToDict(template.custom)
    for role, group in ("Master", plugin["masterReplicas"]), ("Worker", plugin["workerReplicas"]):
        entries = group["resources"].items()
        resources = {kind: {item["name"].lower(): item["value"] for item in items} for kind, items in entries}
        resources["requests"]["cpu"] = "100m"  # the other tests' pods are on the node, too
        pod = {"containers": [container | {"resources": resources}], "volumes": volumes}
        specs[role] = {"replicas": int(group["replicas"]), "restartPolicy": "Never", "template": {"spec": pod}}
    metadata, spec = {"generateName": "flyte-", "namespace": namespace}, {"pytorchReplicaSpecs": specs}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata, "spec": spec}


def test_the_task_as_a_pytorchjob(image, namespace, tmp_path, monkeypatch):
    """What the task's template asks for, made by hand in place of Flyte, with the template's own arguments."""
    monkeypatch.setenv("FLYTE_SDK_LOCAL_SANDBOX", str(tmp_path))  # read when flytekit is imported
    from flytekit.types.directory import FlyteDirectory
    from support.flyte_tools import Pod, read_package

    from flyte_mnist import Hyperparameters, train_job

    pyflyte = [Path(sys.executable).parent / "pyflyte", "--pkgs", "flyte_mnist", "package", "--image", image]
    subprocess.run([*pyflyte, "--output", tmp_path / "package.tgz"], cwd=PROJECT, check=True)
    template = read_package(tmp_path / "package.tgz")["train_job"]
    volume = Path(os.environ["KUBECONFIG"]).parent / "flyte"  # the blob store
    make_data(volume / "data", train=10_000, test=2_000)
    data = FlyteDirectory("/store/data", remote_directory=False)
    values = Hyperparameters(epochs=2, batch_size=64, learning_rate=0.02)
    pod = Pod(template, volume / "pod", train_job, hyperparameters=values, data=data)
    for path in [volume, *volume.rglob("*")]:
        path.chmod(0o777)
    arguments = [argument.replace(str(volume), "/store") for argument in pod.command(attempt=1)]
    log = follow(create(make_job(template, arguments, volume, namespace)), namespace)
    assert "with 3 x cpu" in log and "Without" not in log
    logged = [float(accuracy) for accuracy in re.findall(r" accuracy=(\S+)$", log, re.MULTILINE)]
    literals = pod.literals(attempt=1)
    accuracies = [literal.scalar.primitive.float_value for literal in literals["accuracies"].collection.literals]
    assert accuracies == logged and len(accuracies) == 2 and accuracies[-1] > 0.9
    assert (volume / Path(literals["model"].scalar.blob.uri).relative_to("/store")).is_file()
