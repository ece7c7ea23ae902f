"""flyte_mnist.py: its tasks and workflows on this machine, attempts after a crash, and Weights & Biases."""

import contextlib
import io
import re
import runpy
import secrets
import shlex
import shutil
from pathlib import Path

import psutil
import pytest
import torch

import mnist
from tests.support.data import equal, make_data, weights
from tests.support.flyte import PROJECT, pyflyte
from tests.support.network import found_in, has
from tests.support.processes import free_port

KEY = secrets.token_hex(20)  # the form of W&B's keys; new each time
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of flytekit, wandb and what they import
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # flytekit's files and folders, wandb's sockets
]


def run(flow, folder, hyperparameters):
    """Run the pipeline; return its result and what was printed."""
    from flytekit.types.directory import FlyteDirectory

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = flow.pipeline(data_dir=FlyteDirectory(str(folder)), hyperparameters=hyperparameters)
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def single(flow, data):
    """A run of the pipeline with no default value: its hyperparameters, result and log."""
    values = flow.Hyperparameters(
        batch_size=32, test_batch_size=7, epochs=2, learning_rate=0.03, sgd_momentum=0.5,
        seed=secrets.randbelow(2**40), log_interval=3, validation=100)  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, as in the test with one_process
    yield values, *run(flow, data, values)
    torch.set_num_threads(threads)


def test_wrong_values_are_rejected_by_name(flow):
    wrong = dict(batch_size=0, epochs=1.5, learning_rate=0, sgd_momentum=1, seed=2**63, validation=-1, epoch=1)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"Hyperparameters\n{name}\n"):
            flow.Hyperparameters(**{name: value})
    with pytest.raises(ValueError, match=r"Trial\nvalidation\n"):  # a sweep must not choose by the test set
        flow.Trial(validation=0)


def test_the_workflow_trains_what_the_trainer_trains(single, data, one_process, tmp_path, capsys, monkeypatch):
    """The same log, the same weights; all values reach the trainer."""
    values, result, printed = single
    sizes, test = [], mnist.test  # the size of the test's batches shows nowhere else
    monkeypatch.setattr(mnist, "test", lambda *arguments: sizes.append(arguments[3]) or test(*arguments))
    arguments = dict(batch_size=32, test_batch_size=7, epochs=2, lr=0.03, momentum=0.5, log_interval=3, validation=100)
    mnist.train(data, seed=values.seed, save_model=tmp_path / "model.pt", **arguments)
    lines = re.compile("^(?:Training|Epoch).*", re.MULTILINE)
    assert lines.findall(printed) == lines.findall(capsys.readouterr().out) != []
    assert equal(weights(result.model.path), weights(tmp_path / "model.pt"))
    assert values.model_dump(by_alias=True) == {**arguments, "seed": values.seed} and sizes == [7, 7]
    labels = mnist.load(data, "t10k")[1]
    assert [sum(row) for row in result.confusion] == labels.bincount(minlength=10).tolist()
    assert sum(result.confusion[digit][digit] for digit in range(10)) == result.accuracy * len(labels)


def test_damaged_data_end_the_workflow_at_once(flow, data, tmp_path):
    path = Path(shutil.copytree(data, tmp_path / "broken")) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(mnist.TrainingError, match="t10k-labels-idx1-ubyte.gz is not a readable MNIST file"):
        run(flow, tmp_path / "broken", flow.Hyperparameters(epochs=1))


def test_sweep(flow, data, monkeypatch):
    """The order is that of the trials, each trains with its own values, and the test set cannot be read."""
    from flytekit.types.directory import FlyteDirectory

    monkeypatch.setenv("WANDB_MODE", "disabled")
    values = dict(epochs=1, batch_size=32, validation=100, seed=secrets.randbelow(2**40))
    trials = [flow.Trial(learning_rate=rate, **values) for rate in (0.02, 1e-9)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        accuracies = flow.sweep(data_dir=FlyteDirectory(str(data)), trials=trials)
    logged = re.findall(r" accuracy=(\S+)$", printed.getvalue(), re.MULTILINE)
    assert [f"{accuracy:.4f}" for accuracy in accuracies] == logged and len(logged) == 2
    assert printed.getvalue().count("Training on 217 images") == 2 and "test_loss" not in printed.getvalue()
    assert len(set(re.findall(r"train_loss=(\S+)", printed.getvalue()))) == 2


def test_the_command_of_the_docstring_with_two_processes(flow, data, flyte_folder):
    """As many as Elastic asks for, really; the log and the W&B run are those of one, and no process stays behind."""
    command = shlex.split(re.search(r"pyflyte (run flyte_mnist.*)", flow.__doc__)[1])
    command = [data if part == "data/MNIST/raw" else part for part in command]
    marker = f"marker={secrets.token_hex(8)}"
    done = pyflyte(*command, "--launcher", "elastic", HOME=str(flyte_folder / "home"), MARKER=marker)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Training on 317 images with 2 x cpu") == 1
    (logged,) = re.findall(r" accuracy=(\S+)$", done.stdout, re.MULTILINE)
    accuracy, folder = re.search(r"accuracies=\[(\S+)\].*wandb_run=(\S+)\)", done.stdout).groups()
    assert f"{float(accuracy):.4f}" == logged and len(list(Path(folder).glob("wandb/*run-*"))) == 1
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if has(path, marker)]


@pytest.mark.parametrize("changed", ["", "mnist.py", "flyte_mnist.py"])
def test_a_changed_file_makes_another_version(flow, tmp_path, monkeypatch, changed):
    for name in "mnist.py", "flyte_mnist.py":
        (tmp_path / name).write_text((PROJECT / name).read_text() + "# changed\n" * (name == changed))
    monkeypatch.setattr(mnist, "__file__", str(tmp_path / "mnist.py"))
    module = runpy.run_path(str(tmp_path / "flyte_mnist.py"))
    assert (module["CACHED"]["cache_version"] != flow.train.metadata.cache_version) == bool(changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data for a training that lasts long enough to be stopped in the middle."""
    return make_data(tmp_path_factory.mktemp("more"), train=6000, test=500, gz=False)


@pytest.fixture
def uninterrupted(folder, one_process, tmp_path):
    """The accuracies and weights of a training that nobody stopped."""
    _, accuracies = mnist.train(folder, epochs=2, batch_size=64, lr=0.01, save_model=tmp_path / "uninterrupted.pt")
    return accuracies, weights(tmp_path / "uninterrupted.pt")


def make_pod(flow, templates, target, task, folder):
    from flytekit.types.directory import FlyteDirectory
    from support.flyte_tools import Pod

    data = FlyteDirectory(str(folder), remote_directory=False)  # not copied
    values = flow.Hyperparameters(epochs=2, batch_size=64, log_interval=30, learning_rate=0.01)
    return Pod(templates[task], target, getattr(flow, task), data=data, hyperparameters=values)


def follow(process, actions=()):
    """Return the output of a process to its end; actions: pairs of how a line starts and what to call then."""
    printed = ""
    for line in process.stdout:
        printed += line
        for start, action in actions:
            if line.startswith(start):
                action()
    process.wait()
    return printed


def error_of(pod, number):
    """Return the error that an attempt left for Flyte: whether another attempt may follow, and the message."""
    from flyteidl.core.errors_pb2 import ErrorDocument

    (path,) = (pod.folder / f"outputs-{number}").glob("error*.pb")
    error = ErrorDocument.FromString(path.read_bytes()).error
    return error.kind == error.RECOVERABLE, error.message


@pytest.mark.parametrize("stops", [["Epoch: 2 ", "Training on"], ["Epoch: 1 ( 31.9%)"]], ids=["kill", "terminate"])
def test_attempts(flow, templates, tmp_path, folder, uninterrupted, stops):
    """Killed after an epoch, and again before anything new was saved; or told to stop within an epoch: the last attempt
    ends as if it were the only one. A checkpoint of other data is refused."""
    data = shutil.copytree(folder, tmp_path / "data")
    pod = make_pod(flow, templates, tmp_path / "pod", "train", data)
    for number, line in enumerate(stops, 1):
        process = pod.start(number, WANDB_MODE="disabled")
        follow(process, [(line, process.kill if len(stops) == 2 else process.terminate)])
        assert process.returncode and not (pod.folder / f"outputs-{number}/outputs.pb").exists()
    last = len(stops) + 1
    printed = follow(pod.start(last, WANDB_MODE="disabled"))
    epochs, steps = map(int, re.search(r"Resuming from .*: (\d+) epochs and (\d+) steps are done", printed).groups())
    assert (epochs, steps) == (1, 0) if len(stops) == 2 else epochs == 0 and 30 <= steps < 94
    assert "Without" not in printed and not list(pod.folder.rglob("*.wandb"))  # W&B was disabled
    outputs, (accuracies, model) = pod.outputs(last), uninterrupted
    assert outputs["accuracies"] == accuracies and equal(weights(outputs["model"].download()), model)
    if len(stops) == 2:
        labels = data / "train-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:-1] + b"\0")
        follow(pod.start(last + 1, WANDB_MODE="disabled"))
        recoverable, message = error_of(pod, last + 1)
        assert not recoverable and "checkpoint.pt was made with" in message


def test_a_job_that_loses_wandb_and_then_a_process(flow, templates, tmp_path, folder):
    """W&B's own process is killed, which stops nothing; a lost worker is worth another attempt."""
    pod = make_pod(flow, templates, tmp_path / "pod", "train_job", folder)
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in "01":
        (tmp_path / rank).mkdir()
    worker = pod.start(2, RANK="1", TMPDIR=str(tmp_path / "1"), **job)
    master = pod.start(1, RANK="0", TMPDIR=str(tmp_path / "0"), **job)

    def kill_wandb():
        children = [child for child in psutil.Process(master.pid).children(recursive=True) if "wandb" in child.name()]
        assert children
        for child in children:
            child.kill()

    printed = follow(master, [("Epoch: 1 ( 31.9%)", kill_wandb), ("Epoch: 2 ( 31.9%)", worker.kill)])
    assert "with 2 x cpu" in printed and "Training on" not in follow(worker)
    assert "Without a line in the W&B run: " in printed and "accuracy=" in printed
    assert not list((tmp_path / "1").rglob("*.wandb"))  # it is the master's alone
    recoverable, message = error_of(pod, 1)
    assert recoverable and "FlyteRecoverableException" in message


@pytest.mark.parametrize("variables, warning", [
    ({"WANDB_API_KEY": f"{KEY}\n", "WANDB_BASE_URL": "http://127.0.0.1:9\n"}, "Without W&B online: CommError: "),
    ({"_FSEC_WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "Without W&B online: CommError: "),
    ({"WANDB_MODE": "offline\n"}, ""),
    ({"WANDB_MODE": "of line", "WANDB_API_KEY": KEY}, "Without W&B of line: ValidationError: "),
    ({"WANDB_INIT_TIMEOUT": "soon"}, "Without W&B offline: ValidationError: ")])  # fmt: skip
def test_no_server_or_odd_variables(flow, data, flyte_folder, monkeypatch, capfd, variables, warning):
    """The run is kept offline, one line says why, and the key (or a secret of Flyte) is in no file and no line."""
    from support.wandb_runs import read_run

    monkeypatch.setitem(flow.WANDB, "init_timeout", 2)
    for name, value in ({"WANDB_MODE": ""} | variables).items():
        monkeypatch.setenv(name, value)
    result, printed = run(flow, data, flow.Hyperparameters(epochs=1, seed=secrets.randbelow(2**40)))
    assert printed.startswith(warning) and printed.count("Without") == bool(warning)
    wandb_run = read_run(result.wandb_run.path)
    assert wandb_run.curve("accuracy") == [(1, result.accuracies[0])]
    assert wandb_run.artifacts == [("mnist", "model", ["model.pt"])]
    assert KEY not in printed + "".join(capfd.readouterr()) and not found_in(flyte_folder, KEY)
