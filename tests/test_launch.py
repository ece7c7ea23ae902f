"""The trainer in real processes: what launchers start, what signals stop, what goes on after that."""
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from trainer import (LOG, ROOT, TEST, Run, at_exit, distance, environment, equal, exact, free_port, impatient,
                     make_data, mnist, python, pytorchjob, weights)

pytestmark = [pytest.mark.usefixtures("one_process"), pytest.mark.slow]  # nearly all start several processes

QUICK = ("--epochs", 1, "--batch-size", 32, "--lr", 0.02, "--log-interval", 1)  # 10 steps on the small data
LONG = ("--epochs", 3, "--batch-size", 8, "--lr", 0.005, "--log-interval", 5)  # 40 steps an epoch: time to stop it
FILES = ("--checkpoint", "checkpoint", "--save-model", "model")  # relative: each process has a folder of its own
MNIST_DIR = os.environ.get("MNIST_DIR")
real_mnist = pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR, the folder of the real MNIST files, is not set")


@pytest.fixture(scope="session")
def unbroken(data, tmp_path_factory):
    """The weights of a run with LONG that nobody stopped."""
    run = Run(tmp_path_factory.mktemp("unbroken"), "--data", data, *LONG, *FILES)
    assert (run.end(), run.err) == (0, "")
    return weights(run.folder / "model")


@pytest.fixture(scope="session")
def alone(data, tmp_path_factory):
    """The weights of one process with QUICK, without dropout."""
    run = Run(tmp_path_factory.mktemp("alone"), "--data", data, *QUICK, *FILES, setup=exact)
    assert (run.end(), run.err) == (0, "")
    return weights(run.folder / "model")


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("log."))


# Processes together

@pytest.mark.parametrize("world", [2, 3])
def test_pytorchjob(world, data, alone, tmp_path):
    runs = pytorchjob(tmp_path, world, "--data", data, *QUICK, *FILES, setup=exact)
    assert [(run.end(), run.err) for run in runs] == [(0, "")] * world
    assert all(map(LOG.fullmatch, runs[0].out.splitlines()))
    assert f" with {world} x cpu in " in runs[0].out and runs[0].out.count("Epoch: ") == 10
    assert [run.out for run in runs[1:]] == [""] * (world - 1)
    assert [files(run.folder) for run in runs] == [["checkpoint", "model"]] + [[]] * (world - 1)
    # Sums taken in another order differ in the last bits: measured 3e-8 after these 10 steps. The difference grows as
    # training amplifies it, to 0.3 after the 938 steps of an epoch of MNIST; the accuracies differed by 0.02 points.
    assert distance(weights(tmp_path / "0" / "model"), alone) < 1e-5


def test_more_processes_than_images_in_a_batch(data, tmp_path):
    small = make_data(tmp_path / "data", train=11, test=5)
    argv = ("--data", small, "--epochs", 1, "--batch-size", 2, "--test-batch-size", 2, "--lr", 0.01, *FILES)
    runs = pytorchjob(tmp_path, 3, *argv, setup=exact)
    assert [(run.end(), run.err) for run in runs] == [(0, "")] * 3
    one = Run(tmp_path / "one", *argv, setup=exact)
    assert one.end() == 0
    assert distance(weights(tmp_path / "0" / "model"), weights(tmp_path / "one" / "model")) < 1e-5
    assert one.out.splitlines()[1:-1] == runs[0].out.splitlines()[1:-1]


def tell_random_state():
    """Print what the random numbers of a training step's dropout start from."""
    class Net(mnist.Net):
        def forward(self, images):
            if self.training:
                print(hashlib.md5(bytes(torch.get_rng_state())).hexdigest(), file=sys.stderr)
            return super().forward(images)
    mnist.Net = Net


def test_dropout_differs_by_process_and_step(data, tmp_path):
    runs = pytorchjob(tmp_path, 2, "--data", data, *QUICK, setup=tell_random_state)
    assert [run.end() for run in runs] == [0, 0]
    assert len(set((runs[0].err + runs[1].err).split())) == 2 * 10


class FirstPixels(torch.nn.Module):
    """Take the first ten pixels of an image for its logits."""

    def forward(self, images):
        return images.flatten(1)[:, :10]


def count_every_image():
    """Test as often as there are images, each time with a label that is right for one of them only."""
    labels = torch.arange(TEST) % 10
    images = torch.zeros(TEST, 1, 28, 28, dtype=torch.uint8)
    images[torch.arange(TEST), 0, 0, labels] = 255
    with mnist.launched(no_cuda=True) as (rank, world, _):
        for only in range(TEST):
            asked = torch.where(torch.arange(TEST) == only, labels, (labels + 1) % 10)
            loss, right = mnist.test(FirstPixels(), images, asked, 10, rank, world)
            print(right)
        print(f"loss={loss:.4f}")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_is_tested_once(world, tmp_path):
    runs = pytorchjob(tmp_path, world, target=count_every_image, setup=exact)
    assert [run.end() for run in runs] == [0] * world, runs[0].err
    # A right answer: 255 is 0.13 to 3.06 standard deviations above the rest; the loss is the mean over all images.
    step = 1 / mnist.STD
    right, wrong = (torch.tensor(9 + torch.e ** step).log().item() - part for part in (step, 0))
    loss = (right + (TEST - 1) * wrong) / TEST
    for run in runs:
        assert run.out.split() == ["1"] * TEST + [f"loss={loss:.4f}"]


# Wrong input, as the shell sees it

@pytest.mark.parametrize("argv, variables, status, line", [
    (["--epochs", "0"], {}, 2, "mnist.py: error: epochs must be at least 1, not 0"),
    (["--data", "nowhere"], {}, 1, "mnist.py: train-images-idx3-ubyte[.gz] is not in nowhere: give"),
    (["--checkpoint", "no/file"], {}, 1, "mnist.py: no/file cannot be written: give a file in a folder that is there"),
    ([], dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), 1, "mnist.py: RANK not set"),
    ([], dict(RANK=2, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1), 1, "mnist.py: RANK=2, WORLD_SIZE=2"),
])
def test_status_and_message(argv, variables, status, line, tmp_path):
    run = Run(tmp_path, *argv, **variables)
    assert (run.end(), run.out) == (status, "")
    assert run.err.splitlines()[-1].startswith(line) and "Traceback" not in run.err


# Processes that do not come together

def test_port_in_use(data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        run = Run(tmp_path, "--data", data, *QUICK, setup=impatient,
                  RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert run.end() == 1
    last = run.err.splitlines()[-1]
    assert last.startswith(f"mnist.py: rank 0 of 2 could not join at 127.0.0.1:{port}") and "in use" in last
    assert "Traceback" not in run.err


def test_others_never_come(data, tmp_path):
    runs = [Run(tmp_path / str(rank), "--data", data, *QUICK, setup=impatient,
                RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) for rank in range(2)]
    for rank, run in enumerate(runs):
        assert (run.end(), run.out) == (1, "")
        last = run.err.splitlines()[-1]  # torch itself logs before that how often it has tried
        assert last.startswith(f"mnist.py: rank {rank} of 2 could not join at 127.0.0.1:")
        assert "timed out" in last.lower()
        assert "Traceback" not in run.err


def test_sigterm_while_waiting_for_others(data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as master:  # one that never answers
        run = Run(tmp_path, "--data", data, *QUICK,
                  RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=master.getsockname()[1])
        master.settimeout(60)
        with master.accept()[0]:
            run.process.terminate()
            assert run.end(timeout=10) in (143, -signal.SIGTERM)


def test_one_of_two_is_killed(data, tmp_path):
    first, second = pytorchjob(tmp_path, 2, "--data", data, *LONG, *FILES)
    first.until("Epoch: 1")
    second.process.kill()
    assert first.end(timeout=30) == 1
    assert "Traceback" not in first.err


def test_one_of_two_has_no_data(data, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "data").symlink_to(data)
    first, second = pytorchjob(tmp_path, 2, "--data", "data", *QUICK)
    assert (first.end(), second.end()) == (1, 1)
    assert second.err.startswith("mnist.py: train-images-idx3-ubyte[.gz] is not in data")
    assert "Traceback" not in first.err


def test_two_processes_with_a_torn_checkpoint(data, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint").write_bytes(b"torn")
    first, second = pytorchjob(tmp_path, 2, "--data", data, *QUICK, *FILES)
    assert (first.end(), second.end()) == (1, 1)
    assert first.err == "mnist.py: checkpoint is no whole checkpoint: move it away to train from the start\n"
    assert (tmp_path / "0" / "checkpoint").read_bytes() == b"torn"
    assert "Traceback" not in second.err


# Killed or stopped, and started again

def test_killed_after_an_epoch(data, unbroken, tmp_path):
    run = Run(tmp_path, "--data", data, *LONG, *FILES).until("Epoch: 2")
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    assert files(tmp_path) == ["checkpoint"]
    again = Run(tmp_path, "--data", data, *LONG, *FILES)
    assert (again.end(), again.err) == (0, "")
    assert re.match(r"Going on from checkpoint: [12] epochs and 0 steps are done\n", again.out)
    assert equal(weights(tmp_path / "model"), unbroken)


def test_stopped_in_an_epoch(data, unbroken, tmp_path):
    run = Run(tmp_path, "--data", data, *LONG, *FILES).until("Epoch: 2 ( 12")
    run.process.terminate()
    assert (run.end(), run.err) == (143, "")
    done = re.search(r"Told to stop after (.*) epochs and (.*) steps; checkpoint: checkpoint\n$", run.out)
    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert (state["epoch"], state["step"]) == (int(done[1]), int(done[2]))
    assert files(tmp_path) == ["checkpoint"]
    again = Run(tmp_path, "--data", data, *LONG, *FILES)
    assert (again.end(), again.err) == (0, "")
    assert again.out.startswith(f"Going on from checkpoint: {done[1]} epochs and {done[2]} steps are done\n")
    assert equal(weights(tmp_path / "model"), unbroken)
    assert again.out.count("accuracy=") == 3 - int(done[1])


def test_stopped_without_a_checkpoint(data, tmp_path):
    run = Run(tmp_path, "--data", data, *LONG).until("Epoch: 1")
    run.process.terminate()
    assert (run.end(), run.err) == (143, "")
    assert "Told to stop after 0 epochs" in run.out
    assert files(tmp_path) == []


def test_started_again_after_the_end(data, alone, tmp_path):
    Run(tmp_path, "--data", data, *QUICK, *FILES, setup=exact).end()
    before = (tmp_path / "checkpoint").read_bytes()
    os.unlink(tmp_path / "model")
    again = Run(tmp_path, "--data", data, *QUICK, *FILES, setup=exact)
    assert (again.end(), again.err) == (0, "")
    assert len(re.findall(r"^accuracy=\d\.\d{4}$", again.out, re.M)) == 1 and "Epoch: " not in again.out
    assert equal(weights(tmp_path / "model"), alone)
    assert (tmp_path / "checkpoint").read_bytes() == before


@pytest.mark.parametrize("stop, status", [(None, 0), ("Epoch: 2 ", 143)])
def test_no_thread_of_gloo_is_left_at_the_exit(stop, status, data):
    """One that was late would abort a process that has done all its work, and a job would begin anew."""
    epochs = 10000 if stop else 1
    ends = at_exit(ROOT / "mnist.py", "--data", data, "--epochs", epochs, "--batch-size", 8, "--no-cuda", stop=stop)
    assert [end for end, _ in ends] == [status] * 2
    assert not [name for _, threads in ends for name in threads if "gloo" in name]


@pytest.fixture(scope="session")
def unbroken_two(data, tmp_path_factory):
    """The weights of two processes with LONG that nobody stopped."""
    runs = pytorchjob(tmp_path_factory.mktemp("unbroken-two"), 2, "--data", data, *LONG, *FILES)
    assert [(run.end(), run.err) for run in runs] == [(0, "")] * 2
    return weights(runs[0].folder / "model")


@pytest.mark.parametrize("stopped", [[1], *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ([0], [0, 1]))])
def test_two_processes_stopped(stopped, data, unbroken_two, tmp_path):
    argv = ("--data", data, *LONG, *FILES)
    runs = pytorchjob(tmp_path, 2, *argv)
    runs[0].until("Epoch: 2 ( 12")
    for rank in stopped:
        runs[rank].process.terminate()
    assert [(run.end(), run.err) for run in runs] == [(143, "")] * 2
    assert [files(run.folder) for run in runs] == [["checkpoint"], []]
    again = pytorchjob(tmp_path, 2, *argv)
    assert [(run.end(), run.err) for run in again] == [(0, "")] * 2
    # To the last bit: two processes add in one order only, a + b, and each draws the same random numbers again.
    assert equal(weights(tmp_path / "0" / "model"), unbroken_two)


def test_goes_on_with_another_number_of_processes(data, tmp_path):
    argv = ("--data", data, *LONG, *FILES)
    one = Run(tmp_path / "one", *argv, setup=exact)
    assert one.end() == 0
    runs = pytorchjob(tmp_path, 2, *argv, setup=exact)
    runs[0].until("Epoch: 2 ( 12").process.terminate()
    assert [run.end() for run in runs] == [143, 143]
    again = Run(tmp_path / "0", *argv, setup=exact)
    assert (again.end(), again.err) == (0, "")
    assert distance(weights(tmp_path / "0" / "model"), weights(tmp_path / "one" / "model")) < 1e-5


def write_for_ever():
    for number in range(10**9):
        mnist.write({"number": number, "values": torch.full((300_000,), number)}, "file")


def test_killed_while_writing(tmp_path):
    for _ in range(4):
        run = Run(tmp_path, target=write_for_ever)
        end = time.monotonic() + 60
        before = os.path.getmtime(tmp_path / "file") if (tmp_path / "file").exists() else 0
        while not (tmp_path / "file").exists() or os.path.getmtime(tmp_path / "file") == before:
            assert run.process.is_alive() and time.monotonic() < end, run.err
        time.sleep(random.uniform(0, 0.05))
        run.process.kill()
        assert run.end() == -signal.SIGKILL
        state = torch.load(tmp_path / "file", weights_only=True)
        assert (state["values"] == state["number"]).all()


# torchrun

def torchrun(processes, *argv):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *map(str, argv)]


@pytest.fixture
def driver(tmp_path):
    """The trainer without dropout, each process in a folder named as its rank."""
    path = tmp_path / "driver.py"
    path.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
                    "from trainer import exact, mnist\n"
                    "os.makedirs(os.environ['RANK'])\nos.chdir(os.environ['RANK'])\nexact()\nmnist.main()\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun(world, data, alone, driver, tmp_path):
    done = python(*torchrun(world, driver, "--data", data, *QUICK, *FILES)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(map(LOG.fullmatch, done.stdout.splitlines())) and done.stdout.count("Epoch: ") == 10
    assert f" with {world} x cpu in " in done.stdout
    assert [files(tmp_path / str(rank)) for rank in range(world)] == [["checkpoint", "model"]] + [[]] * (world - 1)
    assert distance(weights(tmp_path / "0" / "model"), alone) < 1e-5


@pytest.mark.slow
def test_torchrun_stopped(data, unbroken_two, tmp_path):
    command = torchrun(2, ROOT / "mnist.py", "--data", data, *LONG, *FILES)
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
        end = time.monotonic() + 120
        while "Epoch: 2 ( 12" not in (tmp_path / "log").read_text():
            assert job.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.01)
        job.terminate()
        assert job.wait(60) != 0
    assert "Told to stop after" in (tmp_path / "log").read_text()
    assert torch.load(tmp_path / "checkpoint", weights_only=True)["epoch"] < 3
    assert not (tmp_path / "model").exists()
    done = python(*command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / "model"), unbroken_two)


# Real MNIST

def accuracy(out):
    return float(re.findall(r"^accuracy=(.*)", out, re.M)[-1])


@pytest.mark.slow
@real_mnist
def test_accuracy_and_processes_on_real_mnist():
    argv = (ROOT / "mnist.py", "--data", MNIST_DIR, "--epochs", 1)
    one = python(*argv, timeout=600, env=environment(OMP_NUM_THREADS="2"))
    assert one.returncode == 0, one.stderr
    assert accuracy(one.stdout) >= 0.985  # one seed: room below the 98.9 % asked of the mean of three
    three = python(*torchrun(3, *argv)[1:], timeout=600)
    assert three.returncode == 0, three.stderr
    assert abs(accuracy(three.stdout) - accuracy(one.stdout)) <= 0.003
