"""What the pages share."""
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import yaml

matplotlib.use("agg")
PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import helpers  # noqa: E402


@pytest.fixture
def manifest():
    return yaml.safe_load((PROJECT / "pytorchjob-mnist.yaml").read_text())


def test_get_resource():
    said = "Warning: something old\npytorchjob.kubeflow.org/pytorchjob-mnist-x7k2p created\n"
    assert helpers.get_resource(said) == "pytorchjob.kubeflow.org/pytorchjob-mnist-x7k2p"
    captured = SimpleNamespace(stdout=said.replace("\n", "\r\n"), stderr="")  # as %%capture fills it after a `!`
    assert helpers.get_resource(captured) == "pytorchjob.kubeflow.org/pytorchjob-mnist-x7k2p"


@pytest.mark.parametrize("said", [
    'Error from server (AlreadyExists): pytorchjobs.kubeflow.org "mnist" already exists',
    'Error from server (Forbidden): pytorchjobs.kubeflow.org is forbidden: User "reader" cannot create resource',
    'error: resource mapping not found for name: "mnist": no matches for kind "PyTorchJob"',
])
def test_get_resource_repeats_what_kubectl_said(said):
    with pytest.raises(helpers.PageError) as error:
        helpers.get_resource(SimpleNamespace(stdout="", stderr=said))
    assert said in str(error.value)


def test_shell_shows_output_as_it_comes_and_returns_it(capsys):
    assert helpers.shell("echo $GREETING; echo oops >&2", GREETING="hello") == "hello\noops\n"
    assert capsys.readouterr().out == "hello\noops\n"


def test_shell_finds_the_programs_of_this_python(capsys):
    assert helpers.shell("which torchrun").strip() == str(Path(sys.executable).parent / "torchrun")


def test_shell_stops_the_page_when_the_command_fails(capsys):
    with pytest.raises(helpers.PageError, match="exit status 3 of: echo why; exit 3\nwhy"):
        helpers.shell("echo why; exit 3")


@pytest.mark.slow
def test_an_interrupted_shell_ends_its_processes(tmp_path):
    """The reader interrupts the cell: the command and its children end too."""
    script = (f"import sys; sys.path.insert(0, {str(PROJECT / 'notebooks')!r})\n"
              "import helpers\nhelpers.shell('echo $$; sleep 60 & echo $!; wait')")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(2)
    process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in pids)


def running(pid):
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


LOG = """Training on 60000 images with 1 x cpu in float32
Epoch: 1 ( 50.0%) - Loss: 0.5257
Epoch: 1 (100.0%) - Loss: 0.1000
Test accuracy: 9905/10000 ( 99.0%)
loss=0.0306
accuracy=0.9905
Trained in 21.3 s, 2817 images/s
"""


def test_read_log():
    assert helpers.read_log(LOG) == dict(losses=[(0.5, 0.5257), (1.0, 0.1)], accuracies=[(1, 0.9905)],
                                         images_per_second=2817)
    with pytest.raises(helpers.PageError, match="stopped before its end"):
        helpers.read_log(LOG[:-20])


def test_read_log_of_a_run_that_was_started_again():
    """What was done twice counts once; what came before the checkpoint counts."""
    first = LOG.splitlines()[:6] + ["Epoch: 2 ( 50.0%) - Loss: 0.0900"]
    resumed = ["Going on from run.pt: 1 epochs and {} steps are done",
               "Training on 60000 images with 1 x cpu in float32",
               "Epoch: 2 (100.0%) - Loss: 0.0800", "accuracy=0.9910", "Trained in 9.9 s, 3000 images/s"]
    killed = helpers.read_log("\n".join(first + resumed).format(0))
    assert killed["losses"] == [(0.5, 0.5257), (1.0, 0.1), (2.0, 0.08)]
    assert killed["accuracies"] == [(1, 0.9905), (2, 0.991)] and killed["images_per_second"] == 3000
    told = helpers.read_log("\n".join(first + resumed).format(400))
    assert told["losses"] == [(0.5, 0.5257), (1.0, 0.1), (1.5, 0.09), (2.0, 0.08)]
    anew = helpers.read_log("\n".join(first) + "\n" + LOG)
    assert anew == helpers.read_log(LOG)


def test_the_table_of_what_ran(capsys):
    ran, digits = helpers.Ran(), SimpleNamespace(name="stand-in digits, not MNIST")
    with ran.training("train", digits) as log:
        print(LOG, end="")
    assert log.accuracies == [(1, 0.9905)]
    ran.skip("launch", "no cluster")
    with pytest.raises(helpers.PageError), ran.training("rehearse", digits):
        print("mnist.py: no data")
    assert capsys.readouterr().out == LOG + "Skipped: no cluster.\nmnist.py: no data\n"
    assert [[row[0], row[1], row[3]] for row in ran.rows] == [
        ["train", "ran", "99.05% of stand-in digits, not MNIST"], ["launch", "skipped", "no cluster"],
        ["rehearse", "failed", ""]]
    with ran.step("rehearse"):
        pass
    assert [row[:2] for row in ran.rows][-1] == ["rehearse", "ran"] and len(ran.rows) == 3
    assert "rehearse" in repr(ran.table()) and "<td" in ran.table()._repr_html_()


def test_table_escapes_html():
    assert "<script>" not in helpers.Table([["<script>"]], ["what"])._repr_html_()


@pytest.mark.parametrize("status, found", [(200, True), (401, True), (500, False)])
def test_prerequisites_ask_the_registry(status, found, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/v2/" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = helpers.prerequisites("default", f"localhost:{server.server_port}/mnist:1").rows
        server.shutdown()
    assert (rows[-1][0], rows[-1][1] != "none") == ("registry", found)


def test_prerequisites_without_anything(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = {row[0]: row[1:] for row in helpers.prerequisites("default", "localhost:9/mnist:1").rows}
    assert rows["kubectl"][0] == rows["cluster"][0] == rows["registry"][0] == "none"
    assert "Connection refused" in rows["registry"][1]
    with pytest.raises(helpers.PageError, match="no kubectl: install.*no cluster: .*no registry: localhost:9"):
        helpers.prerequisites("default", "localhost:9/mnist:1", strict=True)
    with pytest.raises(helpers.PageError, match="begin the parameter image with a registry"):
        helpers.prerequisites("default", "mnist", strict=True)
    for image in "mnist:latest", "me/mnist:1":
        assert helpers.no_registry(image).startswith("begin the parameter image with a registry")


def test_fill_in(manifest):
    job = helpers.fill_in(manifest, "registry.example:5000/me/mnist:2", 3, 4, namespace="team", workers=5, gpus=1,
                          cpu="1500m", memory="3Gi")
    assert job["metadata"]["namespace"] == "team" and helpers.replicas(job) == 6
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        container, = replica["template"]["spec"]["containers"]
        assert container["image"] == "registry.example:5000/me/mnist:2"
        assert container["args"] == ["--epochs", "3", "--seed", "4", "--log-interval", "256"]
        assert container["resources"] == {"requests": {"cpu": "1500m", "memory": "3Gi", "nvidia.com/gpu": 1},
                                          "limits": {"memory": "3Gi", "nvidia.com/gpu": 1}}
        assert container["env"] == [{"name": "OMP_NUM_THREADS", "value": "2"}]
    assert manifest == yaml.safe_load((PROJECT / "pytorchjob-mnist.yaml").read_text())  # the original is untouched


def test_fill_in_of_nothing_changes_nothing(manifest):
    assert helpers.fill_in(manifest, "localhost:5000/tutorial/mnist:1", 15, 7) == manifest


@pytest.mark.parametrize("wrong, message", [({"gpus": 2}, "gpus is 2 but must be 0 or 1"),
                                            ({"cpu": "two"}, "cpu is 'two' but must be a number of CPUs")])
def test_fill_in_of_what_cannot_be(manifest, wrong, message):
    with pytest.raises(helpers.PageError, match=message):
        helpers.fill_in(manifest, "localhost:5000/tutorial/mnist:1", 15, 7, **wrong)


def test_fill_in_of_a_checkpoint_is_for_the_master(manifest):
    job = helpers.fill_in(manifest, "localhost:5000/tutorial/mnist:1", 15, 7, checkpoint_claim="claim")
    master, worker = (job["spec"]["pytorchReplicaSpecs"][name]["template"]["spec"] for name in ("Master", "Worker"))
    assert master["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert master["containers"][0]["args"][-2:] == ["--checkpoint", "/checkpoints/$(JOB_NAME).pt"]
    assert worker == manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


def test_replicas(manifest):
    assert helpers.replicas(manifest) == 3
    del manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]  # 1 by default
    assert helpers.replicas(manifest) == 2


def test_draw_all_reduce_shares_the_batch():
    texts = [text.get_text() for text in helpers.draw_all_reduce(3, 64).axes[0].texts]
    assert {"rank 0: 22 images", "rank 1: 21 images", "rank 2: 21 images"} <= set(texts)
    matplotlib.pyplot.close("all")
