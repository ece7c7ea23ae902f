"""autoencoder.py: the network and its batches, what a training prints and records, how it resumes, what it refuses."""

import contextlib
import io
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.wandb_runs import read_run
from torch import nn

import autoencoder
import mnist
from tests.support import processes
from tests.support.data import distance, equal, make_data
from tests.support.network import found_in, has
from tests.support.processes import PROJECT, Run, environment, forkserver, free_port

CPU = ("--accelerator", "cpu")  # also on a machine with a GPU, whose sums are others
TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID")  # what it sets besides
WANDB = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "WANDB_BASE_URL", "WANDB_DATA_DIR")
LOSS = r"loss=\d+\.\d{4}"  # what is printed are these lines and no others:
LINES = re.compile(rf"Training on [12] x cpu|(Epoch: \d+ - train_{LOSS} )?val_{LOSS}|Trained in [\d.]+ s, \d+ images/s")
pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")  # wandb's sockets


@pytest.fixture(scope="module", autouse=True)
def wandb_folder(tmp_path_factory):
    """Where W&B keeps things; no account, no launcher; one thread, for results equal to the last bit."""
    folder, threads = tmp_path_factory.mktemp("wandb"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in (*processes.VARIABLES, *TORCHRUN, *WANDB):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_DATA_DIR", "set by the training")  # and here, so that it is taken back
        for name in "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR":
            patch.setenv(name, str(folder))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def no_wandb(monkeypatch):
    """W&B switched off, which saves half a second."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of data with 25 images for validation, which two processes cannot share evenly, and 275 others."""
    return make_data(tmp_path_factory.mktemp("uneven"), train=300)


@pytest.fixture(scope="module")
def finished(uneven, tmp_path_factory):
    """A run of three epochs in this process: results, out, model and loss."""
    results, before = tmp_path_factory.mktemp("finished"), signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        model, loss = train(uneven, results, epochs=3)
    assert signal.getsignal(signal.SIGTERM) == before
    return SimpleNamespace(results=results, out=out.getvalue(), model=model, loss=loss)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of its results."""
    return Path(shutil.copytree(finished.results, tmp_path / "copy"))


def train(data, results, **options):
    """Train in this process; return the model and the loss of the validation images."""
    return autoencoder.train(data, results, accelerator="cpu", **{"epochs": 1, "batch_size": 4, **options})


def call(*argv):
    """Run the command line in this process; return its exit status."""
    try:
        autoencoder.main([*CPU, *map(str, argv)])
    except SystemExit as end:
        return end.code
    return 0


def checkpoint(results):
    return torch.load(results / "last.ckpt", weights_only=True)


def weights(results):
    return checkpoint(results)["state_dict"]


def epochs(out):
    """Return the numbers of the epochs in what was printed."""
    return [int(number) for number in re.findall(r"^Epoch: (\d+) ", out, re.M)]


def losses(out, name):
    """Return the losses with this name after each epoch in what was printed."""
    return [float(loss) for loss in re.findall(rf"^Epoch: .* {name}=(\S+)", out, re.M)]


@pytest.mark.parametrize("options, n", [({}, 3), ({"latent": 16}, 16)])
def test_network(options, n):
    model = autoencoder.Autoencoder(**options)
    shapes = [[tuple(values.shape) for values in part.parameters()] for part in (model.encoder, model.decoder)]
    assert shapes == [[(64, 784), (64,), (n, 64), (n,)], [(64, n), (64,), (784, 64), (784,)]]
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 1, 2], images[1] = 51, 255
    pixels = autoencoder.pixels(images)
    assert pixels.shape == (2, 784) and pixels.dtype == torch.float32 and pixels[0].count_nonzero() == 1
    assert pixels[0, 30] == pytest.approx(0.2) and (pixels[1] == 1).all()
    assert model.encode(images).shape == (2, n)
    assert torch.equal(model(images), model.decoder(model.encode(images)))


def rows(images):
    """Return images as a list of bytes."""
    return [row.tobytes() for row in images.numpy()]


def test_each_process_has_its_share_of_every_batch(uneven):
    """Together they are the batches of one process, in an order that differs by epoch; all images of the validation."""

    def batches(world, epoch=0):
        every = []
        for rank in range(world):
            images = autoencoder.Images(uneven, batch_size=8)
            images.trainer = SimpleNamespace(world_size=world, global_rank=rank, current_epoch=epoch)
            every.append([rows(share) for share in images.train_dataloader()])
            validation.extend(row for share in images.val_dataloader() for row in rows(share))
        return [sorted(itertools.chain(*shares)) for shares in zip(*every, strict=True)]

    images = autoencoder.Images(uneven)
    assert (len(images.train), len(images.validation)) == (275, 25)
    assert sorted(rows(images.train) + rows(images.validation)) == sorted(rows(mnist.load(uneven, "train")[0]))
    for world in 1, 2, 4:
        validation = []
        assert batches(world) == batches(1) and all(len(batch) == 8 for batch in batches(1))
        assert set(validation) == set(rows(images.validation))
    seen = [row for batch in batches(1) for row in batch]
    assert len(set(seen)) == len(seen) == 272 and batches(1, epoch=1) != batches(1)


def test_log(finished):
    out = finished.out
    assert all(map(LINES.fullmatch, out.splitlines())) and out.startswith("Training on 1 x cpu\n")
    assert epochs(out) == [1, 2, 3]
    assert all(losses(out, name) == sorted(set(losses(out, name)))[::-1] for name in ("train_loss", "val_loss"))
    assert out.splitlines()[-1] == f"val_loss={losses(out, 'val_loss')[-1]:.4f}"
    assert sorted(os.listdir(finished.results)) == ["last.ckpt", "wandb"]


def test_recorded_run(finished):
    run = read_run(finished.results)
    assert run.config["lr"] == 0.001 and run.config["seed"] == 1
    assert len(run.curve("train_loss_step", "trainer/global_step")) == 204 // 50
    for name in "train_loss", "val_loss":
        assert [round(value, 4) for _, value in run.curve(name)] == losses(finished.out, name)
    assert [(kind, files) for _, kind, files in run.artifacts] == [("model", ["model.ckpt"])]


def test_seed_learning_rate_share_and_latent(uneven, tmp_path, no_wandb):
    options = dict(one={}, again={}, seed=dict(seed=2), lr=dict(lr=0.002), two=dict(latent=2, limit_train_batches=0.5))
    for name, changed in options.items():
        train(uneven, tmp_path / name, **changed)
    one, again, *others = (weights(tmp_path / name) for name in options)
    assert equal(one, again) and not any(equal(one, other) for other in others)
    assert checkpoint(tmp_path / "two")["global_step"] == 34
    assert os.listdir(tmp_path / "one" / "wandb") == [], "nothing is recorded"
    model = autoencoder.Autoencoder.load_from_checkpoint(tmp_path / "two" / "last.ckpt")  # which knows the number
    assert model.hparams.latent == 2 and equal(model.state_dict(), weights(tmp_path / "two"))


def resumes_exactly(results, data, **options):
    """Resume for one epoch more; compare with a run that was never interrupted; return the epochs done before."""
    done = checkpoint(results)["epoch"] + 1
    _, loss = train(data, results, epochs=done + 1, resume=True, **options)
    _, expected = train(data, results.with_name("unbroken"), epochs=done + 1, **options)
    assert loss == expected and equal(weights(results), weights(results.with_name("unbroken")))
    return done


def test_finished_run_and_more_epochs(copy, finished, uneven, no_wandb, capfd):
    """Started again, it says the same and trains nothing; with more epochs, it continues."""
    before = (copy / "last.ckpt").read_bytes()
    _, again = train(uneven, copy, epochs=3, resume=True)
    assert capfd.readouterr().out.splitlines()[-1] == finished.out.splitlines()[-1]
    assert again == finished.loss and (copy / "last.ckpt").read_bytes() == before
    assert resumes_exactly(copy, uneven) == 3
    assert epochs(capfd.readouterr().out) == [4, 1, 2, 3, 4]


def prepare(ordinary_user=False):
    """Make a new process what the command would be; what is imported already has read no launcher's variables."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    sys.argv[0] = "autoencoder.py"
    rank_zero_only.rank = int(os.environ.get("RANK", 0))
    warnings.filterwarnings("ignore", ".*unclosed", ResourceWarning)
    if ordinary_user:
        processes.drop_capabilities()


@pytest.fixture(scope="module")
def start(wandb_folder):
    """Start autoencoder.py with arguments in a process of its own, in a folder; W&B without an account."""
    # Importing Lightning takes seconds: once for all of them, unless other tests have started the server already.
    forkserver.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "lightning.pytorch", "wandb"])
    ours = dict(WANDB_CACHE_DIR=wandb_folder, WANDB_CONFIG_DIR=wandb_folder, WANDB_MODE="offline", OMP_NUM_THREADS=1)

    def start(folder, *argv, setup=prepare, **variables):
        variables = {**ours, "WANDB_API_KEY": "", **variables}
        return Run(folder, *CPU, "--batch-size", 4, *argv, target=autoencoder.main, setup=setup, **variables)

    return start


@pytest.fixture
def start_two(start, tmp_path):
    """Start two processes as torchrun does on one machine or two, each in a folder named as its rank."""

    def start_two(*argv, machines=2, results="results", **variables):
        shared = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2 // machines, GROUP_WORLD_SIZE=machines, **variables)
        shared |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), TORCHELASTIC_RUN_ID="none")
        argv = ("--results", results, *argv)
        local = (0, 1) if machines == 1 else (0, 0)
        return [start(tmp_path / str(rank), *argv, RANK=rank, LOCAL_RANK=local[rank], **shared) for rank in range(2)]

    return start_two


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_killed_and_resumed(number, status, start, uneven, tmp_path, no_wandb):
    results = tmp_path / "results"
    run = start(tmp_path, "--data", uneven, "--results", results, "--epochs", 1000).until("Epoch: 3 ", 120)
    os.kill(run.process.pid, number)
    assert (run.end(60), run.err) == (status, "") and all(map(LINES.fullmatch, run.out.splitlines()))
    if number == signal.SIGTERM:
        assert len(read_run(results).curve("train_loss")) >= 2, "what was recorded is kept"
    assert resumes_exactly(results, uneven) >= 2


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_by_torchrun(start_two, uneven, tmp_path, no_wandb):
    """SIGTERM to the first ends both. The resumed run comes to the losses and weights of one process."""
    marker, results = secrets.token_hex(8), tmp_path / "results"
    argv = (*CPU, "--devices", 2, "--data", uneven, "--batch-size", 4, "--results", results, "--epochs", 1000)
    command = [sys.executable, PROJECT / "autoencoder.py", *argv]
    options = dict(env=environment(MARKER=marker, WANDB_MODE="offline"), text=True, stdout=subprocess.PIPE)
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, **options) as process:
        assert any("Epoch: 2 " in line for line in process.stdout)
        process.terminate()
        assert process.wait(60) == 143, process.stderr.read()
        assert "Traceback" not in process.stderr.read()
    end = time.monotonic() + 30
    while any(has(path, marker) for path in Path("/proc").glob("[0-9]*/environ")):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.1)
    done = checkpoint(results)["epoch"] + 1
    runs = start_two("--data", uneven, "--epochs", done + 2, "--resume", machines=1, results=results)
    assert [run.end(120) for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert runs[1].out == "" and runs[0].out.startswith("Training on 2 x cpu\n")
    assert epochs(runs[0].out) == [done + 1, done + 2] and all(map(LINES.fullmatch, runs[0].out.splitlines()))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(uneven, tmp_path / "unbroken", epochs=done + 2)
    # Sums of float32 taken in another order: measured 4e-7 to 1.4e-5; images in another order: 0.07.
    assert distance(weights(results), weights(tmp_path / "unbroken")) < 1e-3
    for name in "train_loss", "val_loss":
        assert losses(runs[0].out, name) == pytest.approx(losses(out.getvalue(), name)[-2:], abs=1.1e-4)
        assert len(read_run(results).curve(name)) == 2, "of one run, with losses of all processes"


@pytest.mark.slow
def test_no_thread_of_gloo_is_left_at_the_exit(uneven, tmp_path):
    """See the test of the same name for mnist.py."""
    argv = (*CPU, "--data", uneven, "--epochs", 1, "--batch-size", 8, "--results", tmp_path / "results")
    torchrun = dict(LOCAL_WORLD_SIZE="1", GROUP_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none", WANDB_MODE="disabled")
    ends = processes.at_exit(PROJECT / "autoencoder.py", *argv, **torchrun)
    assert [end for end, _ in ends] == [0, 0]
    assert not [name for _, threads in ends for name in threads if "gloo" in name]


@pytest.mark.slow
def test_only_one_machine_has_the_checkpoint(start_two, uneven, copy, tmp_path):
    shutil.copytree(copy, tmp_path / "1" / "results")
    runs = start_two("--data", uneven, "--epochs", 4, "--resume", WANDB_MODE="disabled")
    message = r"autoencoder.py: only some machines have results/last.ckpt: --results must be a folder that they share\n"
    assert all(run.end(120) == 1 and run.out == "" and re.search(message, run.err) for run in runs)


@pytest.mark.slow
def test_one_of_two_machines_is_lost(start_two, uneven):
    runs = start_two("--data", uneven, "--epochs", 1000, WANDB_MODE="disabled")
    runs[0].until("Epoch: 1 ", 120)
    runs[1].process.kill()
    assert runs[0].end(60) == 1 and "peer" in runs[0].err


@pytest.fixture
def refused(no_wandb, monkeypatch, capfd):
    """Run with arguments that end with a status and one line; return that line. No process is started for it."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("has started a process"))
    monkeypatch.setattr(sys, "argv", ["autoencoder.py"])  # as it is in the usage

    def refused(status, data, results, *argv):
        assert call("--data", data, "--results", results, "--batch-size", 4, "--epochs", 1, *argv) == status
        out, err = capfd.readouterr()
        *usage, message = err.splitlines()
        assert out == "" and message.startswith("autoencoder.py: ") and bool(usage) == (status == 2)
        return message

    return refused


WRONG = [
    (2, "--epochs 0", "at least 1"), (2, "--batch-size 0", "at least 1"), (2, "--lr -1", "above 0"),
    (2, "--latent 0", "--latent must be at least 1"), (2, "--seed lucky", "--seed: invalid int"),
    (2, "--limit-train-batches 0", "above 0"), (2, "--epoch 1", "unrecognized arguments: --epoch 1"),
    (1, "--devices 0", "devices='0'"), (1, "--limit-train-batches 1.5", "invalid value 1.5"),
    (1, "--batch-size 276", "1 processes cannot share batches of 276 images"),
    (1, "--batch-size 3 --devices 2", "2 processes cannot share batches of 3 images"),
    (1, "--results /dev/null/below", "Not a directory: '/dev/null/below"),
    (1, "--data nowhere", "train-images-idx3-ubyte[.gz] is not in nowhere")]  # fmt: skip


@pytest.mark.parametrize("status, flags, message", WRONG)
def test_wrong_values(status, flags, message, refused, uneven, tmp_path):
    assert message in refused(status, uneven, tmp_path / "results", *flags.split())
    assert not (tmp_path / "results").exists()


def test_checkpoints_that_are_refused(refused, copy, uneven, tmp_path, monkeypatch):
    """Another run's, by values, by data of the same size or by the network; a damaged one; any without --resume."""
    assert f"{copy}/last.ckpt is there already: continue it with --resume" in refused(1, uneven, copy)
    for name, value, other in ("lr", 0.001, 0.01), ("latent", 3, 2):
        message = refused(1, uneven, copy, "--resume", f"--{name}", other)
        assert f"'{name}': {value}" in message and f"'{name}': {other}" in message
    for change in (autoencoder, "load", lambda *which: (mnist.load(*which)[0].flip(3), None)), (nn, "ReLU", nn.Tanh):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            assert f"{copy}/last.ckpt was made with" in refused(1, uneven, copy, "--resume")
    old = checkpoint(copy)
    del old["config"]["latent"]  # as it was before there was the flag
    torch.save(old, copy / "last.ckpt")
    old, new = refused(1, uneven, copy, "--resume").split(" was made with ")[1].split(", not ")
    assert "latent" not in old and "'latent': 3" in new and new.endswith("move it away")
    (copy / "last.ckpt").write_bytes((copy / "last.ckpt").read_bytes()[:100_000])
    assert f"{copy}/last.ckpt is not a valid checkpoint" in refused(1, uneven, copy, "--resume")


def test_an_error_inside_the_training_is_no_wrong_usage(uneven, tmp_path, no_wandb, monkeypatch):
    monkeypatch.setattr(autoencoder, "pixels", lambda images: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        call("--data", uneven, "--results", tmp_path)


@pytest.mark.slow
def test_a_server_that_is_down_and_a_key_that_is_kept(uneven, tmp_path, wandb_folder, monkeypatch, capfd):
    """The training ends well, its run is recorded in the folder, and the key is in no file and no line."""
    key = secrets.token_hex(20)  # the form of W&B's keys
    server = f"http://127.0.0.1:{free_port()}"
    for name, value in {"WANDB_API_KEY": key, "WANDB_BASE_URL": server, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert call("--data", uneven, "--results", tmp_path / "results", "--epochs", 1, "--batch-size", 4) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Weights & Biases is offline: ") and epochs(out) == [1] and "Traceback" not in err
    assert len(read_run(tmp_path / "results").curve("val_loss")) == 1
    assert key not in out + err and not found_in(tmp_path, key) and not found_in(wandb_folder, key)


@pytest.mark.slow
def test_folders_that_cannot_be_written(start, uneven, tmp_path):
    """A home, or W&B's folder, does not matter; the results do, at once."""
    (home := tmp_path / "home").mkdir(mode=0o555)
    variables, argv = dict(HOME=home, WANDB_DATA_DIR=home / "w", WANDB_CACHE_DIR=home / "c"), ("--data", uneven)
    variables["setup"] = partial(prepare, ordinary_user=True)
    tmp_path.chmod(0o777)
    run = start(tmp_path / "one", *argv, "--epochs", 1, **variables)
    assert run.end(120) == 0 and len(read_run(tmp_path / "one" / "results").artifacts) == 1, run.err
    (tmp_path / "two" / "results").mkdir(parents=True, mode=0o555)
    run = start(tmp_path / "two", *argv, **variables)
    assert (run.end(120), run.out) == (1, "")
    assert run.err == "autoencoder.py: [Errno 13] Permission denied: 'results/wandb'\n"
