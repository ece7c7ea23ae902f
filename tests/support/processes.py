"""Ways to start the trainer in real processes."""

import ctypes
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

import torch

import mnist
from tests.support.project import PROJECT as PROJECT

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what launchers set
LOG = re.compile(
    r"Resuming from .+: \d+ epochs and \d+ steps are done|"
    r"Training on \d+ images with \d+ x (cpu|cuda) in torch\.(float32|bfloat16)|"
    r"Epoch: \d+ \([ \d]{3}\.\d%\) - train_loss=\d+\.\d{4}|"
    r"Epoch: \d+ - train_loss=\d+\.\d{4} (test|val)_loss=\d+\.\d{4} accuracy=[01]\.\d{4}|"
    r"Interrupted by SIGTERM after \d+ epochs and \d+ steps; checkpoint: .+|"
    r"Trained in \d+\.\d s, \d+ images/s"
)  # the lines of a log are these and no others
SHORT = ("--epochs", 1, "--batch-size", 32, "--lr", 0.02, "--log-interval", 1)  # 10 steps on the small data
LONG = ("--epochs", 3, "--batch-size", 8, "--lr", 0.005, "--log-interval", 5)  # 40 steps an epoch: time to stop it
OUTPUTS = ("--checkpoint", "checkpoint", "--save-model", "model")  # relative: each process has a folder of its own
forkserver = multiprocessing.get_context("forkserver")  # imports torch once, which takes seconds; not in every process
forkserver.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])  # the last: by every optimiser


def call(*argv):
    """Run the trainer's command line in this process; return its exit status."""
    try:
        mnist.main(list(map(str, argv)))
    except SystemExit as end:
        return end.code
    return 0


def deterministic():
    """Leave out what makes runs with different numbers of processes differ by design: dropout, bfloat16, Muon's too."""
    mnist.Net = partial(mnist.Net, dropout=(0, 0))
    mnist.precision = lambda device: torch.float32
    mnist.optim.Muon = lambda weights, lr, momentum, **_: torch.optim.SGD(weights, lr, momentum)


def drop_capabilities():
    """Give up root's right to read and write anything (all capabilities, by version 3 of the system call)."""
    assert ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0


class Run:
    """The trainer in a process of its own, with log.out and log.err in the folder that it runs in."""

    def __init__(self, folder, *argv, setup=None, target=mnist.main, **variables):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process = forkserver.Process(
            target=child, daemon=True, args=(folder, list(map(str, argv)), variables, setup, target)
        )
        self.process.start()

    def __getattr__(self, name):  # .out and .err: what it has printed
        if name not in ("out", "err"):
            raise AttributeError(name)
        path = self.folder / f"log.{name}"
        return path.read_text() if path.exists() else ""

    def until(self, text, timeout=60):
        """Wait for a text in the log."""
        end = time.monotonic() + timeout
        alive = True
        while text not in self.out:  # what it wrote last is there once it has ended
            assert alive and time.monotonic() < end, f"no {text!r} in {self.out}{self.err}"
            alive = self.process.is_alive()
            time.sleep(0.001)
        return self

    def end(self, timeout=60):
        """Wait for the end; return the exit status, negative for a signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.out}{self.err}")
        return self.process.exitcode

    def succeed(self):
        """Wait for the end, which must be a good one."""
        assert (self.end(), self.err) == (0, "")
        return self


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


def files(folder):
    """Return the names of the files that a process has left in its folder, without its logs."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("log."))


def free_port():
    """Return a TCP port that nobody listens on."""
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
    how = dict(text=True, capture_output=True, timeout=timeout, env=env or environment())
    return subprocess.run([sys.executable, *map(str, argv)], **how, **options)


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
    command, how = [sys.executable, "-c", THREADS, *map(str, argv)], dict(text=True, stdout=subprocess.PIPE)
    variables = [environment(RANK=str(rank), GROUP_RANK=str(rank), **shared) for rank in range(2)]
    processes = [subprocess.Popen(command, env=env, **how) for env in variables]
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
