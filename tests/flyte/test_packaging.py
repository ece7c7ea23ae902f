"""flyte_mnist.py as a Flyte installation would get it, and what the page asks about the installation."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from matplotlib.figure import Figure

from tests.support.flyte import PROJECT, make_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of flytekit, flyteidl and what they import
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # flytekit's files
]
TRAININGS = "train", "train_elastic", "train_job", "validate"


def test_template(flow, templates):
    """(The resources of each pod are a table of the page.)"""
    for name in TRAININGS:
        metadata = templates[name].metadata
        assert metadata.discoverable and metadata.retries.retries == 2
        assert metadata.discovery_version == flow.train.metadata.cache_version
        assert not templates[name].security_context.secrets
        assert templates[name].container.image == "localhost:5000/tutorial/mnist:flyte"


def test_template_with_gpus_and_a_secret(flow, flyte_folder):
    from support.flyte_tools import pods, read_package

    variables = {"FLYTE_MNIST_GPUS": "1", "FLYTE_MNIST_WORKERS": "5", "FLYTE_MNIST_SECRET": "1"}
    templates = read_package(make_package(flyte_folder / "gpus.tgz", **variables))
    for name in TRAININGS:
        (secret,) = templates[name].security_context.secrets
        assert (secret.group, secret.key) == ("wandb", "api_key")
        assert templates[name].k8s_pod.pod_spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    gpus = {}
    for name, _, count, requests, limits in pods(templates).rows:
        gpus[name, count] = [dict(part.split() for part in text.split(", ")).get("gpu") for text in (requests, limits)]
    assert gpus["train_job", "1 master"] == gpus["train_job", "5 worker"] == gpus["validate", "1"] == ["1", "1"]
    assert gpus["train_elastic", "1"] == ["2", "2"]  # one for each process
    assert gpus["evaluate", "1"] == [None, None]


def test_graph(flow):
    """What is drawn of a workflow: its tasks, with conditions, and an arrow wherever one needs what another gave."""
    from support.flyte_tools import draw

    draw(flow.pipeline, axes := Figure().subplots())
    names = {text.get_position(): text.get_text() for text in axes.texts if text.get_text()}
    arrows = {(names[text.xyann], names[text.xy]) for text in axes.texts if not text.get_text()}
    trainings = {"train\nif single", "train_elastic\nif elastic", "train_job\nelse"}
    assert arrows == {("get_data", name) for name in ["evaluate", *trainings]} | {(t, "evaluate") for t in trainings}


@pytest.mark.parametrize("name, value", [("GPUS", "2"), ("WORKERS", "0")])
def test_settings_out_of_range(flow, monkeypatch, name, value):
    monkeypatch.setenv(f"FLYTE_MNIST_{name}", value)
    with pytest.raises(ValueError, match="FLYTE_MNIST_GPUS must be 0 or 1, FLYTE_MNIST_WORKERS at least 1"):
        exec(compile((PROJECT / "flyte_mnist.py").read_text(), flow.__file__, "exec"), vars(flow).copy())


def test_installation(flow, monkeypatch, tmp_path):
    """None configured; one that does not answer; one that does. (Any gRPC server will do to say that it is there.)"""
    from support.flyte_tools import no_backend

    monkeypatch.setenv("HOME", str(tmp_path))
    assert no_backend().startswith("no Flyte installation is configured")
    monkeypatch.setenv("FLYTE_PLATFORM_INSECURE", "true")
    monkeypatch.setenv("FLYTE_PLATFORM_URL", "127.0.0.1:9")
    assert no_backend(1) == "the Flyte installation 127.0.0.1:9 does not answer"
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("FLYTE_PLATFORM_URL", f"dns:///127.0.0.1:{port}")
    assert no_backend() == ""
    server.stop(0).wait()
