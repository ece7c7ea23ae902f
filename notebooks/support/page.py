"""What the pages share: how they start, call other programs, show figures, and tell at the end what ran."""

import ast
import contextlib
import fcntl
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from IPython.display import display
from IPython.utils.io import Tee
from tabulate import tabulate

from mnist import TrainingError

PROJECT = Path(__file__).resolve().parents[2]
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#999999", "#000000"  # Okabe and Ito: for colour-blind readers


class PageError(Exception):
    """Stops a page; the message says what is wrong and what to do."""

    def _render_traceback_(self):  # asked for by IPython: the message is all that a reader needs
        return [f"{type(self).__name__}: {self}"]


TrainingError._render_traceback_ = PageError._render_traceback_  # its message says what to do, too


def start():
    """Go to the project's folder, and check the parameters that papermill injected."""
    os.chdir(PROJECT)
    Path("build").mkdir(exist_ok=True)
    plt.rcParams.update({"figure.dpi": 96, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    values = get_ipython().user_ns
    for own, injected in zip(values["In"], values["In"][1:]):
        if injected.startswith("# Parameters\n"):
            defaults = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(own).body}
            names = [node.targets[0].id for node in ast.parse(injected).body if isinstance(node, ast.Assign)]
            check_parameters(defaults, {name: values[name] for name in names})


def check_parameters(defaults: dict, given: dict) -> None:
    """Raise PageError if a given name is not among the defaults, or its value is of another type than the default."""
    for name, value in given.items():
        if name not in defaults:
            raise PageError(f"there is no parameter {name!r}; this page has {', '.join(defaults)}")
        default = defaults[name]
        kinds = (int, float) if type(default) is float else (type(default),)
        if type(value) not in kinds or isinstance(value, float) and not math.isfinite(value):
            hint = f"-r {name} VALUE" if isinstance(default, str) else f'-y "{name}: {default}"'
            raise PageError(f"the parameter {name} is {value!r} but must be like {default!r} (papermill: {hint})")


def lock(path, flags=fcntl.LOCK_EX):
    """Return a file that is locked until it is closed, where the file system knows locks; flags: as of fcntl.flock."""
    file = open(path, "w")
    try:
        fcntl.flock(file, flags)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            file.close()
            raise
    return file


locks = {}  # of the folders that this process uses


def fresh_folder(name: str) -> Path:
    """Return build/NAME, emptied; raise PageError if another process that called this still runs."""
    try:
        locks[name] = locks.get(name) or lock(f"build/.{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PageError(f"build/{name} is in use by another run of this page: wait until that has ended") from None
    folder = Path("build", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Process(subprocess.Popen):
    """A shell command, the folder of this Python first in its PATH; all its output comes from its stdout."""

    def __init__(self, command: str, **environment: str):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        options = {"env": {**os.environ, "PATH": path, **environment}, "start_new_session": True}
        options |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        super().__init__(command, shell=True, text=True, errors="replace", **options)

    def __exit__(self, kind, *error):
        if kind:  # the reader interrupts the cell: end the command and all that it started
            os.killpg(self.pid, signal.SIGTERM)
        super().__exit__(kind, *error)


def shell(command: str, **environment: str) -> str:
    """Run a shell command in the project's folder, show its output as it comes and return it.

    Unlike `!`, it stops the page when the command fails.
    """
    lines = []
    with Process(command, **environment) as process:
        for line in process.stdout:
            print(line, end="")
            lines.append(line)
    if process.returncode:
        raise PageError(f"exit status {process.returncode} of: {command}\n{''.join(lines[-3:])}")
    return "".join(lines)


def no_registry(image: str) -> str:
    """Return why an image's registry cannot be used, or an empty text if it answers."""
    registry, slash, _ = image.partition("/")
    if not slash or not re.search("[.:]|^localhost$", registry):
        return "begin the parameter image with a registry, like localhost:5000/tutorial/mnist:1"
    # As Fairing and fairing_compat.Builder do it; proxies None: all there are.
    scheme = "http" if re.match(r"localhost:|.*\.local(host)?(:\d+)?$", registry) else "https"
    proxies = {} if registry.startswith("localhost:") else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    try:
        opener.open(f"{scheme}://{registry}/v2/", timeout=10).close()
    except urllib.error.HTTPError as error:
        return "" if error.code == 401 else f"{registry} answers, but not as a registry ({error})"  # 401: log in
    except OSError as error:
        return f"{registry} does not answer ({getattr(error, 'reason', error)})"
    return ""


class Table:
    """Rows that show as HTML in a browser and as text in a terminal."""

    def __init__(self, rows, headers):
        self.rows, self.headers = rows, headers

    def __repr__(self):
        return tabulate(self.rows, self.headers, disable_numparse=True)

    def _repr_html_(self):
        html = tabulate(self.rows, self.headers, tablefmt="html", disable_numparse=True)
        return re.sub("<t([hd])>", r'<t\1 style="text-align: left">', html)


def what_is_installed(packages, *rows):
    """Return a Table of Python, some packages and the GPUs of this machine, and of more rows: what, found, note."""
    gpus = torch.cuda.device_count()
    gpu = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "none"
    versions = [["Python", sys.version.split()[0], ""], *([name, version(name), ""] for name in packages)]
    note = f"CUDA {torch.version.cuda}" if gpus else "training runs on the CPU"
    return Table([*versions, ["GPU", gpu, note], *rows], ["what", "found", "note"])


@dataclass
class TrainingLog:
    """What the trainer logged: lists of the epochs' numbers, losses and accuracies (0..1), and its speed."""

    epochs: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    test_losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    images_per_second: int = 0


def read_log(text: str, log: TrainingLog | None = None) -> TrainingLog:
    """Return the TrainingLog, a new one or the given, of the trainer's output.

    What a run that was resumed did twice counts once. Raises PageError if there is no end: the trainer stopped before.
    """
    log, epochs = log or TrainingLog(), {}
    for match in re.finditer(r"^Epoch: (\d+) - train_loss=(\S+) \w+_loss=(\S+) accuracy=(\S+)", text, re.MULTILINE):
        epochs[match[1]] = [int(match[1]), *map(float, match.groups()[1:])]
    if end := re.search(r"^Trained in \S+ s, (\d+) images/s", text, re.MULTILINE):
        log.epochs, log.train_losses, log.test_losses, log.accuracies = map(list, zip(*epochs.values()))
        log.images_per_second = int(end[1])
        return log
    raise PageError("the trainer stopped before its end: the lines above say why")


class Steps:
    """The steps of a page, for the table at its end."""

    def __init__(self):
        self.rows = {}  # by name, so that a cell that is run again replaces its row

    @contextlib.contextmanager
    def step(self, name):
        """Time a step; yield an object whose attribute result, a text, goes into the table."""
        step, started = SimpleNamespace(result=""), time.perf_counter()
        self.rows[name] = ["failed", "", ""]
        yield step
        self.rows[name] = ["ran", f"{time.perf_counter() - started:.1f}", step.result]

    @contextlib.contextmanager
    def training(self, name, digits):
        """Time a training; yield a TrainingLog that is filled at the end."""
        log = TrainingLog()
        with self.step(name) as step:
            with contextlib.closing(Tee(io.StringIO())) as tee:  # takes the place of sys.stdout
                yield log
                read_log(tee.file.getvalue(), log)
            step.result = f"{log.accuracies[-1]:.2%} of {digits.name}"

    def skip(self, name: str, reason: str) -> None:
        """Enter a step that was not run, and say so."""
        self.rows[name] = ["skipped", "", reason]
        print(f"Skipped: {reason}.")

    def table(self) -> Table:
        return Table([[name, *row] for name, row in self.rows.items()], ["step", "", "seconds", "result"])


def show(figure, alt):
    """Show a figure with an alternative text for those who cannot see it."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)
