"""What the pages share, and the first page's tools for Kubernetes as far as they need no cluster."""

import errno
import fcntl
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
from IPython.core.interactiveshell import InteractiveShell
from support import page, pytorchjob
from traitlets.config import Config

import mnist
from tests.support.project import PROJECT

DEFAULTS = {"epochs": 5, "share": 0.5, "cpu": "", "rates": [0.1, 0.2], "strict": False}


@pytest.mark.parametrize("name, value, message", [
    ("epoch", 1, "there is no parameter 'epoch'; this page has epochs, share, cpu, rates, strict"),
    ("epochs", "one", "epochs is 'one' but must be like 5 (papermill: -y \"epochs: 5\")"),
    ("epochs", float("inf"), "epochs is inf but must be like 5"),
    ("strict", 1, "strict is 1 but must be like False"),
    ("share", float("nan"), "share is nan but must be like 0.5"),
    ("rates", "[0.1]", "rates is '[0.1]' but must be like [0.1, 0.2] (papermill: -y \"rates: [0.1, 0.2]\")"),
    ("cpu", 2, "cpu is 2 but must be like '' (papermill: -r cpu VALUE)")])  # fmt: skip
def test_parameters(name, value, message):
    page.check_parameters(DEFAULTS, {"epochs": 1, "share": 1, "cpu": "2", "rates": [], "strict": True})
    with pytest.raises(page.PageError) as error:
        page.check_parameters(DEFAULTS, {name: value})
    assert message in str(error.value)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A function that runs a cell in a shell of IPython, and returns the exception with which it ended."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.chdir(PROJECT)
    no_history = Config({"HistoryManager": {"enabled": False}})  # it would write at the end of Python
    monkeypatch.setattr(InteractiveShell, "enable_gui", lambda *_: None)  # without windows, as in kernels
    shell = InteractiveShell.instance(config=no_history, user_ns={"page": page})
    yield lambda cell: shell.run_cell(cell, store_history=True).error_in_exec
    InteractiveShell.clear_instance()
    matplotlib.use("agg")


def test_what_the_user_can_fix_shows_no_traceback(kernel, capsys):
    """A value that papermill injects, checked by start, and what the trainer raises: the message alone."""
    kernel("epochs = 5  # times\nshare = 0.5")
    kernel('# Parameters\nepochs = 1\nshare = float("nan")\n')
    error = kernel("page.start()")
    assert isinstance(error, page.PageError) and "share is nan" in str(error)
    assert capsys.readouterr().out.strip() == f"PageError: {error}"
    kernel("from mnist import TrainingError\nraise TrainingError('no data: give a folder')")
    assert capsys.readouterr().out.strip() == "TrainingError: no data: give a folder"


def test_fresh_folder_belongs_to_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page, "locks", {})
    (tmp_path / "build").mkdir()
    folder = page.fresh_folder("flyte")
    (folder / "results").write_text("mine")
    with page.locks.pop("flyte"):  # which is another process's now
        with pytest.raises(page.PageError, match="build/flyte is in use by another run of this page"):
            page.fresh_folder("flyte")
        assert (folder / "results").read_text() == "mine"
    for _ in range(2):  # the same cell may run again
        assert page.fresh_folder("flyte") == folder == Path("build/flyte") and not list(folder.iterdir())
        (folder / "results").write_text("old")
    page.locks["flyte"].close()


def test_no_locks_are_no_reason_to_stop(tmp_path, monkeypatch):
    def flock(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with page.lock(tmp_path / "lock"):
        pass


def test_shell_shows_output_as_it_comes_and_returns_it(capsys):
    assert page.shell("echo $GREETING; echo oops >&2", GREETING="hello") == "hello\noops\n"
    assert capsys.readouterr().out == "hello\noops\n"
    assert page.shell("which torchrun").strip() == str(Path(sys.executable).parent / "torchrun")
    with pytest.raises(page.PageError, match="exit status 3 of: echo why; exit 3\nwhy"):
        page.shell("echo why; exit 3")


@pytest.mark.slow
def test_an_interrupted_shell_ends_its_processes():
    """The reader interrupts the cell: the command and its children end too."""
    script = "from support import page\npage.shell('echo $$; sleep 60 & echo $!; wait')"
    variables = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(PROJECT / "notebooks")}
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=os.environ | variables, **pipes) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(2)
        process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def is_running(pid):
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


LOG = """Training on 60000 images with 1 x cpu in torch.float32
Epoch: 1 ( 50.0%) - train_loss=0.5257
Epoch: 1 - train_loss=0.3128 test_loss=0.0306 accuracy=0.9905
Trained in 21.3 s, 2817 images/s
"""


def test_read_log():
    """Of a run that began anew: what was done twice counts once, as it was done last."""
    before, end = LOG[:-33].replace("3128", "9999") + "Epoch: 2 ( 50.0%) - train_loss=0.2\n", LOG.splitlines()[3]
    log = page.read_log(f"{before}{LOG[:-33]}Epoch: 2 - train_loss=0.2 val_loss=0.1 accuracy=0.9910\n{end}")
    assert log == page.TrainingLog([1, 2], [0.3128, 0.2], [0.0306, 0.1], [0.9905, 0.991], 2817)
    with pytest.raises(page.PageError, match="stopped before its end"):
        page.read_log(LOG[:-20])


def test_the_table_of_steps(capsys):
    steps, digits = page.Steps(), SimpleNamespace(name="stand-in digits, not MNIST")
    with steps.training("train", digits) as log:
        print(LOG, end="")
    assert log.accuracies == [0.9905]
    steps.skip("launch", "no cluster")
    with pytest.raises(page.PageError), steps.training("rehearse", digits):
        print("mnist.py: no data")
    assert capsys.readouterr().out == LOG + "Skipped: no cluster.\nmnist.py: no data\n"
    rows = [[row[0], row[1], row[3]] for row in steps.table().rows]
    assert rows[0] == ["train", "ran", "99.05% of stand-in digits, not MNIST"]
    assert rows[1:] == [["launch", "skipped", "no cluster"], ["rehearse", "failed", ""]]
    with steps.step("rehearse"):
        pass
    assert [row[:2] for row in steps.table().rows][1:] == [["launch", "skipped"], ["rehearse", "ran"]]
    assert "rehearse" in repr(steps.table()) and "<td" in steps.table()._repr_html_()
    assert "<script>" not in page.Table([["<script>"]], ["what"])._repr_html_()


@pytest.mark.parametrize("status, reason", [(200, ""), (401, ""), (500, "answers, but not as a registry")])
def test_a_registry_that_answers(status, reason, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/v2/" else 404)
            self.end_headers()

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no proxy is right for this machine
    with HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = page.no_registry(f"localhost:{server.server_port}/mnist:1")
        server.shutdown()
    assert reason in said and bool(reason) == bool(said)


def test_prerequisites_without_anything(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    here = pytorchjob.prerequisites("default", "localhost:9/mnist:1")
    rows = {row[0]: row[1:] for row in here.rows}
    assert rows["cluster"] == ["none", "install kubectl to launch the job"] and rows["registry"][0] == "none"
    assert rows["Python"][0] and here.no_cluster and "Connection refused" in here.no_registry
    with pytest.raises(page.PageError, match="no cluster: install.*no registry: localhost:9 does not answer"):
        pytorchjob.prerequisites("default", "localhost:9/mnist:1", strict=True)
    for image in "mnist:latest", "me/mnist:1":
        assert page.no_registry(image).startswith("begin the parameter image with a registry")


@pytest.fixture
def manifest():
    return yaml.safe_load((PROJECT / "pytorchjob-mnist.yaml").read_text())


IMAGE = "localhost:5000/tutorial/mnist:1"


def test_fill_in(manifest):
    values = dict(namespace="team", workers=5, gpus=1, cpu="1500m", memory="3Gi")
    job = pytorchjob.fill_in(manifest, "registry.example/me/mnist:2", 3, 4, **values)
    assert job["metadata"]["namespace"] == "team" and pytorchjob.replicas(job) == 6
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["image"] == "registry.example/me/mnist:2"
        assert container["args"] == ["--epochs", "3", "--seed", "4"]
        assert container["resources"]["requests"] == {"cpu": "1500m", "memory": "3Gi", "nvidia.com/gpu": 1}
        assert container["resources"]["limits"] == {"memory": "3Gi", "nvidia.com/gpu": 1}
        assert container["env"] == [{"name": "OMP_NUM_THREADS", "value": "2"}]
    assert manifest == yaml.safe_load((PROJECT / "pytorchjob-mnist.yaml").read_text())  # the original is untouched
    assert pytorchjob.fill_in(manifest, IMAGE, 15, 7) == manifest
    assert pytorchjob.replicas(manifest) == 3
    with pytest.raises(page.PageError, match="gpus is 2 but must be 0 or 1"):
        pytorchjob.fill_in(manifest, IMAGE, 15, 7, gpus=2)


def test_manifest(manifest, capsys):
    """What is left of the job, and when; and arguments that the trainer takes."""
    assert "name" not in manifest["metadata"] and manifest["metadata"]["generateName"]  # a new one for every run
    policy = manifest["spec"]["runPolicy"]
    assert policy["cleanPodPolicy"] == "None" and policy["activeDeadlineSeconds"] and policy["ttlSecondsAfterFinished"]
    for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert (replica["restartPolicy"], container["name"]) == ("OnFailure", "pytorch")
        with pytest.raises(SystemExit) as stopped:  # the folder does not exist: all else was accepted
            mnist.main([*container["args"], "--data", "no/such/folder"])
        assert stopped.value.code == 1 and "no/such/folder" in capsys.readouterr().err
