"""flyte_mnist.py: its tasks and workflows on this machine, what they would be on a cluster, and Weights & Biases."""
import base64
import contextlib
import importlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from trainer import VARIABLES, equal, free_port, idx, make_data, weights, write_split

import mnist

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "notebooks")]
KEY = secrets.token_hex(20)  # the form of W&B's keys; new each time
pytestmark = [
    pytest.mark.slow,
    # Of libraries that we cannot change:
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # flytekit, flyteidl, wandb and what they import
    pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning"),  # flytekit's files, wandb's sockets
]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Where Flyte and W&B keep things; set before flytekit is imported, as it reads this only then."""
    folder = tmp_path_factory.mktemp("flyte")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FLYTE_SDK_LOCAL_SANDBOX": folder / "sandbox", "WANDB_DATA_DIR": folder / "wandb",
                            "WANDB_CACHE_DIR": folder / "wandb", "WANDB_CONFIG_DIR": folder / "wandb",
                            "DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1",
                            "PYTHONPATH": PROJECT}.items():
            patch.setenv(name, str(value))
        for name in (*VARIABLES, "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        import flytekit.core.local_cache

        patch.setattr(flytekit.core.local_cache, "CACHE_LOCATION", str(folder / "cache"))
        yield folder


@pytest.fixture(autouse=True)
def handlers(place):
    """Elastic leaves its handlers of signals, which must not stay for the other tests."""
    from flyte_tools import signals_kept

    with signals_kept():
        yield


@pytest.fixture(scope="module")
def flow(place):
    """The module, imported once the places are set."""
    return importlib.import_module("flyte_mnist")


@pytest.fixture(scope="module")
def package(place):
    """Make a package as the page does; return its path. With variables of the environment, if any are given."""
    def make(name="package.tgz", **variables):
        path = place / name
        done = subprocess.run([Path(sys.executable).parent / "pyflyte", "--pkgs", "flyte_mnist", "package", "--image",
                               "localhost:5000/tutorial/mnist:flyte", "--force", "--output", path],
                              cwd=PROJECT, capture_output=True, text=True, env={**os.environ, **variables})
        assert done.returncode == 0, done.stdout + done.stderr
        return path

    return make


@pytest.fixture(scope="module")
def templates(package):
    """The task templates of the package."""
    from flyte_tools import read_package

    return read_package(package())


def folder_of(source, target, train, test):
    """Write the first images and labels of a folder's training set as a small data set; return its folder."""
    images, labels = mnist.load(source, "train")
    target.mkdir(parents=True)
    for split, part in (("train", slice(train)), ("t10k", slice(train, train + test))):
        write_split(target, split, images[part, 0].numpy(), labels[part].numpy(), gz=False)
    return target


@pytest.fixture
def values(flow):
    """Hyperparameters that no other test has, so that the cache knows nothing of them."""
    return flow.Hyperparameters(epochs=2, log_interval=2, seed=secrets.randbelow(2**40))


def run(flow, folder, values, how="alone"):
    """Run the pipeline; return its result and what was printed in this process."""
    from flytekit.types.directory import FlyteDirectory

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = flow.pipeline(data_dir=FlyteDirectory(str(folder)), how=flow.How(how), hyperparameters=values)
    return result, printed.getvalue()


# Inputs


@pytest.mark.parametrize("name, value", [
    ("batch_size", 0), ("test_batch_size", -1), ("epochs", 0), ("epochs", 1.5), ("learning_rate", 0),
    ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("sgd_momentum", 1), ("sgd_momentum", -0.1),
    ("seed", -1), ("seed", 2**63), ("log_interval", 0), ("epoch", 1), ("learning_rate", "fast"),
])
def test_a_wrong_value_is_refused_by_name(flow, name, value):
    with pytest.raises(ValueError, match=rf"Hyperparameters\n{name}\n"):
        flow.Hyperparameters(**{name: value})


def test_what_is_accepted_is_what_the_trainer_accepts(flow, data):
    """At the ends of the ranges."""
    flow.Hyperparameters(batch_size=1, test_batch_size=1, epochs=1, learning_rate=1e-9, sgd_momentum=0, seed=0,
                         log_interval=1)
    values = flow.Hyperparameters(seed=2**63 - 1, epochs=1, sgd_momentum=0)
    result, printed = run(flow, data, values)
    assert len(result.accuracies) == 1 and "Training on" in printed


def test_a_wrong_value_stops_pyflyte_before_any_task(data):
    done = pyflyte("run", "flyte_mnist.py", "pipeline", "--data_dir", data, "--hyperparameters", '{"epochs": 0}')
    assert done.returncode == 1 and "epochs\n" in done.stdout + done.stderr
    assert "Training on" not in done.stdout


def pyflyte(*arguments, **variables):
    return subprocess.run([Path(sys.executable).parent / "pyflyte", *map(str, arguments)], cwd=PROJECT,
                          capture_output=True, text=True, timeout=300, env={**os.environ, **variables})


def test_the_command_of_the_docstring(flow, data, place):
    command = shlex.split(re.search(r"pyflyte (run flyte_mnist.*)", flow.__doc__)[1])
    command = [str(data) if part == "data/MNIST/raw" else part for part in command]
    done = pyflyte(*command, HOME=str(place / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy=" in done.stdout and "Result(accuracies=[" in done.stdout


def test_damaged_data_end_the_workflow_at_once(flow, data, tmp_path, values):
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    path = broken / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(mnist.TrainingError, match="t10k-labels-idx1-ubyte.gz is no whole MNIST file"):
        run(flow, broken, values)
    path.unlink()
    with pytest.raises(mnist.TrainingError, match="t10k-labels-idx1-ubyte.*is not in"):
        run(flow, broken, values)


# Tasks


def test_get_data_hands_on_what_is_in_the_files(flow, data):
    from flytekit.types.directory import FlyteDirectory

    handed = flow.get_data(data_dir=FlyteDirectory(str(data)))
    for split in "train", "t10k":
        for mine, theirs in zip(mnist.load(data, split), mnist.load(handed.path, split)):
            assert torch.equal(mine, theirs)


def test_hold_out_takes_both_ends_of_the_training_set(flow, data):
    from flytekit.types.directory import FlyteDirectory

    images, labels = mnist.load(data, "train")
    held = flow.hold_out(data=FlyteDirectory(str(data)), train=200, test=100)
    assert torch.equal(mnist.load(held.path, "train")[0], images[:200])
    assert torch.equal(mnist.load(held.path, "t10k")[1], labels[-100:])
    for train, test in (0, 100), (300, 100), (10, 317), (10, 0):
        with pytest.raises(ValueError, match=f"{train} images to train and {test} to test cannot be had of 317"):
            flow.hold_out(data=FlyteDirectory(str(data)), train=train, test=test)


def test_the_workflow_trains_what_the_trainer_trains(flow, data, values, one_process, tmp_path, capsys):
    result, printed = run(flow, data, values)
    mnist.train(data, epochs=2, seed=values.seed, log_interval=2, save_model=tmp_path / "model.pt")
    lines = re.compile("^(?:Epoch|Test|loss|accuracy).*", re.MULTILINE)
    assert lines.findall(printed) == lines.findall(capsys.readouterr().out)
    assert equal(weights(result.model.path), weights(tmp_path / "model.pt"))
    assert result.accuracy == result.accuracies[-1]
    assert Path(result.confusion.path).read_bytes().startswith(b"\x89PNG")


def test_all_values_reach_the_trainer(flow, data, one_process, tmp_path, monkeypatch):
    sizes, real = [], mnist.test  # the size of the test's batches shows nowhere else
    monkeypatch.setattr(mnist, "test", lambda *arguments: sizes.append(arguments[3]) or real(*arguments))
    values = flow.Hyperparameters(batch_size=32, test_batch_size=7, epochs=1, learning_rate=0.03, sgd_momentum=0.5,
                                  seed=secrets.randbelow(2**40), log_interval=3)
    result, printed = run(flow, data, values)
    assert sizes == [7]
    mnist.train(data, epochs=1, batch_size=32, lr=0.03, momentum=0.5, seed=values.seed,
                save_model=tmp_path / "model.pt")
    assert equal(weights(result.model.path), weights(tmp_path / "model.pt"))
    assert len(re.findall("^Epoch", printed, re.MULTILINE)) == 4  # ten steps: after 3, 6, 9 and the last


def test_two_processes(flow, data, values, capfd):
    """As many as Elastic asks for, really; the log is that of one, and so are the records."""
    from records import read_records

    result, _ = run(flow, data, values, how="elastic")
    printed = capfd.readouterr().out
    assert printed.count("Training on 317 images with 2 x cpu") == 1
    logged = [float(accuracy) for accuracy in re.findall(r"^accuracy=(\S+)$", printed, re.MULTILINE)]
    assert [round(accuracy, 4) for accuracy in result.accuracies] == logged and len(logged) == 2
    records = read_records(result.records.path)
    assert [accuracy for _, accuracy in records.curve("accuracy")] == pytest.approx(result.accuracies)
    assert len(list(Path(result.records.path).glob("wandb/*run-*"))) == 1


def test_sweep(flow, data, values):
    """The order is that of the trials, and each is what the trainer gets with its values."""
    from flytekit.types.directory import FlyteDirectory

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trials = [flow.Hyperparameters(**values.model_dump() | {"learning_rate": rate}) for rate in (0.1, 1e-9)]
        accuracies = flow.sweep(data_dir=FlyteDirectory(str(data)), trials=trials, train=200, test=100)
    logged = [float(accuracy) for accuracy in re.findall(r"^accuracy=(\S+)$", printed.getvalue(), re.MULTILINE)]
    assert [round(accuracy, 4) for accuracy in accuracies] == [logged[1], logged[3]]
    losses = re.findall(r"- Loss: (\S+)", printed.getvalue())
    assert losses[:4] != losses[4:] and len(losses) == 8  # the seed is the same, the rate is not
    with pytest.raises(ValueError, match="400 images to train and 100 to test cannot be had of 317"):
        flow.sweep(data_dir=FlyteDirectory(str(data)), trials=trials, train=400, test=100)


# The cache


def test_cache(flow, data, values, tmp_path):
    """The same inputs are not trained again, wherever the data lie; another value or another pixel is."""
    first, printed = run(flow, data, values)
    assert "Training on" in printed
    again, printed = run(flow, Path(shutil.copytree(data, tmp_path / "elsewhere")), values)
    assert printed == "" and again == first
    _, printed = run(flow, data, flow.Hyperparameters(**values.model_dump() | {"log_interval": 3}))
    assert "Training on" in printed
    images, labels = mnist.load(data, "train")
    images[0, 0, 0, 0] ^= 1
    (tmp_path / "elsewhere/train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "elsewhere/train-images-idx3-ubyte").write_bytes(idx(images[:, 0].numpy()))
    _, printed = run(flow, tmp_path / "elsewhere", values)
    assert "Training on" in printed


def test_a_changed_file_makes_another_version(flow, tmp_path):
    versions = set()
    for change in "", "mnist.py", "flyte_mnist.py":
        folder = tmp_path / f"changed {change}"
        folder.mkdir()
        for name in "mnist.py", "flyte_mnist.py":
            (folder / name).write_text((PROJECT / name).read_text() + "# changed\n" * (name == change))
        done = subprocess.run([sys.executable, "-c", "import flyte_mnist as f; print(f.train.metadata.cache_version)"],
                              cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(folder)})
        versions.add(done.stdout)
    assert len(versions) == 3 and f"{flow.train.metadata.cache_version}\n" in versions


# Attempts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data for a training that lasts long enough to be stopped in the middle."""
    return make_data(tmp_path_factory.mktemp("more"), train=6000, test=500, gz=False)


def make_pod(flow, templates, target, folder, task="train", **values):
    from flyte_tools import Pod
    from flytekit.types.directory import FlyteDirectory

    return Pod(templates[task], target, getattr(flow, task), data=FlyteDirectory(str(folder)),
               hyperparameters=flow.Hyperparameters(
                   **{"epochs": 3, "log_interval": 30, "learning_rate": 0.01} | values))


@pytest.fixture(scope="module")
def uninterrupted(flow, templates, tmp_path_factory, folder):
    """The accuracies and the model's file of a training that nobody stopped."""
    pod = make_pod(flow, templates, tmp_path_factory.mktemp("whole") / "pod", folder)
    with pod.start(1, WANDB_MODE="disabled") as process:
        printed = process.stdout.read()
    assert printed.strip().startswith("Training on") and "Without" not in printed
    outputs = pod.outputs(1)
    return outputs["accuracies"], outputs["model"].download()


@pytest.mark.parametrize("number, line", [(signal.SIGKILL, "Epoch: 2 "), (signal.SIGTERM, "Epoch: 1 ( 31.9%)")])
def test_a_second_attempt_goes_on(flow, templates, tmp_path, folder, uninterrupted, number, line):
    """From the last epoch after a kill, from the last step after SIGTERM; the end is as if nothing had been."""
    pod = make_pod(flow, templates, tmp_path / "pod", folder)
    with pod.start(1, WANDB_MODE="disabled") as process:
        for printed in process.stdout:
            if printed.startswith(line):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode and not (tmp_path / "pod/outputs-1/outputs.pb").exists(), rest
    with pod.start(2, WANDB_MODE="disabled") as process:
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    epochs, steps = map(int, re.search("Going on from .*: (.*) epochs and (.*) steps are done", printed).groups())
    assert (epochs, steps) == (1, 0) if number == signal.SIGKILL else (epochs == 0 and 30 <= steps < 94)
    outputs = pod.outputs(2)
    accuracies, model = uninterrupted
    assert outputs["accuracies"] == accuracies and len(accuracies) == 3
    assert equal(weights(outputs["model"].download()), weights(model))


def test_attempts_that_saved_nothing(flow, templates, tmp_path, folder, uninterrupted):
    """The first is killed in its first epoch, so the second begins anew; the third ends before it has saved anything
    of its own, so the fourth goes on from what the second saved."""
    pod = make_pod(flow, templates, tmp_path / "pod", folder)
    for attempt, line in enumerate(["Epoch: 1 ", "Epoch: 2 ", "Training on"], 1):
        with pod.start(attempt, WANDB_MODE="disabled") as process:
            for printed in process.stdout:
                assert not printed.startswith("Going on") or attempt == 3
                if printed.startswith(line):
                    process.kill()
                    break
            assert process.wait() == -signal.SIGKILL
    with pod.start(4, WANDB_MODE="disabled") as process:
        printed = process.stdout.read()
    assert re.search("Going on from .*: 1 epochs and 0 steps are done", printed)
    assert pod.outputs(4)["accuracies"] == uninterrupted[0]


def start_job(pod, world=3, **environment):
    """Start a task's command as often as a PyTorchJob has pods, with the variables that the operator sets."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    processes = []
    for rank in range(world):
        temporary = pod.folder / f"tmp-{rank}"
        temporary.mkdir()
        processes.append(pod.start(1 + rank, RANK=str(rank), TMPDIR=str(temporary), **shared))
    return processes


def test_the_task_of_a_job_in_three_processes(flow, templates, tmp_path, data):
    """Only the master has outputs and records. Here each has a place of its own for them; on a cluster it is one."""
    pod = make_pod(flow, templates, tmp_path / "pod", data, task="train_job", epochs=1)
    printed = [process.communicate(timeout=120)[0] for process in start_job(pod)]
    assert "Training on 317 images with 3 x cpu" in printed[0]
    assert not any("Training on" in text for text in printed[1:])
    assert len(pod.outputs(1)["accuracies"]) == 1
    assert sorted(path.parent.name for path in tmp_path.glob("pod/outputs-*/*.pb")) == ["outputs-1"]
    assert {path.relative_to(pod.folder).parts[0] for path in pod.folder.rglob("*.wandb")} == {"tmp-0", "files-1"}


def error_of(pod, attempt):
    """Return the error that an attempt left for Flyte."""
    from flyteidl.core.errors_pb2 import ErrorDocument

    path, = (pod.folder / f"outputs-{attempt}").glob("error*.pb")
    return ErrorDocument.FromString(path.read_bytes()).error


def test_what_is_worth_another_attempt(flow, templates, tmp_path, folder):
    """A lost process is; a damaged file is not."""
    pod = make_pod(flow, templates, tmp_path / "lost", folder, task="train_job")
    processes = start_job(pod, world=2, WANDB_MODE="disabled")
    for line in processes[0].stdout:
        if line.startswith("Epoch: 1 "):
            processes[1].kill()
            break
    for process in processes:
        process.communicate(timeout=120)
    error = error_of(pod, 1)
    assert error.kind == error.RECOVERABLE and "rank 0 of 2 lost the others" in error.message
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "t10k-labels-idx1-ubyte").write_bytes(b"torn")
    pod = make_pod(flow, templates, tmp_path / "torn", broken)
    pod.start(1, WANDB_MODE="disabled").communicate(timeout=120)
    error = error_of(pod, 1)
    assert error.kind == error.NON_RECOVERABLE and "is no whole MNIST file" in error.message


# On a cluster


def test_template(flow, templates):
    """A PyTorch task with a master and two workers, and what each asks for."""
    from flyte_tools import amounts, pytorch_job

    template = templates["train_job"]
    job = pytorch_job(template)
    assert template.type == "pytorch"
    assert (job.master_replicas.replicas, job.worker_replicas.replicas) == (1, 2)
    for replica in job.master_replicas, job.worker_replicas:
        assert amounts(replica.resources.requests) == {"CPU": "500m", "MEMORY": "1Gi"}
        assert amounts(replica.resources.limits) == {"CPU": "1", "MEMORY": "4Gi"}
    for name in "train", "train_elastic", "train_job", "validate":
        metadata = templates[name].metadata
        assert metadata.discoverable and metadata.retries.retries == 2
        assert metadata.discovery_version == flow.train.metadata.cache_version
        assert not templates[name].security_context.secrets
    assert amounts(templates["train_elastic"].container.resources.limits) == {"CPU": "2", "MEMORY": "8Gi"}
    assert templates["train"].container.image == "localhost:5000/tutorial/mnist:flyte"
    assert {entry.key: entry.value for entry in templates["train"].container.env}["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name, value", [("GPUS", "2"), ("GPUS", "-1"), ("WORKERS", "0")])
def test_settings_that_cannot_be(place, name, value):
    done = pyflyte("--pkgs", "flyte_mnist", "package", "--image", "a:1", "--output", place / "wrong.tgz",
                   **{f"FLYTE_MNIST_{name}": value})
    assert done.returncode and re.search(rf"ValueError: .*FLYTE_MNIST_{name}={value} (must be|at least)", done.stdout)
    assert not (place / "wrong.tgz").exists()


def test_template_with_gpus_and_a_secret(package):
    from flyte_tools import amounts, pods, pytorch_job, read_package

    templates = read_package(package("gpus.tgz", FLYTE_MNIST_GPUS="1", FLYTE_MNIST_WORKERS="5",
                                     FLYTE_MNIST_SECRET="1"))
    job = pytorch_job(templates["train_job"])
    assert job.worker_replicas.replicas == 5
    for replica in job.master_replicas, job.worker_replicas:
        assert amounts(replica.resources.requests)["GPU"] == amounts(replica.resources.limits)["GPU"] == "1"
    for name in "train", "train_elastic", "train_job", "validate":
        secret, = templates[name].security_context.secrets
        assert (secret.group, secret.key) == ("wandb", "api_key")
        assert templates[name].k8s_pod.pod_spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    resources = templates["train_elastic"].k8s_pod.pod_spec["containers"][0]["resources"]
    assert resources["requests"]["gpu"] == resources["limits"]["gpu"] == "2"  # one for each process
    rows = {row[0]: row for row in pods(templates).rows}
    assert "gpu 2" in rows["train_elastic"][3] and "gpu" not in rows["evaluate"][3]


# Weights & Biases


def test_records_agree_with_the_log(flow, data, values):
    from records import read_records
    from helpers import read_log

    result, printed = run(flow, data, values)
    records, log = read_records(result.records.path), read_log(printed)
    assert not records.online
    assert records.config == values.model_dump()
    epochs, losses = zip(*records.curve("loss"))
    assert [round(loss, 4) for loss in losses] == [loss for _, loss in log["losses"]]
    assert epochs == pytest.approx([epoch for epoch, _ in log["losses"]], abs=0.001)
    assert records.curve("accuracy") == list(zip([1, 2], result.accuracies))
    assert len(records.curve("test_loss")) == 2
    assert records.artifacts == [("mnist", "model", ["model.pt"])]
    assert records.system and "proc.memory.rssMB" in records.system[0][1]


def test_no_records_no_matter(flow, data, values, monkeypatch):
    """W&B is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    result, printed = run(flow, data, values)
    assert "Without records: ModuleNotFoundError: " in printed and len(result.accuracies) == 2
    from records import read_records
    from helpers import PageError

    with pytest.raises(PageError, match="holds no run of Weights & Biases"):
        read_records(result.records.path)


def found_in(folder, secret):
    """Return the files below a folder that hold a secret, as it is or in base64."""
    forms = [secret.encode(), base64.b64encode(secret.encode()), base64.b64encode(f"api:{secret}".encode())]
    return [path for path in Path(folder).rglob("*") if path.is_file()
            and any(form in path.read_bytes() for form in forms)]


@pytest.mark.parametrize("source", ["variable", "secret"])
def test_a_server_that_is_down_and_a_key_that_is_kept(templates, flow, tmp_path, tmp_path_factory, data, place, source):
    """In a pod, online: the training ends, the run is kept offline, and the key is in no file and no line."""
    home = tmp_path / "home"
    home.mkdir()
    pod = make_pod(flow, templates, tmp_path / "pod", data, epochs=1)
    given = {"WANDB_API_KEY": KEY}
    if source == "secret":  # Flyte mounts it as a file
        secret = tmp_path_factory.mktemp("secrets") / "wandb" / "api_key"
        secret.parent.mkdir()
        secret.write_text(KEY + "\n")
        given = {"FLYTE_SECRETS_DEFAULT_DIR": str(secret.parents[1])}
    with pod.start(1, **given, WANDB_BASE_URL="http://127.0.0.1:9", HOME=str(home), TMPDIR=str(home)) as process:
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    assert "Without a server for the records: CommError: " in printed and "accuracy=" in printed
    assert KEY not in printed
    from records import read_records

    assert len(read_records(pod.outputs(1)["records"].download()).curve("accuracy")) == 1
    for searched in tmp_path, place:
        assert not found_in(searched, KEY)
    (tmp_path / "leak").write_text(f"key: {KEY}")
    assert found_in(tmp_path, KEY) == [tmp_path / "leak"]  # the search can find it


def test_records_that_break_off(flow, templates, tmp_path, folder):
    """W&B's own processes are killed in the middle of the training."""
    pod = make_pod(flow, templates, tmp_path / "pod", folder, epochs=2)
    marker = secrets.token_hex(8)
    with pod.start(1, MARKER=marker) as process:
        for line in process.stdout:
            if line.startswith("Epoch: 1 "):
                services = [service for service in psutil.process_iter(["name"]) if "wandb" in service.info["name"]
                            and has(Path(f"/proc/{service.pid}/environ"), marker)]
                for service in services:
                    service.kill()
                break
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    assert services and "Without a record: " in printed and len(pod.outputs(1)["accuracies"]) == 2


# What the page uses


def test_backend(monkeypatch, tmp_path):
    """None configured; one that does not answer; one that does. (Any gRPC server will do to say that it is there.)"""
    import grpc
    from flyte_tools import here, no_backend
    from helpers import PageError

    monkeypatch.setenv("HOME", str(tmp_path))
    assert no_backend().startswith("no Flyte installation is configured")
    with pytest.raises(PageError, match="strict is set, .*: no Flyte installation"):
        here(no_backend(), strict=True)
    monkeypatch.setenv("FLYTE_PLATFORM_INSECURE", "true")
    monkeypatch.setenv("FLYTE_PLATFORM_URL", "127.0.0.1:9")
    assert no_backend(1) == "the Flyte installation 127.0.0.1:9 does not answer"
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("FLYTE_PLATFORM_URL", f"dns:///127.0.0.1:{port}")
    assert no_backend() == ""
    assert [row[1] for row in here("", strict=True).rows][-1] == f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_signals_are_put_back(flow, data, values):
    """torch's launcher leaves its own handlers."""
    from flyte_tools import signals_kept

    before = signal.getsignal(signal.SIGTERM)
    with signals_kept():
        run(flow, data, values, how="elastic")
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_left_running(flow, data, values):
    """Neither W&B's process nor Elastic's, once their parent has ended."""
    script = ("from flyte_mnist import *\nif __name__ == '__main__':\n"
              f"    pipeline(data_dir=FlyteDirectory({str(data)!r}), how=How.ELASTIC, "
              f"hyperparameters=Hyperparameters(**{values.model_dump()}))\n")
    marker = f"marker={secrets.token_hex(8)}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=PROJECT,
                          env={**os.environ, "MARKER": marker})
    assert done.returncode == 0, done.stderr
    time.sleep(1)
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if has(path, marker)]
    assert not left


def has(path, marker):
    try:
        return marker.encode() in path.read_bytes()
    except OSError:  # it has ended
        return False
