"""Train MNIST in a Flyte workflow: get_data, then train, then evaluate. The trainer is mnist.py, as it is.

    pyflyte run flyte_mnist.py pipeline --data_dir data/MNIST/raw --hyperparameters '{"epochs": 1}'
    pyflyte run --remote --image IMAGE flyte_mnist.py pipeline --data_dir data/MNIST/raw --how job

The first runs it on this machine, the second on a Flyte installation. What a task asks of its cluster is fixed when it
is registered there, by these variables of whoever registers it:

    FLYTE_MNIST_GPUS       GPUs for each process, 0 or 1 (0)
    FLYTE_MNIST_WORKERS    processes besides the master, when how is job (2)
    FLYTE_MNIST_SECRET     1: the cluster has the key of Weights & Biases, as api_key in the secret wandb (0)
"""
import contextlib
import functools
import hashlib
import os
import struct
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from flytekit import HashMethod, PodTemplate, Resources, Secret, conditional, current_context, map_task, task, workflow
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.extend import IgnoreOutputs
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile, PNGImageFile
from flytekitplugins.kfpytorch import Elastic, Master, PyTorch, Worker
from kubernetes.client import V1PodSpec, V1Toleration
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from pydantic import BaseModel, Field, PositiveInt

import mnist


class Hyperparameters(BaseModel, extra="forbid", frozen=True):
    """What a training is told. A value that cannot be is refused by name, by Python or pyflyte, before all tasks."""

    batch_size: PositiveInt = 64
    test_batch_size: PositiveInt = 1000
    epochs: PositiveInt = 5
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False)
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    seed: int = Field(1, ge=0, lt=2**63)
    log_interval: PositiveInt = 128


class How(Enum):
    """How many processes train: one, two in one pod, or a master and workers with a pod each."""

    ALONE = "alone"
    ELASTIC = "elastic"
    JOB = "job"


class Trained(NamedTuple):
    accuracies: list[float]  # on the test images after each epoch, 0..1
    model: FlyteFile  # the weights, a state_dict
    records: FlyteDirectory  # the run of Weights & Biases


class Evaluated(NamedTuple):
    accuracy: float
    confusion: PNGImageFile


class Result(NamedTuple):
    accuracies: list[float]
    accuracy: float
    confusion: PNGImageFile
    model: FlyteFile
    records: FlyteDirectory


# The data


def fingerprint(data: FlyteDirectory) -> str:
    """Return a hash of the files' content: the cache must not ask where they lie."""
    digest = hashlib.sha256()
    for path in sorted(Path(data.path).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


Data = Annotated[FlyteDirectory, HashMethod(fingerprint)]


def folder(name):
    """Return a new folder of this task."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=current_context().working_directory))


def write_data(**splits):
    """Write images and labels, as mnist.load returns them for each split, to the four files of MNIST."""
    target = folder("data")
    for split, (images, labels) in splits.items():
        for name, values in ("images-idx3", images[:, 0]), ("labels-idx1", labels.byte()):
            header = struct.pack(f">{1 + values.dim()}i", 0x800 + values.dim(), *values.shape)
            (target / f"{split}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())
    return FlyteDirectory(str(target))


CODE = Path(mnist.__file__).read_bytes() + Path(__file__).read_bytes()  # once it changes, old results do not count
CACHED = dict(cache=True, cache_version=hashlib.sha256(CODE).hexdigest()[:12])
SMALL = dict(requests=Resources(cpu="500m", mem="1Gi"), limits=Resources(cpu="1", mem="2Gi"))


@task(**SMALL)
def get_data(data_dir: FlyteDirectory) -> Data:
    """Read the four files, gzipped or not; a missing or damaged one ends the workflow here."""
    source = data_dir.download()
    return write_data(train=mnist.load(source, "train"), t10k=mnist.load(source, "t10k"))


@task(**SMALL)
def hold_out(data: FlyteDirectory, train: int, test: int) -> Data:
    """Take the first images of the training set for training and the last ones for testing."""
    images, labels = mnist.load(data.download(), "train")
    if not 0 < train <= len(images) - test < len(images):
        raise ValueError(f"{train} images to train and {test} to test cannot be had of {len(images)}")
    return write_data(train=(images[:train], labels[:train]), t10k=(images[-test:], labels[-test:]))


# Training

GPUS = int(os.environ.get("FLYTE_MNIST_GPUS", 0))
WORKERS = int(os.environ.get("FLYTE_MNIST_WORKERS", 2))
if GPUS not in (0, 1) or WORKERS < 1:
    raise ValueError(f"FLYTE_MNIST_GPUS={GPUS} must be 0 or 1, FLYTE_MNIST_WORKERS={WORKERS} at least 1")
SECRET = Secret(group="wandb", key="api_key")


def resources(processes=1):
    """Return what a pod with so many training processes requests, and its limits."""
    gpus = {"gpu": str(GPUS * processes)} if GPUS else {}  # Kubernetes wants as many requested as the limit
    return dict(requests=Resources(cpu=f"{500 * processes}m", mem=f"{processes}Gi", **gpus),
                limits=Resources(cpu=str(processes), mem=f"{4 * processes}Gi", **gpus))


TRAINING = dict(
    **CACHED, retries=2,
    environment={"OMP_NUM_THREADS": "1"},  # no more threads than CPUs for them
    secret_requests=[SECRET] if os.environ.get("FLYTE_MNIST_SECRET") == "1" else None,
    pod_template=PodTemplate(pod_spec=V1PodSpec(containers=[], tolerations=[  # GPU nodes keep off what does not say so
        V1Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")])) if GPUS else None)


def safely(what, action, *args):
    """Return an action's result. If it fails, say that we go on without what it was for: training matters more."""
    try:
        return action(*args)
    except Exception as error:
        print(f"Without {what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)


def start_records(records, hyperparameters):
    """Return a run of Weights & Biases that keeps its files in a folder: online if there is a key, else offline."""
    import wandb  # here, so that it may be missing

    def start(mode, key=None):
        settings = wandb.Settings(api_key=key, init_timeout=20, finish_timeout=60, silent=True, console="off",
                                  disable_git=True, save_code=False, x_stats_sampling_interval=2)  # times in seconds
        return wandb.init(project="mnist", dir=records, config=hyperparameters.model_dump(), mode=mode,
                          settings=settings)

    key = os.environ.get("WANDB_API_KEY", "").strip()
    with contextlib.suppress(ValueError):  # no such secret
        key = key or current_context().secrets.get(SECRET.group, SECRET.key).strip()
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
    run = safely("a server for the records", start, mode, key or None) or start("offline")
    if not (run.offline or run.disabled):
        print(f"Records: {run.url}", flush=True)
    run.define_metric("*", step_metric="epoch")
    return run


def finish_records(run, model):
    """Add the model's file to a run, end it and wait until all of it is in its folder."""
    import wandb

    artifact = wandb.Artifact("mnist", type="model")
    artifact.add_file(str(model))
    run.log_artifact(artifact)
    run.finish()
    wandb.teardown()  # finish alone does not wait for the last bytes


def fit(hyperparameters, data):
    """Train in this process, which may be one of many; only the one of rank 0 has accuracies and files to return."""
    first = os.environ.get("RANK", "0") == "0"
    kept = current_context().checkpoint if first else None  # what this attempt saves there, the next one finds
    work, records = folder("training"), folder("records")
    checkpoint, model = work / "checkpoint.pt", work / "model.pt"

    def keep():
        if kept and checkpoint.exists():
            safely("a saved checkpoint", kept.save, checkpoint)

    def report(values):
        if run:
            safely("a record", run.log, values)
        if "accuracy" in values:
            keep()

    if kept:
        safely("an earlier checkpoint", kept.restore, work)  # it fails if an attempt before this one saved nothing
        keep()  # for the next attempt, should this one not get far
    run = safely("records", start_records, records, hyperparameters) if first else None
    try:
        _, accuracies = mnist.train(
            data.download(), hyperparameters.epochs, hyperparameters.batch_size, hyperparameters.test_batch_size,
            hyperparameters.learning_rate, hyperparameters.sgd_momentum, hyperparameters.seed,
            hyperparameters.log_interval, checkpoint=checkpoint, save_model=model, report=report)
    except SystemExit:  # told to stop, and has written a checkpoint
        keep()
        raise
    except mnist.TrainingError as error:
        if isinstance(error.__cause__, RuntimeError):  # lost the others: worth another attempt
            raise FlyteRecoverableException(str(error)) from error
        raise
    if run:
        safely("the end of the records", finish_records, run, model)
    return Trained(accuracies, FlyteFile(str(model)), FlyteDirectory(str(records)))


@task(**TRAINING, **resources())
def train(hyperparameters: Hyperparameters, data: FlyteDirectory) -> Trained:
    """Train in one process."""
    return fit(hyperparameters, data)


@task(**TRAINING, **resources(2), shared_memory=True,
      task_config=Elastic(nnodes=1, nproc_per_node=2, increase_shared_mem=False))
def train_elastic(hyperparameters: Hyperparameters, data: FlyteDirectory) -> Trained:
    """Train in two processes of one pod, which Flyte starts as torchrun would."""
    return fit(hyperparameters, data)


@task(**TRAINING, task_config=PyTorch(master=Master(**resources()), worker=Worker(replicas=WORKERS, **resources()),
                                      increase_shared_mem=False))
def train_job(hyperparameters: Hyperparameters, data: FlyteDirectory) -> Trained:
    """Train in several pods: Flyte makes a PyTorchJob. (On one machine, `pyflyte run` runs this in one process.)"""
    trained = fit(hyperparameters, data)
    if os.environ.get("RANK", "0") != "0":
        raise IgnoreOutputs  # those of the master count
    return trained


@task(**TRAINING, **resources())
def validate(hyperparameters: Hyperparameters, data: FlyteDirectory) -> float:
    """Train and return the last accuracy alone, as map_task wants one output. Records are kept only if online."""
    return fit(hyperparameters, data).accuracies[-1]


# Evaluation


@task(**CACHED, **SMALL)
def evaluate(model: FlyteFile, data: FlyteDirectory) -> Evaluated:
    """Read the test images with a trained model; draw which digits are taken for which."""
    net = mnist.Net()
    net.load_state_dict(torch.load(model.download(), weights_only=True))
    images, labels = mnist.load(data.download(), "t10k")
    with torch.inference_mode():
        answers = torch.cat([mnist.predict(net.eval(), part).argmax(1) for part in images.split(1000)])
    counts = torch.bincount(10 * labels + answers, minlength=100).view(10, 10)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues", norm=PowerNorm(0.3))  # few mistakes must show beside many right answers
    axes.set(xlabel="what the network reads", ylabel="what it is", xticks=range(10), yticks=range(10))
    for cell, count in enumerate(counts.flatten().tolist()):
        row, column = divmod(cell, 10)
        axes.text(column, row, count, ha="center", va="center", color="white" if row == column else "black")
    path = folder("evaluation") / "confusion.png"
    figure.savefig(path)
    return Evaluated((answers == labels).double().mean().item(), PNGImageFile(str(path)))


# Workflows


@workflow
def pipeline(data_dir: FlyteDirectory, how: How = How.ALONE,
             hyperparameters: Hyperparameters = Hyperparameters()) -> Result:
    """Get the data, train in one of three ways, evaluate."""
    data = get_data(data_dir=data_dir)
    trained = (conditional("how")
               .if_(how == How.ALONE.value).then(train(hyperparameters=hyperparameters, data=data))
               .elif_(how == How.ELASTIC.value).then(train_elastic(hyperparameters=hyperparameters, data=data))
               .else_().then(train_job(hyperparameters=hyperparameters, data=data)))
    evaluated = evaluate(model=trained.model, data=data)
    return Result(trained.accuracies, evaluated.accuracy, evaluated.confusion, trained.model, trained.records)


@workflow
def sweep(data_dir: FlyteDirectory, trials: list[Hyperparameters], train: int = 50_000,
          test: int = 10_000) -> list[float]:
    """Return each trial's accuracy on images held out of the training set: the test set is for the last question."""
    data = hold_out(data=get_data(data_dir=data_dir), train=train, test=test)
    return map_task(functools.partial(validate, data=data), concurrency=4)(hyperparameters=trials)
