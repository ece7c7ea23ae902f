"""What the tests of the trainer share: small data in MNIST's file formats, and ways to start real processes."""
import ctypes
import gzip
import multiprocessing
import os
import re
import socket
import struct
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mnist  # noqa: E402

TRAIN, TEST = 317, 53  # images; primes, so that no batch size and no number of processes divides them
FILES = [f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what launchers set
LOG = re.compile(
    r"Going on from .+: \d+ epochs and \d+ steps are done|"
    r"Training on \d+ images with \d+ x (cpu|cuda) in (float32|bfloat16)|"
    r"Epoch: \d+ \([ \d]{3}\.\d%\) - Loss: \d+\.\d{4}|"
    r"Test accuracy: \d+/\d+ \([ \d]{3}\.\d%\)|"
    r"loss=\d+\.\d{4}|accuracy=[01]\.\d{4}|"
    r"Told to stop after \d+ epochs and \d+ steps; checkpoint: .+|"
    r"Trained in \d+\.\d s, \d+ images/s")  # the lines of a log are these and no others
forkserver = multiprocessing.get_context("forkserver")  # imports torch once, which takes seconds; not in every process
forkserver.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])  # the last: by every optimiser


def idx(values):
    """Return the bytes of an IDX file: magic number, shape, values."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write_split(folder, split, images, labels, gz=True):
    """Write the two files of a split, gzipped or not."""
    for what, values in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{split}-{what}-ubyte"
        if gz:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(values), 1))
        else:
            path.write_bytes(idx(values))


def make_data(folder, train=TRAIN, test=TEST, gz=True):
    """Write the four files of a small data set into a folder and return it: ten 4x4 patterns, enlarged, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    patterns = random.integers(0, 160, (10, 4, 4))
    for split, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count)
        images = np.kron(patterns[labels], np.ones((7, 7))) + random.integers(0, 96, (count, 28, 28))
        write_split(folder, split, images, labels, gz)
    return folder


def call(*argv):
    """Run the trainer's command line in this process; return its exit status."""
    try:
        mnist.main(list(map(str, argv)))
    except SystemExit as end:
        return end.code
    return 0


def weights(path):
    """Return the weights of a model file."""
    return torch.load(path, weights_only=True)


def equal(one, other):
    """Tell whether two sets of weights are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    """Return the largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def float32_only():
    """Make the trainer compute in float32 on any processor."""
    mnist.precision = lambda device: torch.float32


def exact():
    """Leave out what makes runs with different numbers of processes differ by design: dropout and bfloat16."""
    mnist.Net = partial(mnist.Net, dropout=(0, 0))
    float32_only()


def powerless():
    """Give up root's right to write anywhere (all capabilities, by version 3 of the system call)."""
    assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0


def impatient():
    """Let the trainer wait a second instead of minutes for the others."""
    mnist.TIMEOUT = mnist.timedelta(seconds=1)


class Run:
    """The trainer in a process of its own, with log.out and log.err in the folder that it runs in."""

    def __init__(self, folder, *argv, setup=None, target=mnist.main, **variables):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process = forkserver.Process(target=child, daemon=True,
                                          args=(folder, list(map(str, argv)), variables, setup, target))
        self.process.start()

    def __getattr__(self, name):  # .out and .err: what it has printed
        if name not in ("out", "err"):
            raise AttributeError(name)
        path = self.folder / f"log.{name}"
        return path.read_text() if path.exists() else ""

    def until(self, text, timeout=60):
        """Wait for a text in the log."""
        end = time.monotonic() + timeout
        while text not in self.out:
            assert self.process.is_alive() and time.monotonic() < end, f"no {text!r} in {self.out}{self.err}"
            time.sleep(0.001)
        return self

    def end(self, timeout=60):
        """Wait for the end; return the exit status, negative for a signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.out}{self.err}")
        return self.process.exitcode


def child(folder, argv, variables, setup, target):
    """Be the new process of Run."""
    os.chdir(folder)
    for number, name in ((1, "log.out"), (2, "log.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in variables.items()})
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sys.argv = ["mnist.py", *argv]
    if setup:
        setup()
    target()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def pytorchjob(folder, world, *argv, **options):
    """Start processes with the variables that a PyTorchJob sets, each in a folder named as its rank."""
    shared = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), **options)
    return [Run(folder / str(rank), *argv, RANK=rank, **shared) for rank in range(world)]


def environment(**variables):
    """Return the environment of this process without a launcher's variables, with one thread and strict warnings."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **variables}


def python(*argv, timeout=120, env=None, **options):
    """Run python with arguments to its end."""
    return subprocess.run([sys.executable, *map(str, argv)], text=True, capture_output=True, timeout=timeout,
                          env=env or environment(), **options)


THREADS = """import atexit, glob, runpy, sys
sys.argv.pop(0)
atexit.register(lambda: print(*sorted(open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm"))))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def at_exit(*argv, stop=None, timeout=120, **variables):
    """Run a script in two processes, each as on a machine of its own, as a user starts it: nothing was imported before.

    stop: a text in the log at which both get SIGTERM. Return (exit status, threads that are left at the exit) of each.
    """
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_RANK="0", **variables)
    processes = [subprocess.Popen([sys.executable, "-c", THREADS, *map(str, argv)], text=True, stdout=subprocess.PIPE,
                                  env=environment(RANK=str(rank), GROUP_RANK=str(rank), **shared)) for rank in range(2)]
    try:
        if stop:
            assert any(stop in line for line in processes[0].stdout), "it has ended before"
            for process in processes:
                process.terminate()
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text.splitlines()[-1].split()) for process, text in zip(processes, said)]
