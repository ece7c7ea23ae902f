"""autoencoder.py: the network and its batches, what a training returns, logs and writes, in one process and in several,
killed, stopped and gone on with, and what it refuses."""
import contextlib
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_flyte import found_in, has
from trainer import (ROOT, TRAIN, VARIABLES, Run, at_exit, distance, environment, equal, forkserver, free_port,
                     make_data, powerless, write_split)

import autoencoder
import mnist

sys.path[:0] = [str(ROOT / "notebooks")]
CPU = ("--accelerator", "cpu")  # also on a machine with a GPU, whose sums are others
LONG = ("--epochs", 10, "--batch-size", 4)  # 72 steps an epoch of the small data, about 0.1 s: time to stop it
TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID")  # what it sets besides
LINES = re.compile(
    r"Training on [12] x cpu|"
    r"Epoch: \d+ - train_loss=\d+\.\d{4} val_loss=\d+\.\d{4}|"
    r"Told to stop after \d+ epochs; --resume goes on from there|"
    r"Trained in \d+\.\d s, \d+ images/s|"
    r"val_loss=\d+\.\d{4}")  # what is printed are these lines and no others
MOVED = "The dirpath has changed"  # Lightning, of results that were moved or copied
MNIST_DIR = os.environ.get("MNIST_DIR")
real_mnist = pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR, the folder of the real MNIST files, is not set")
pytestmark = [
    # Of libraries that we cannot change:
    pytest.mark.filterwarnings(f"ignore:{MOVED}"),
    pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning"),  # wandb's sockets
]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Where W&B keeps things; no account, no launcher; one thread, for results equal to the last bit."""
    folder = tmp_path_factory.mktemp("wandb")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": folder, "WANDB_CONFIG_DIR": folder,
                            "DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false"}.items():
            patch.setenv(name, str(value))
        for name in (*VARIABLES, *TORCHRUN, "WANDB_API_KEY", "WANDB_MODE", "WANDB_SERVICE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def no_records(monkeypatch):
    """W&B switched off, which saves half a second."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of data with 25 images for validation, which two processes cannot share evenly, and 275 others."""
    return make_data(tmp_path_factory.mktemp("odd"), train=300)


def train(data, results, **options):
    """Train in this process; return the model and the loss of the validation images."""
    return autoencoder.train(data, results, accelerator="cpu", **{"epochs": 1, "batch_size": 4, **options})


def call(*argv):
    """Run the command line in this process; return its exit status."""
    try:
        autoencoder.main(list(map(str, argv)))
    except SystemExit as end:
        return end.code
    return 0


def checkpoint(results):
    return torch.load(Path(results, "last.ckpt"), weights_only=True)


def weights(results):
    return checkpoint(results)["state_dict"]


def epochs(out):
    """Return the numbers of the epochs in what was printed."""
    return [int(number) for number in re.findall(r"^Epoch: (\d+) ", out, re.M)]


def losses(out, name):
    """Return the losses with this name after each epoch in what was printed."""
    return [float(loss) for loss in re.findall(rf"^Epoch: .* {name}=(\S+)", out, re.M)]


def squared_error(model, images):
    """Return the mean squared error of uint8 images by the definition, in float64."""
    with torch.no_grad():
        return (model(images).double() - images.flatten(1) / 255).square().mean().item()


def validation(data, seed=1):
    return autoencoder.Images(data, seed=seed).validation


# The network


def test_network():
    model = autoencoder.Autoencoder()
    shapes = [[tuple(values.shape) for values in part.parameters()] for part in (model.encoder, model.decoder)]
    assert shapes == [[(64, 784), (64,), (3, 64), (3,)], [(64, 3), (64,), (784, 64), (784,)]]
    assert sum(values.numel() for values in model.parameters()) == 101_651
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    assert model.encode(images).shape == (5, 3) and model(images).shape == (5, 784)
    assert torch.equal(model(images), model.decoder(model.encode(images)))
    hidden, latent = model.encoder[:2](torch.rand(100, 784) - 0.5), model.encoder(torch.rand(100, 784))
    assert hidden.min() == 0 and latent.min() < 0, "the hidden layer is rectified, the latent numbers are not"


def test_pixels():
    """From 0 for black to 1 for white, row by row."""
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 1, 2], images[1] = 51, 255
    pixels = autoencoder.pixels(images)
    assert pixels.shape == (2, 784) and pixels.dtype == torch.float32
    assert pixels[0, 30] == pytest.approx(0.2) and pixels[0].count_nonzero() == 1
    assert (pixels[1] == 1).all()


# Which images


def numbered(folder, count):
    """Write training images whose first three pixels are their number in base 256, and any test images."""
    images = np.zeros((count, 28, 28), np.uint8)
    for place in range(3):
        images[:, 0, place] = np.arange(count) >> 8 * place
    folder.mkdir()
    write_split(folder, "train", images, np.zeros(count), gz=False)
    return folder


def numbers(images):
    return (images[:, 0, 0, :3].long() * torch.tensor([1, 256, 65536])).sum(1).tolist()


@pytest.mark.parametrize("count, held_out", [(60_000, 5_000), (317, 26), (24, 2)])
def test_one_in_twelve_is_for_validation(count, held_out, tmp_path):
    data = numbered(tmp_path / "data", count)
    images = autoencoder.Images(data, seed=1)
    ours, others = numbers(images.train), numbers(images.validation)
    assert len(others) == held_out and sorted(ours + others) == list(range(count))
    again, another = autoencoder.Images(data, seed=1), autoencoder.Images(data, seed=2)
    assert (numbers(again.train), numbers(again.validation)) == (ours, others)
    assert set(numbers(another.validation)) != set(others)


@real_mnist
def test_split_of_real_mnist():
    images = autoencoder.Images(MNIST_DIR)
    assert images.train.shape == (55_000, 1, 28, 28) and images.validation.shape == (5_000, 1, 28, 28)


def shares(world, epoch=0, images=291, batch_size=8, seed=1):
    """Return each process's share of each batch of an epoch: [process][batch][index]."""
    every = []
    for rank in range(world):
        sampler = autoencoder.Shares(images, batch_size, rank, world, seed)
        sampler.set_epoch(epoch)
        every.append([share.tolist() for share in sampler])
        assert len(sampler) == len(every[-1])
    return every


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shares_of_a_batch(world):
    """Together they are the batch of one process, whatever their number."""
    whole, = shares(1)
    assert [len(batch) for batch in whole] == [8] * 36
    assert len({index for batch in whole for index in batch}) == 288 and max(map(max, whole)) < 291
    for batch, *parts in zip(whole, *shares(world), strict=True):
        assert [len(part) for part in parts] == [8 // world] * world
        assert sorted(sum(parts, [])) == sorted(batch)


def test_shares_by_epoch_and_seed():
    assert shares(2, epoch=3) == shares(2, epoch=3)
    orders = [sum(shares(1, epoch, seed=seed)[0], []) for epoch, seed in ((0, 1), (1, 1), (2, 1), (0, 2), (1, 2))]
    assert len(set(map(tuple, orders))) == 5
    assert len({index for order in orders for index in order}) == 291, "none is left out in every epoch"


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("images", [4, 25, 26, 999, 1000, 1001, 1013, 2000, 5000])
def test_shares_without_a_seed(images, world):
    """Every image once, in batches as large as allowed or almost, and something to do for each process in each."""
    parts = shares(world, images=images, batch_size=1000, seed=None)
    assert sorted(index for part in parts for share in part for index in share) == list(range(images))
    sizes = [sum(map(len, batch)) for batch in zip(*parts, strict=True)]
    assert len(sizes) == -(-images // 1000) and max(sizes) <= 1000
    assert min(len(share) for part in parts for share in part) > 0, "the mean of nothing is no number"


def test_a_training_sees_every_image_once_an_epoch_in_another_order(data, tmp_path, no_records, monkeypatch):
    """Of the training images, and none of the others. 3 is a batch size that divides their number, 291."""
    seen = []

    class Autoencoder(autoencoder.Autoencoder):
        def training_step(self, images):
            seen.extend(map(bytes, images.flatten(1)))
            return super().training_step(images)
    monkeypatch.setattr(autoencoder, "Autoencoder", Autoencoder)
    train(data, tmp_path, epochs=2, batch_size=3)
    images = list(map(bytes, autoencoder.Images(data).train.flatten(1)))
    first, second = seen[:291], seen[291:]
    assert sorted(first) == sorted(second) == sorted(images)
    assert images != first != second != images


# What a training returns, prints and writes


def test_loss_falls(data, tmp_path, capfd):
    train(data, tmp_path / "results", epochs=4, batch_size=16)
    out, err = capfd.readouterr()
    assert err == "" and all(map(LINES.fullmatch, out.splitlines())), out + err
    assert epochs(out) == [1, 2, 3, 4] and out.startswith("Training on 1 x cpu\n")
    for name in "train_loss", "val_loss":
        first, *_, last = falling = losses(out, name)
        assert falling == sorted(falling, reverse=True) and last < first / 2
    assert out.splitlines()[-1] == f"val_loss={losses(out, 'val_loss')[-1]:.4f}"
    assert sorted(os.listdir(tmp_path / "results")) == ["last.ckpt", "wandb"]


@pytest.mark.parametrize("count", [300, 12 * 1013])  # the latter: 1,013 for validation, in two batches
def test_returned_loss_is_that_of_the_returned_model(count, tmp_path, no_records):
    data = make_data(tmp_path / "data", train=count)
    model, loss = train(data, tmp_path, batch_size=25, lr=0.003)
    images = validation(data)
    assert len(images) == count // 12
    assert loss == pytest.approx(squared_error(model, images), rel=1e-6)
    loaded = autoencoder.Autoencoder.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams.lr == 0.003 and equal(loaded.state_dict(), model.state_dict())
    assert loss == pytest.approx(squared_error(loaded, images), rel=1e-6)


def test_same_seed_same_weights(data, tmp_path, no_records):
    for name, seed in ("one", 1), ("again", 1), ("another", 2):
        train(data, tmp_path / name, seed=seed)
    assert equal(weights(tmp_path / "again"), weights(tmp_path / "one"))
    assert not equal(weights(tmp_path / "another"), weights(tmp_path / "one"))


@pytest.mark.parametrize("flags, steps, config", [
    ([], 36, {}), (["--epochs", 2], 72, {}), (["--batch-size", 97], 3, dict(batch_size=97)),
    (["--lr", 0.01], 36, dict(lr=0.01)), (["--seed", 5], 36, dict(seed=5)), (["--limit-train-batches", 0.5], 18, {}),
])
def test_flags(flags, steps, config, data, tmp_path, no_records):
    assert call("--data", data, "--results", tmp_path, *CPU, "--epochs", 1, "--batch-size", 8, *flags) == 0
    state = checkpoint(tmp_path)
    assert state["global_step"] == steps
    assert {**state["hyper_parameters"], **state["datamodule_hyper_parameters"]} == {
        "lr": 0.001, "batch_size": 8, "seed": 1, "images": TRAIN, **config}


def test_learning_rate_matters(data, tmp_path, no_records):
    models = [train(data, tmp_path / str(lr), lr=lr)[0].state_dict() for lr in (0.001, 0.002)]
    assert not equal(*models)


def test_share_of_the_batches_as_a_whole_number(data, tmp_path, no_records):
    """1 is all of them, which Lightning would take for one."""
    train(data, tmp_path, limit_train_batches=1)
    assert checkpoint(tmp_path)["global_step"] == 72


def test_records(data, tmp_path, capfd):
    """Losses of steps and of epochs, hyperparameters and the checkpoint, kept in a folder as there is no account."""
    _, loss = train(data, tmp_path, epochs=2)
    out = capfd.readouterr().out
    from records import read_records

    records = read_records(tmp_path)
    assert not records.online
    assert records.config == dict(lr=0.001, batch_size=4, seed=1, images=TRAIN)
    logged = {name: [value for _, value in records.curve(name, "trainer/global_step")]
              for name in ("train_loss_step", "train_loss_epoch", "val_loss_step", "val_loss_epoch")}
    assert {name: len(values) for name, values in logged.items()} == dict(
        train_loss_step=144 // 50, train_loss_epoch=2, val_loss_step=2, val_loss_epoch=2)
    for name in "train_loss", "val_loss":
        assert [round(value, 4) for value in logged[f"{name}_epoch"]] == losses(out, name)
    assert logged["val_loss_epoch"][-1] == loss
    assert len({*logged["train_loss_step"], *logged["train_loss_epoch"]}) == 4, "a step's is not the mean of all"
    (_, kind, files), = records.artifacts
    assert (kind, files) == ("model", ["model.ckpt"])


def test_train_from_a_thread_and_handlers_of_signals(data, tmp_path, no_records):
    """As in a notebook's server: no signals there. In the main thread, the caller's handler is put back."""
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(train(data, tmp_path / "thread")))
    thread.start()
    thread.join()
    model, _ = train(data, tmp_path / "main")
    assert equal(results[0][0].state_dict(), model.state_dict())
    assert signal.getsignal(signal.SIGTERM) == before


# Processes of their own


def prepare():
    """Make a new process what the command would be; what is imported already has read no launcher's variables."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    warnings.filterwarnings("ignore", MOVED)
    sys.argv[0] = "autoencoder.py"
    rank_zero_only.rank = int(os.environ.get("RANK", 0))


def prepare_powerless():
    prepare()
    powerless()


@pytest.fixture(scope="module")
def start(place):
    """Start autoencoder.py with arguments in a process of its own, in a folder; W&B without an account."""
    # Importing Lightning takes 10 seconds: once for all of them, unless other tests have started the server already.
    forkserver.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "lightning.pytorch", "wandb"])
    ours = {name: os.environ[name] for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR",
                                                "DO_NOT_TRACK", "WANDB_ERROR_REPORTING")}

    def start(folder, *argv, setup=prepare, **variables):
        return Run(folder, *CPU, *argv, target=autoencoder.main, setup=setup, **{
            **ours, "WANDB_API_KEY": "", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **variables})

    return start


@pytest.fixture
def nodes(start, tmp_path):
    """Start one process on each of two machines, as torchrun does there; each in a folder named as its rank."""
    def nodes(*argv, results=("results", "results"), **variables):
        shared = dict(WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, GROUP_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=free_port(), TORCHELASTIC_RUN_ID="none", **variables)
        return [start(tmp_path / str(rank), "--results", tmp_path / results[rank], *argv, RANK=rank, GROUP_RANK=rank,
                      **shared) for rank in range(2)]

    return nodes


def command(*argv):
    return [sys.executable, *map(str, argv)]


def torchrun(*argv):
    return command("-m", "torch.distributed.run", *argv)


def left_running(marker, timeout=60):
    """Return the commands of the processes with a marker in their environment, unless they end in time."""
    end = time.monotonic() + timeout
    while True:
        left = [path.with_name("cmdline").read_bytes() for path in Path("/proc").glob("[0-9]*/environ")
                if has(path, marker)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


@contextlib.contextmanager
def started(folder, *commands, **variables):
    """Start commands with their logs in a folder; yield their processes; kill at the end what is left of them."""
    folder.mkdir(exist_ok=True)
    processes = []
    try:
        for number, argv in enumerate(commands):
            with open(folder / f"log-{number}", "w") as log, open(folder / f"errors-{number}", "w") as errors:
                processes.append(subprocess.Popen(argv, cwd=folder, stdout=log, stderr=errors, stdin=subprocess.DEVNULL,
                                                  env=environment(**variables), start_new_session=True))
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(text, process, log, timeout=300):
    """Wait for a text in a log."""
    end = time.monotonic() + timeout
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, f"no {text!r} in {log.read_text()}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(odd, tmp_path_factory):
    """The results of one process with the odd data, and its records."""
    from records import read_records

    results = tmp_path_factory.mktemp("alone")
    train(odd, results, epochs=3)
    return results, read_records(results)


def agree(results, alone, data, count=3):
    """Compare with one process: weights, losses of the last epochs, and the very last against the definition."""
    from records import read_records

    folder, expected = alone
    records = read_records(results)
    assert len(list(results.glob("wandb/*run-*"))) == 1 and records.config == expected.config
    # Sums of float32 taken in another order: measured 4e-7 after these 204 steps, and 3e-7 of the losses.
    assert distance(weights(results), weights(folder)) < 1e-5
    for name in "train_loss_epoch", "val_loss_epoch":
        ours, others = ([loss for _, loss in each.curve(name)] for each in (records, expected))
        assert len(ours) == count and ours == pytest.approx(others[-count:], rel=1e-5)
    model = autoencoder.Autoencoder.load_from_checkpoint(results / "last.ckpt")
    assert ours[-1] == pytest.approx(squared_error(model, validation(data)), rel=1e-6)


def told_to_stop(out, results):
    """Return how many epochs the checkpoint holds when SIGTERM has ended a training, after a look at what it says."""
    said = int(re.search(r"^Told to stop after (\d+) epochs; --resume goes on from there\n\Z", out, re.M)[1])
    saved = checkpoint(results)["epoch"] + 1
    assert all(map(LINES.fullmatch, out.splitlines()))
    assert saved - said in (0, 1), "counted just after it is saved"
    assert epochs(out)[-1] - saved in (0, 1), "printed just before it is saved"
    return saved


@pytest.mark.slow
def test_two_processes_stopped_and_gone_on_with(odd, alone, tmp_path):
    """As a user starts them. SIGTERM ends both; the resumed run ends as one process would that nobody stopped."""
    argv = command(ROOT / "autoencoder.py", *CPU, "--devices", 2, "--data", odd, "--batch-size", 4, "--results",
                   "results", "--epochs")
    log, errors, marker = tmp_path / "log-0", tmp_path / "errors-0", secrets.token_hex(8)
    with started(tmp_path, [*argv, "1000"], MARKER=marker) as (process,):
        wait_for("Epoch: 2 ", process, log)
        process.terminate()
        assert process.wait(60) == 143
        assert left_running(marker) == []
    done = told_to_stop(log.read_text(), tmp_path / "results")
    assert errors.read_text() == "" and done in (1, 2)
    shutil.rmtree(tmp_path / "results" / "wandb")
    with started(tmp_path, [*argv, "3", "--resume"]) as (process,):
        assert process.wait(300) == 0, errors.read_text()
    assert log.read_text().startswith("Training on 2 x cpu\n") and epochs(log.read_text()) == list(range(done + 1, 4))
    assert errors.read_text() == ""
    agree(tmp_path / "results", alone, odd, 3 - done)


@pytest.mark.slow
@pytest.mark.parametrize("stop, status", [(None, 0), ("Epoch: 2 ", 143)])
def test_no_thread_of_gloo_is_left_at_the_exit(stop, status, data, tmp_path):
    """See the test of the same name for mnist.py."""
    ends = at_exit(ROOT / "autoencoder.py", *CPU, "--data", data, "--epochs", 1000 if stop else 1, "--batch-size", 8,
                   "--results", tmp_path / "results", stop=stop, LOCAL_WORLD_SIZE="1", GROUP_WORLD_SIZE="2",
                   TORCHELASTIC_RUN_ID="none")
    assert [end for end, _ in ends] == [status] * 2
    assert not [name for _, threads in ends for name in threads if "gloo" in name]


@pytest.mark.slow
def test_stopped_while_the_second_process_starts(odd, tmp_path):
    """It takes seconds to get ready, and would wait for the first, which has ended, for half an hour."""
    marker = secrets.token_hex(8)
    argv = command(ROOT / "autoencoder.py", *CPU, "--devices", 2, "--data", odd, "--results", "results")
    with started(tmp_path, argv, MARKER=marker) as (process,):
        end = time.monotonic() + 120
        while not any(has(path, marker) and has(path, "LOCAL_RANK=1") for path in Path("/proc").glob("[0-9]*/environ")):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "errors-0").read_text()
            time.sleep(0.1)
        process.terminate()
        assert process.wait(120) in (143, -signal.SIGTERM)
        assert left_running(marker) == []
    assert (tmp_path / "log-0").read_text() in ("", "Told to stop after 0 epochs\n"), "nothing to go on with"
    assert "Traceback" not in (tmp_path / "errors-0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun(machines, odd, alone, tmp_path):
    """Two processes on one machine, or one on each of two."""
    argv = (ROOT / "autoencoder.py", *CPU, "--data", odd, "--batch-size", 4, "--epochs", 3, "--results", "results")
    port = free_port()
    commands = [torchrun("--standalone", "--nproc-per-node", 2, *argv)] if machines == 1 else [
        torchrun("--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1, "--master-addr", "127.0.0.1",
                 "--master-port", port, *argv) for rank in range(2)]
    with started(tmp_path, *commands) as processes:
        assert [process.wait(300) for process in processes] == [0] * machines, (tmp_path / "errors-0").read_text()
    out = (tmp_path / "log-0").read_text()
    assert out.startswith("Training on 2 x cpu\n") and epochs(out) == [1, 2, 3]
    assert all(map(LINES.fullmatch, out.splitlines()))
    if machines == 2:
        assert (tmp_path / "log-1").read_text() == ""
    agree(tmp_path / "results", alone, odd)


@pytest.mark.slow
def test_finished_run_of_two_machines_says_its_loss_again(nodes, odd, alone, tmp_path):
    """A checkpoint of one process will do: the number of processes is no part of it."""
    shutil.copytree(alone[0], tmp_path / "results")
    before = (tmp_path / "results" / "last.ckpt").read_bytes()
    runs = nodes("--data", odd, "--batch-size", 4, "--epochs", 3, "--resume")
    assert [(run.end(120), run.err) for run in runs] == [(0, "")] * 2
    loss = squared_error(autoencoder.Autoencoder.load_from_checkpoint(tmp_path / "results/last.ckpt"), validation(odd))
    assert [run.out for run in runs] == [f"val_loss={loss:.4f}\n", ""]
    assert (tmp_path / "results" / "last.ckpt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_only_one_machine_has_the_checkpoint(rank, nodes, odd, alone, tmp_path):
    shutil.copytree(alone[0], tmp_path / str(rank) / "results")
    runs = nodes("--data", odd, "--batch-size", 4, "--epochs", 4, "--resume", results=("0/results", "1/results"))
    for run in runs:
        assert (run.end(120), run.out) == (1, "")
        assert run.err == ("autoencoder.py: only some machines have last.ckpt: --results must be a folder that they "
                           "share\n")
    assert not (tmp_path / str(1 - rank) / "results" / "last.ckpt").exists()
    assert equal(weights(tmp_path / str(rank) / "results"), weights(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_machines_is_lost(rank, nodes, odd):
    runs = nodes("--data", odd, "--batch-size", 4, "--epochs", 1000)
    runs[0].until("Epoch: 1 ", 120)
    runs[rank].process.kill()
    other = runs[1 - rank]
    assert other.end(60) == 1
    assert other.err.startswith(f"autoencoder.py: rank {1 - rank} lost the others; see their logs: ")
    assert "Traceback" not in other.err


# Killed or stopped, and gone on with


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The loss and the weights of a run with LONG that nobody stopped."""
    results = tmp_path_factory.mktemp("unbroken")
    _, loss = train(data, results, epochs=10)
    return loss, weights(results)


@pytest.mark.slow
def test_killed_and_gone_on_with(start, data, unbroken, tmp_path, capfd):
    results, marker = tmp_path / "results", secrets.token_hex(8)
    run = start(tmp_path, "--data", data, "--results", results, *LONG, MARKER=marker).until("Epoch: 3 ", 120)
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    done = checkpoint(results)["epoch"] + 1
    assert 2 <= done < 10
    assert left_running(marker) == []
    model, loss = train(data, results, epochs=10, resume=True)
    assert epochs(capfd.readouterr().out) == list(range(done + 1, 11))
    assert (loss, equal(model.state_dict(), unbroken[1])) == (unbroken[0], True)
    assert equal(weights(results), unbroken[1])


@pytest.mark.slow
def test_stopped_and_gone_on_with(start, data, unbroken, tmp_path, capfd):
    results, marker = tmp_path / "results", secrets.token_hex(8)
    run = start(tmp_path, "--data", data, "--results", results, *LONG, MARKER=marker).until("Epoch: 3 ", 120)
    run.process.terminate()
    assert (run.end(120), run.err) == (143, "")
    assert left_running(marker) == []
    done = told_to_stop(run.out, results)
    assert 2 <= done < 10
    from records import read_records

    assert len(read_records(results).curve("train_loss_epoch", "epoch")) in (done, done + 1), "records are kept"
    model, loss = train(data, results, epochs=10, resume=True)
    assert epochs(capfd.readouterr().out) == list(range(done + 1, 11))
    assert (loss, equal(model.state_dict(), unbroken[1])) == (unbroken[0], True)


def test_finished_run_and_more_epochs(data, unbroken, tmp_path, no_records, capfd):
    """Started again, it says the same and trains nothing; with more epochs, it goes on as if it had been told so."""
    _, loss = train(data, tmp_path, epochs=7)
    before = (tmp_path / "last.ckpt").read_bytes()
    capfd.readouterr()
    model, again = train(data, tmp_path, epochs=7, resume=True)
    assert capfd.readouterr() == (f"val_loss={loss:.4f}\n", "")
    assert again == loss and equal(model.state_dict(), weights(tmp_path))
    assert (tmp_path / "last.ckpt").read_bytes() == before
    _, loss = train(data, tmp_path, epochs=10, resume=True)
    assert epochs(capfd.readouterr().out) == [8, 9, 10]
    assert loss == unbroken[0] and equal(weights(tmp_path), unbroken[1])


def test_resume_where_nothing_is(data, tmp_path, no_records):
    train(data, tmp_path / "one")
    train(data, tmp_path / "two" / "new", resume=True)
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "two" / "new"))


def half_written(folder, size):
    """Tell whether a file in a folder is being written: it holds less than half of what it will."""
    for path in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # it has its name now
            if path.is_file() and path.stat().st_size < size // 2:
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_while_writing_the_checkpoint(number, start, data, tmp_path, no_records):
    """The path holds the old file or the whole new one; what SIGKILL leaves of another does not matter."""
    results = tmp_path / "results"
    argv = ("--data", data, "--results", results, "--epochs", 10**6, "--batch-size", 291, "--resume")
    done = 0
    for _ in range(3):
        run = start(tmp_path, *argv, WANDB_MODE="disabled").until(f"Epoch: {done + 2} ", 120)
        size, end = (results / "last.ckpt").stat().st_size, time.monotonic() + 60
        while not half_written(results, size):
            assert run.process.is_alive() and time.monotonic() < end, run.err
        os.kill(run.process.pid, number)
        assert run.end(120) == (143 if number == signal.SIGTERM else -number)
        before, done = done, checkpoint(results)["epoch"] + 1
        assert done > before
        assert run.out.startswith("Training on 1 x cpu\n") and epochs(run.out)[0] == before + 1
        if number == signal.SIGTERM:
            assert os.listdir(results) == ["last.ckpt"] and told_to_stop(run.out, results) == done
    train(data, results, batch_size=291, epochs=done + 1, resume=True)
    assert os.listdir(results) == ["last.ckpt"], "what was left is replaced"


@pytest.mark.parametrize("size", [0, 1000, 700_000])
def test_full_disk(size, data, tmp_path, no_records, capsys):
    """No file can grow beyond a size (capfd's neither): one line says so, and the last checkpoint stays as it is."""
    argv = ("--data", data, "--results", tmp_path, *CPU, "--batch-size", 4, "--epochs")
    assert call(*argv, 1) == 0
    before = (tmp_path / "last.ckpt").read_bytes()
    assert len(before) > 700_000
    capsys.readouterr()
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        status = call(*argv, 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    err = capsys.readouterr().err
    assert status == 1 and re.fullmatch(rf"autoencoder.py: {tmp_path}/last.ckpt cannot be written: .*\n", err)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"], "a half-written file fills the disk"


# Wrong input


@pytest.fixture
def refused(data, tmp_path, monkeypatch, capfd):
    """Run with arguments that end with an exit status and a message; return that. Nothing is written or started."""
    monkeypatch.setattr(sys, "argv", ["autoencoder.py"])  # as it is in the usage
    # Lightning would start the rest of several processes with this command, and kill this one when they fail.
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("has started a process"))

    def content():
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    def refused(status, *argv, folder=data, results=tmp_path / "results"):
        before = content()
        got = call("--data", folder, "--results", results, "--accelerator=cpu", *argv)
        out, err = capfd.readouterr()
        assert (got, out) == (status, ""), err
        *usage, message = err.splitlines()
        assert message.startswith("autoencoder.py: ") and "Traceback" not in err
        assert usage == [] if status == 1 else usage[0].startswith("usage: autoencoder.py ")
        assert content() == before
        return message

    return refused


@pytest.mark.parametrize("flag, value", [
    *((flag, value) for flag in ("--epochs", "--batch-size", "--devices") for value in ("0", "-1", "1.5", "x", "")),
    *(("--lr", value) for value in ("0", "-0.1", "nan", "inf", "-inf", "fast", "")),
    *(("--limit-train-batches", value) for value in ("0", "-0.5", "1.1", "nan", "inf", "half", "")),
    *(("--seed", value) for value in ("-1", str(2**63), "0.5", "lucky", "")),
    ("--accelerator", "tpu"), ("--accelerator", ""),
])
def test_wrong_value(flag, value, refused):
    message = refused(2, f"{flag}={value}")
    assert flag.strip("-").replace("-", "_") in message.replace("-", "_") and value in message


@pytest.mark.parametrize("argv", [["--bogus"], ["--epoch", "1"], ["--dev", "1"], ["extra"]])
def test_unknown_or_abbreviated_flag(argv, refused):
    assert f"unrecognized arguments: {' '.join(argv)}" in refused(2, *argv)


@pytest.mark.parametrize("argv, message", [
    (["--batch-size", 292], "batches of 292 cannot be made of 291 images"),
    (["--batch-size", 63, "--devices", 2], "batches of 63 .* shared evenly by 2 processes: take another batch_size"),
])
def test_batch_size_that_does_not_fit(argv, message, refused):
    assert re.search(message, refused(2, *argv))


def test_more_processes_than_cores(refused):
    cores = os.cpu_count()
    message = refused(1, "--devices", cores + 1, "--batch-size", cores + 1)
    assert f"{cores + 1} processes are more than the {cores} cores here" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused):
    assert "gpu" in refused(1, "--accelerator", "gpu").lower()


def test_share_of_less_than_a_batch(refused):
    assert "limit_train_batches" in refused(1, "--limit-train-batches", 0.1)  # of 4 batches


def test_devices_and_torchrun(refused, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "torchrun has started 2 processes here: leave out --devices" in refused(2, "--devices", 2)


def test_missing_data(refused, tmp_path):
    folder = tmp_path / "nowhere"
    assert f"train-images-idx3-ubyte[.gz] is not in {folder}" in refused(1, folder=folder)


def test_too_little_data(refused, tmp_path):
    """A twelfth of them is none, and there is nothing to validate with."""
    folder = make_data(tmp_path / "data", train=11)
    message = refused(1, "--batch-size", 2, folder=folder)
    assert str(folder) in message and "11" in message.replace(str(folder), "")


def test_fewer_images_to_validate_with_than_processes(refused, tmp_path):
    folder = make_data(tmp_path / "data", train=23)
    message = refused(1, "--devices", 2, "--batch-size", 2, folder=folder)
    assert "too few images for 2 processes to validate with" in message


@pytest.mark.parametrize("results", ["file", "file/below", "file/far/below"])
def test_results_that_cannot_be(results, refused, tmp_path):
    (tmp_path / "file").write_text("a file")
    assert f"{tmp_path / results} cannot be written: " in refused(1, results=tmp_path / results)


@pytest.mark.slow
def test_read_only_results(start, data, tmp_path):
    (tmp_path / "results").mkdir(mode=0o555)
    run = start(tmp_path, "--data", data, "--results", "results", setup=prepare_powerless)  # modes do not bind root
    assert (run.end(120), run.out) == (1, "")
    assert re.fullmatch("autoencoder.py: results cannot be written: .*\n", run.err)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The checkpoint of a run with these settings: five epochs, batches of 64."""
    results = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(data, results, epochs=5, batch_size=64)
    return results / "last.ckpt"


@pytest.fixture
def results(trained, tmp_path):
    """A folder with that checkpoint."""
    (tmp_path / "results").mkdir()
    shutil.copy(trained, tmp_path / "results")
    return tmp_path / "results"


def test_checkpoint_without_resume(results, refused):
    message = refused(1)
    assert f"{results / 'last.ckpt'} is there already: go on by --resume, or name another --results" in message


def test_fewer_epochs_than_done(results, refused):
    assert "5" in refused(1, "--epochs", 4, "--resume")


TORN = dict(
    empty=lambda good: b"",
    garbage=lambda good: b"not a checkpoint\n" * 1000,
    first_half=lambda good: good[:len(good) // 2],
    short_by_a_byte=lambda good: good[:-1],
    second_half=lambda good: good[len(good) // 2:],
    zeros=lambda good: bytes(len(good)),
)


@pytest.mark.parametrize("tear", TORN)
def test_torn_checkpoint(tear, results, refused):
    path = results / "last.ckpt"
    path.write_bytes(TORN[tear](path.read_bytes()))
    assert f"{path} is no whole checkpoint: move it away to train from the start" in refused(1, "--resume")


def test_checkpoint_that_is_none(results, refused):
    """Weights alone, and what would run code, here make a folder, when it is read."""
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(results / "made"),)

    for other in weights(results), {**checkpoint(results), "code": Code()}:
        torch.save(other, results / "last.ckpt")
        assert "is no whole checkpoint" in refused(1, "--resume")


@pytest.mark.parametrize("flag, made_with, value", [("--seed", 1, 2), ("--batch-size", 64, 32), ("--lr", 0.001, 0.01)])
def test_checkpoint_of_another_run(flag, made_with, value, results, refused):
    name = flag.strip("-").replace("-", "_")
    assert (f"{results / 'last.ckpt'} was made with {{'{name}': {made_with}}}, not {{'{name}': {value}}}: use the same "
            "values or another --results") in refused(1, "--resume", flag, value)


def test_checkpoint_of_other_data(results, refused, tmp_path):
    message = refused(1, "--resume", folder=make_data(tmp_path / "data", train=TRAIN + 12))
    assert f"was made with {{'images': {TRAIN}}}, not {{'images': {TRAIN + 12}}}" in message


def test_errors_from_python(data, tmp_path):
    with pytest.raises(ValueError, match="epochs must be at least 1, not 0"):
        train(data, tmp_path / "results", epochs=0)
    with pytest.raises(mnist.TrainingError, match="is not in"):
        train(tmp_path, tmp_path / "results")
    assert os.listdir(tmp_path) == []


# Weights & Biases


@pytest.mark.slow
def test_a_server_that_is_down_and_a_key_that_is_kept(data, tmp_path, place, monkeypatch, capfd):
    """The training ends well, its records are kept in the folder, and the key is in no file and no line."""
    from records import read_records

    key = secrets.token_hex(20)  # the form of W&B's keys
    for name, value in {"WANDB_API_KEY": key, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
                        "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert call("--data", data, "--results", tmp_path / "results", *CPU, "--epochs", 2, "--batch-size", 4) == 0
    out, err = capfd.readouterr()
    line, *lines = out.splitlines()
    assert line.startswith("Without a server for the records: CommError: ") and epochs(out) == [1, 2]
    assert all(map(LINES.fullmatch, lines)) and "Traceback" not in err
    records = read_records(tmp_path / "results")
    assert not records.online and len(records.curve("val_loss_epoch")) == 2
    assert key not in out + err
    assert not found_in(tmp_path, key) and not found_in(place, key)
    (tmp_path / "results" / "leak").write_text(f"key: {key}")
    assert found_in(tmp_path, key) == [tmp_path / "results" / "leak"]  # the search can find it


def test_records_switched_off(data, tmp_path, no_records, capfd):
    train(data, tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert all(map(LINES.fullmatch, capfd.readouterr().out.splitlines()))


# Real MNIST


@pytest.mark.slow
@real_mnist
def test_loss_on_real_mnist(tmp_path, no_records):
    """Two epochs of half the batches; images of the mean pixel, the same for all, would have 0.067."""
    model, loss = train(MNIST_DIR, tmp_path, epochs=2, batch_size=64, limit_train_batches=0.5)
    assert loss < 0.047
    images, _ = mnist.load(MNIST_DIR, "t10k")
    assert squared_error(model, images) < 0.047, "of images that are in no part of the split"


@pytest.mark.parametrize("mode, said", [("", ""), ("offline\n", ""), ("bogus", "Without a server for the records: ")])
def test_variables_of_records(mode, said, data, tmp_path, monkeypatch, capfd):
    """An empty one counts as none, the newline at the end of a file is no part of it, and a wrong one stops nothing."""
    from records import read_records

    monkeypatch.setenv("WANDB_MODE", mode)
    train(data, tmp_path)
    assert ("Without" in capfd.readouterr().out) == bool(said)
    assert not read_records(tmp_path).online
