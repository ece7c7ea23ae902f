"""What the pages share: how they start, call other programs, draw, and tell at the end what ran."""
import ast
import contextlib
import copy
import http.client
import io
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython import get_ipython
from IPython.display import display
from kubernetes.utils.quantity import parse_quantity
from tabulate import tabulate

PROJECT = Path(__file__).resolve().parents[1]
BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#999999", "#000000"  # Okabe and Ito: for colour-blind readers
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]  # for mnist.py and the modules beside this one

from mnist import TrainingError  # noqa: E402


class PageError(Exception):
    """Stops a page; the message says what is wrong and what to do."""

    def _render_traceback_(self):  # asked for by IPython: the message is all that a reader needs
        return [f"{type(self).__name__}: {self}"]


TrainingError._render_traceback_ = PageError._render_traceback_


def start():
    """Go to the project's folder, wherever the kernel was started, and check the parameters that papermill injected."""
    os.chdir(PROJECT)
    Path("build").mkdir(exist_ok=True)
    plt.rcParams.update({"figure.dpi": 96, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    cells = get_ipython().user_ns["In"]
    injected = next((i for i, cell in enumerate(cells) if cell.startswith("# Parameters\n")), None)
    if injected is None:
        return
    defaults = assignments(cells[injected - 1])
    for name, value in assignments(cells[injected]).items():
        if name not in defaults:
            raise PageError(f"there is no parameter {name!r}; this page has {', '.join(defaults)}")
        if type(value) is not type(defaults[name]):
            raise PageError(f"the parameter {name} is {value!r} but must be like {defaults[name]!r}, "
                            f"of type {type(defaults[name]).__name__} (papermill takes a text as it is by -r {name} ...)")


def assignments(source):
    """Return the names and values that a cell of plain assignments sets."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body
            if isinstance(node, ast.Assign)}


def get_resource(output):
    """Return the name, such as pytorchjob.kubeflow.org/mnist-x7k2p, of what `kubectl create` says it created.

    output: what kubectl printed, as text or as the object that %%capture fills. Raises PageError with kubectl's own
    words if it created nothing.
    """
    text = output if isinstance(output, str) else output.stdout + output.stderr
    created = re.search(r"^(\S+) created\r?$", text, re.MULTILINE)
    if not created:
        raise PageError(f"kubectl created nothing. It said: {text.strip() or '(nothing)'}")
    return created[1]


def shell(command, **environment):
    """Run a shell command in the project's folder, show its output as it comes and return it.

    Unlike `!`, it stops the page when the command fails. The environment's PATH begins with the folder of this Python.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    lines = []
    with subprocess.Popen(command, shell=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                          env={**os.environ, "PATH": path, **environment}) as process:
        try:
            for line in process.stdout:
                print(line, end="")
                lines.append(line)
        except BaseException:  # the reader interrupts the cell: end the command and all that it started
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        raise PageError(f"exit status {process.returncode} of: {command}\n{''.join(lines[-3:])}")
    return "".join(lines)


def answer(*command):
    """Return (whether it succeeded, what it printed) of a command that is asked for a fact."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout or done.stderr).strip()


def prerequisites(namespace, image, strict=False):
    """Return a Prerequisites table of what is here; with strict, raise PageError if cluster or registry are missing."""
    gpus = torch.cuda.device_count()
    rows = [["Python", platform.python_version(), ""], ["torch", version("torch"), ""],
            ["torchvision", version("torchvision"), ""],
            ["GPU", torch.cuda.get_device_name(0) if gpus else "none",
             f"{gpus} of them, CUDA {torch.version.cuda}" if gpus else "training runs on the CPU"]]
    missing = {}

    def check(name, found, value, way_out):
        rows.append([name, value if found else "none", "" if found else way_out])
        if not found:
            missing[name] = f"no {name}: {way_out}"
        return found

    kubectl = check("kubectl", shutil.which("kubectl"), "installed", "install kubectl to launch the job")
    named, context = answer("kubectl", "config", "current-context") if kubectl else (False, "")
    context = context if named else "the cluster around it"  # a pod's kubectl needs no kubeconfig
    # Not `get crd`: many may not read those. The list of kinds is open to all.
    found, kinds = answer("kubectl", "get", "--raw", "/apis/kubeflow.org/v1") if kubectl else (False, "no kubectl")
    missing_kind = not found and "(NotFound)" in kinds
    reason = f"{context} does not answer ({(kinds or 'no reason given').splitlines()[-1]})"
    reason = reason if named else "give kubectl a kubeconfig with a current context"
    if check("cluster", found or missing_kind, f"{context}, namespace {namespace}", reason):
        check("PyTorchJob", '"PyTorchJob"' in kinds, "the cluster knows this kind", "install the training operator")
    reason = no_registry(image)
    check("registry", not reason, image.split("/")[0], reason)
    if strict and missing:
        raise PageError("strict is set and there is " + "; ".join(missing.values()))
    reasons = [why for name, why in missing.items() if name != "registry"]
    return Prerequisites(rows, reasons[0] if reasons else "", missing.get("registry", ""))


def no_registry(image):
    """Return why an image's registry cannot be used, or an empty text if it answers."""
    registry, slash, _ = image.partition("/")
    if not slash or not re.search("[.:]|^localhost$", registry):
        return "begin the parameter image with a registry, like localhost:5000/tutorial/mnist:1"
    local = registry.split(":")[0] == "localhost"  # for which no proxy is right
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)
    try:
        opener.open(f"{'http' if local else 'https'}://{registry}/v2/", timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code == 401:  # it is there and wants a login
            return ""
        return f"{registry} answers, but not as a registry ({error})"
    except (OSError, http.client.HTTPException) as error:
        return f"{registry} does not answer ({error})"
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


class Prerequisites(Table):
    """The table of what is here; no_cluster and no_registry say why there is none, and are empty if there is one."""

    def __init__(self, rows, no_cluster, no_registry):
        super().__init__(rows, ["what", "found", "note"])
        self.no_cluster, self.no_registry = no_cluster, no_registry


class Ran:
    """Keeps account of a page's steps, for the table at its end."""

    def __init__(self):
        self.rows = []

    @contextlib.contextmanager
    def step(self, name):
        """Time a step; yield an object whose attribute result, a text, goes into the table."""
        step = Step()
        started = time.perf_counter()
        row = [name, "failed", "", ""]
        self.rows = [r for r in self.rows if r[0] != name] + [row]  # a cell that is run again replaces its row
        yield step
        row[1:] = "ran", f"{time.perf_counter() - started:.1f}", step.result

    @contextlib.contextmanager
    def training(self, name, digits):
        """Time a training; yield an object that holds, at the end, what the trainer logged, as read_log returns it."""
        with self.step(name) as step:
            with tee() as text:
                yield step
            step.__dict__.update(read_log(text.getvalue()))
            step.result = f"{step.accuracies[-1][1]:.2%} of {digits.name}"

    def skip(self, name, why):
        """Enter a step that was not run, and say so."""
        self.rows = [r for r in self.rows if r[0] != name] + [[name, "skipped", "", why]]
        print(f"Skipped: {why}.")

    def table(self):
        return Table(self.rows, ["step", "", "seconds", "result"])


class Step:
    """One step of a page; attributes are added as they become known."""

    result = ""


@contextlib.contextmanager
def tee():
    """Yield a buffer that gets a copy of all that is printed."""
    copy, shown = io.StringIO(), sys.stdout

    class Both(io.TextIOBase):
        def write(self, text):
            copy.write(text)
            return shown.write(text)

        def flush(self):
            shown.flush()

    with contextlib.redirect_stdout(Both()):
        yield copy


def read_log(text):
    """Return what the trainer logged: losses and accuracies as lists of (epochs trained, value), and images_per_second.

    Of a run that was started again only what counts is kept: the last start, and what came before its checkpoint.
    Raises PageError if the log has no end: the trainer stopped before.
    """
    losses, accuracies, kept = [], [], (0, 0)
    for line in text.splitlines():
        if match := re.match(r"Going on from .*: (\d+) epochs and (\d+) steps are done$", line):
            kept = int(match[1]), int(match[2])
        elif line.startswith("Training on "):
            # A checkpoint after some steps of an epoch is written when told to stop, so that all before it counts.
            losses = [loss for loss in losses if loss[0] <= kept[0] or kept[1]]
            accuracies = [accuracy for accuracy in accuracies if accuracy[0] <= kept[0]]
            kept = 0, 0
        elif match := re.match(r"Epoch: (\d+) \( *([\d.]+)%\) - Loss: (\S+)", line):
            losses.append((int(match[1]) - 1 + float(match[2]) / 100, float(match[3])))
        elif match := re.match(r"accuracy=(\S+)", line):
            accuracies.append((round(losses[-1][0]) if losses else 0, float(match[1])))
    end = re.search(r"^Trained in \S+ s, (\d+) images/s$", text, re.MULTILINE)
    if not end:
        raise PageError("the trainer stopped before its end: the lines above say why")
    return dict(losses=losses, accuracies=accuracies, images_per_second=int(end[1]))


def show(figure, alt):
    """Show a figure with an alternative text for those who cannot see it."""
    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def draw_all_reduce(processes, batch_size):
    """Return a figure of one training step: each process has its share of the batch, and all end with one gradient."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.75 * processes))
    axes.set(xlim=(0, 10), ylim=(processes, -0.7))
    axes.axis("off")
    middle = (processes - 1) / 2
    box = dict(boxstyle="round,pad=0.4", facecolor="white")
    arrow = dict(arrowstyle="->", color=GREY, shrinkA=4, shrinkB=4)
    for rank in range(processes):
        share = len(range(rank, batch_size, processes))
        axes.text(1.4, rank, f"rank {rank}: {share} images", ha="center", va="center", bbox=box | {"edgecolor": BLUE})
        axes.text(8.6, rank, f"rank {rank}: same weights", ha="center", va="center", bbox=box | {"edgecolor": BLUE})
        axes.annotate("", (4.1, middle), (2.6, rank), arrowprops=arrow)
        axes.annotate("", (7.3, rank), (5.9, middle), arrowprops=arrow)
    axes.text(5, middle, f"all-reduce\nsum of {processes} gradients", ha="center", va="center",
              bbox=box | {"edgecolor": ORANGE})
    for x, label in (1.4, "forward, backward"), (5, "exchange"), (8.6, "optimiser step"):
        axes.text(x, -0.7, label, ha="center", va="bottom", color="0.4")
    return figure


def replicas(manifest):
    """Return the number of pods that a PyTorchJob's manifest, as a dict, asks for."""
    return sum(spec.get("replicas", 1) for spec in manifest["spec"]["pytorchReplicaSpecs"].values())


def fill_in(manifest, image, epochs, seed, namespace="", workers=0, gpus=0, cpu="", memory="", checkpoint_claim=""):
    """Return a copy of a PyTorchJob's manifest with the values put in; 0 and "" leave what the manifest has.

    gpus, cpu and memory are those of each replica; checkpoint_claim names a PersistentVolumeClaim, on which the master
    keeps a checkpoint, so that the job goes on from there when a pod is lost. Raises PageError for a number of GPUs
    or CPUs that cannot be.
    """
    if gpus not in (0, 1):
        raise PageError(f"gpus is {gpus} but must be 0 or 1: a replica is one process, which uses one; take more workers")
    try:
        threads = max(1, math.ceil(parse_quantity(cpu or "1")))  # no more than there are CPUs for them
    except ValueError:
        raise PageError(f"cpu is {cpu!r} but must be a number of CPUs, like 2 or 500m") from None
    manifest = copy.deepcopy(manifest)
    if namespace:
        manifest["metadata"]["namespace"] = namespace
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    if workers:
        replicas["Worker"]["replicas"] = workers
    for spec in replicas.values():
        spec["template"] = copy.deepcopy(spec["template"])  # which the manifest states once for both
        container = spec["template"]["spec"]["containers"][0]
        container["image"] = image
        for flag, value in ("--epochs", epochs), ("--seed", seed):
            args = container["args"]
            args[args.index(flag) + 1] = str(value)
        requests, limits = (container["resources"].setdefault(kind, {}) for kind in ("requests", "limits"))
        if cpu:
            requests["cpu"] = cpu
            container["env"] = [{"name": "OMP_NUM_THREADS", "value": str(threads)}]
        if memory:
            requests["memory"] = limits["memory"] = memory
        if gpus:
            requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = gpus  # Kubernetes wants them equal
    if checkpoint_claim:
        pod = replicas["Master"]["template"]["spec"]
        pod["securityContext"]["fsGroup"] = pod["securityContext"]["runAsUser"]  # may write to the volume
        pod.setdefault("volumes", []).append(
            {"name": "checkpoints", "persistentVolumeClaim": {"claimName": checkpoint_claim}})
        container = pod["containers"][0]
        container.setdefault("volumeMounts", []).append({"name": "checkpoints", "mountPath": "/checkpoints"})
        label = {"fieldPath": "metadata.labels['training.kubeflow.org/job-name']"}
        container["env"].append({"name": "JOB_NAME", "valueFrom": {"fieldRef": label}})
        container["args"] += ["--checkpoint", "/checkpoints/$(JOB_NAME).pt"]  # one for each job
    return manifest
