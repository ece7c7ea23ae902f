"""Train MNIST in a Flyte workflow: get_data, then train, then evaluate. The trainer is mnist.py, unchanged.

    pyflyte run flyte_mnist.py pipeline --data_dir data/MNIST/raw --hyperparameters '{"epochs": 1}'
    pyflyte run --remote --image IMAGE flyte_mnist.py pipeline --data_dir data/MNIST/raw --launcher pytorchjob

The first runs it on this machine, the second on a Flyte installation, as these variables tell when it is registered:

    FLYTE_MNIST_GPUS       GPUs for each process, 0 or 1 (0)
    FLYTE_MNIST_WORKERS    processes besides the master of a PyTorchJob (2)
    FLYTE_MNIST_SECRET     1: the cluster has the key of Weights & Biases, as api_key in the secret wandb (0)
"""

import contextlib
import functools
import hashlib
import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import wandb
from flytekit import HashMethod, PodTemplate, Resources, Secret, conditional, current_context, map_task, task, workflow
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.extend import IgnoreOutputs
from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile
from flytekitplugins.kfpytorch import Elastic, Master, PyTorch, Worker
from kubernetes.client import V1PodSpec, V1Toleration
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

import mnist


class Hyperparameters(BaseModel, extra="forbid", frozen=True):
    """The hyperparameters of a training; one out of range raises ValidationError, before any task has started."""

    batch_size: PositiveInt = 512
    test_batch_size: PositiveInt = 1000
    epochs: PositiveInt = 5
    learning_rate: float = Field(0.1, gt=0, allow_inf_nan=False, serialization_alias="lr")  # mnist.train's name
    sgd_momentum: float = Field(0.7, ge=0, lt=1, serialization_alias="momentum")
    seed: int = Field(1, ge=0, lt=2**63)
    log_interval: NonNegativeInt = 0
    validation: NonNegativeInt = 0  # training images that are held out and reported on instead of the test set


class Trial(Hyperparameters, frozen=True):
    """The hyperparameters of one trial of a sweep, which must not choose by the test set."""

    validation: PositiveInt = 10_000


class Launcher(Enum):
    """Who starts the training processes: one alone, two in one pod, or a master and workers with a pod each."""

    SINGLE = "single"
    ELASTIC = "elastic"
    PYTORCHJOB = "pytorchjob"


class TrainingResult(NamedTuple):
    """Accuracies after each epoch (0..1), the file of the weights, the folder of the run of Weights & Biases."""

    accuracies: list[float]
    model: FlyteFile
    wandb_run: FlyteDirectory


class Evaluation(NamedTuple):
    """Accuracy on the test images (0..1); confusion[i][j] counts the images of digit i that were classified as j."""

    accuracy: float
    confusion: list[list[int]]


class PipelineResult(NamedTuple):
    """The outputs of the training and of the evaluation."""

    accuracies: list[float]
    accuracy: float
    confusion: list[list[int]]
    model: FlyteFile
    wandb_run: FlyteDirectory


def hash_files(data: FlyteDirectory) -> str:
    """Return a hash of the files' names and content: for the cache, it does not matter where the folder is."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(data.path).rglob("*") if path.is_file()):
        digest.update(path.relative_to(data.path).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@task(requests=Resources(cpu="500m", mem="1Gi"), limits=Resources(cpu="1", mem="2Gi"))
def get_data(data_dir: FlyteDirectory) -> Annotated[FlyteDirectory, HashMethod(hash_files)]:
    """Return the folder of MNIST's four files, gzipped or not; a missing or damaged one ends the workflow here."""
    folder = data_dir.download()
    for split in "train", "t10k":
        mnist.load(folder, split)
    return FlyteDirectory(folder)


CODE = Path(mnist.__file__).read_bytes() + Path(__file__).read_bytes()  # results of other code are not reused
CACHED = dict(cache=True, cache_version=hashlib.sha256(CODE).hexdigest()[:12])
GPUS, WORKERS = int(os.environ.get("FLYTE_MNIST_GPUS", 0)), int(os.environ.get("FLYTE_MNIST_WORKERS", 2))
if GPUS not in (0, 1) or WORKERS < 1:
    raise ValueError("FLYTE_MNIST_GPUS must be 0 or 1, FLYTE_MNIST_WORKERS at least 1")
GPU = "1" if GPUS else None  # of each process
SECRET = Secret(group="wandb", key="api_key")
TAINT = V1Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")  # that many GPU nodes have
TRAINING = dict(
    **CACHED, retries=2, environment={"OMP_NUM_THREADS": "1"},  # no more threads than a process has CPUs
    secret_requests=[SECRET] if os.environ.get("FLYTE_MNIST_SECRET") == "1" else None,
    pod_template=PodTemplate(pod_spec=V1PodSpec(containers=[], tolerations=[TAINT])) if GPUS else None)  # fmt: skip
POD = dict(requests=Resources(cpu="500m", mem="1Gi", gpu=GPU), limits=Resources(cpu="1", mem="4Gi", gpu=GPU))
WANDB = dict(  # times in seconds
    silent=True, console="off", disable_git=True, init_timeout=20, finish_timeout=60, x_stats_sampling_interval=2
)


@contextlib.contextmanager
def warn_on_error(what):
    """Print an error in one line and go on without something that is not worth losing a training for."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).partition("[type=")[0].split())  # pydantic's details would show a key
        print(f"Without {what}: {type(error).__name__}: {reason}", flush=True)


def start_run(config, folder):
    """Start a run of Weights & Biases with its files in a folder: online with a key; else, or if it fails, offline."""
    variables = {name: value.strip() for name, value in os.environ.items() if name.startswith("WANDB_")}
    key = variables.get("WANDB_API_KEY")
    with contextlib.suppress(ValueError):  # no such secret
        key = key or current_context().secrets.get(SECRET.group, SECRET.key).strip()
    variables["WANDB_MODE"] = variables.get("WANDB_MODE") or ("online" if key else "offline")
    os.environ.update(variables)  # without the newline that a value read from a file ends in
    for mode in variables["WANDB_MODE"], "offline", "disabled":
        with warn_on_error(f"W&B {mode}"):
            run = wandb.init(project="mnist", dir=folder, config=config, mode=mode, settings=WANDB | {"api_key": key})
            run.define_metric("*", step_metric="epoch")
            if not (run.offline or run.disabled):
                print(f"W&B run: {run.url}", flush=True)
            return run
        for name in [name for name in variables if not name.endswith(("_DIR", "_REPORTING"))]:
            os.environ.pop(name, None)  # W&B may have refused one of them


def fit(hyperparameters, data):
    """Train in this process, one of one or more; only rank 0 has a W&B run, checkpoints and files to return."""
    is_rank_zero = os.environ.get("RANK", "0") == "0"
    folder = Path(tempfile.mkdtemp(prefix="training-", dir=current_context().working_directory))
    checkpoint, model, run_folder = folder / "checkpoint.pt", folder / "model.pt", folder / "run"
    run_folder.mkdir()

    def save_checkpoint():
        if is_rank_zero and checkpoint.exists():
            with warn_on_error("a saved checkpoint"):
                current_context().checkpoint.save(checkpoint)

    def report(values):
        with warn_on_error("a line in the W&B run"):
            run.log(values)
        if "accuracy" in values:  # the end of an epoch
            save_checkpoint()

    if is_rank_zero:
        with warn_on_error("an earlier checkpoint"):  # the attempt before this one may have saved none
            current_context().checkpoint.restore(folder)
        save_checkpoint()  # should this attempt be killed before it saves one of its own
        run = start_run(hyperparameters.model_dump(), run_folder)
    try:
        values = hyperparameters.model_dump(by_alias=True)
        _, accuracies = mnist.train(data.download(), **values, checkpoint=checkpoint, save_model=model, report=report)
    except RuntimeError as error:  # of torch, when it loses another process
        raise FlyteRecoverableException(str(error)) from error  # of all exceptions, only this one is retried
    finally:
        save_checkpoint()  # after SIGTERM there is one from within the epoch
    if is_rank_zero:
        with warn_on_error("the end of the W&B run"):
            run.log_model(model, "mnist")
            run.finish()
            wandb.teardown()  # finish alone does not wait for the last bytes
    return TrainingResult(accuracies, FlyteFile(str(model)), FlyteDirectory(str(run_folder)))


@task(**POD, **TRAINING)
def train(hyperparameters: Hyperparameters, data: FlyteDirectory) -> TrainingResult:
    """Train in one process."""
    return fit(hyperparameters, data)


@task(requests=Resources(cpu="1", mem="2Gi", gpu=GPU and "2"), limits=Resources(cpu="2", mem="8Gi", gpu=GPU and "2"),
      task_config=Elastic(nnodes=1, nproc_per_node=2, increase_shared_mem=False), shared_memory=True,
      **TRAINING)  # fmt: skip
def train_elastic(hyperparameters: Hyperparameters, data: FlyteDirectory) -> TrainingResult:
    """Train in two processes of one pod, which Flyte starts as torchrun would."""
    return fit(hyperparameters, data)


@task(task_config=PyTorch(master=Master(**POD), worker=Worker(replicas=WORKERS, **POD), increase_shared_mem=False),
      **TRAINING)  # fmt: skip
def train_job(hyperparameters: Hyperparameters, data: FlyteDirectory) -> TrainingResult:
    """Train in several pods: Flyte makes a PyTorchJob. (On one machine, `pyflyte run` runs this in one process.)"""
    result = fit(hyperparameters, data)
    if os.environ.get("RANK", "0") != "0":
        raise IgnoreOutputs  # those of the master count
    return result


@task(**POD, **TRAINING)
def validate(hyperparameters: Trial, data: FlyteDirectory) -> float:
    """Train and return the last accuracy alone, as map_task wants one output. The W&B run is kept only if online."""
    return fit(hyperparameters, data).accuracies[-1]


@task(requests=Resources(cpu="500m", mem="1Gi"), limits=Resources(cpu="1", mem="2Gi"), **CACHED)
def evaluate(model: FlyteFile, data: FlyteDirectory) -> Evaluation:
    """Classify the test images with a trained model."""
    net = mnist.Net()
    net.load_state_dict(torch.load(model.download(), weights_only=True))
    images, labels = mnist.load(data.download(), "t10k")
    with torch.inference_mode():
        predicted = torch.cat([mnist.predict(net.eval(), part).argmax(1) for part in images.split(1000)])
    confusion = torch.bincount(10 * labels + predicted, minlength=100).view(10, 10)
    return Evaluation((predicted == labels).double().mean().item(), confusion.tolist())


@workflow
def pipeline(data_dir: FlyteDirectory, launcher: Launcher = Launcher.SINGLE,
             hyperparameters: Hyperparameters = Hyperparameters()) -> PipelineResult:  # fmt: skip  # noqa: B008
    """Get the data, train with one of the three launchers, evaluate."""
    data = get_data(data_dir=data_dir)
    inputs = dict(hyperparameters=hyperparameters, data=data)
    trained = (conditional("launcher")
               .if_(launcher == Launcher.SINGLE.value).then(train(**inputs))
               .elif_(launcher == Launcher.ELASTIC.value).then(train_elastic(**inputs))
               .else_().then(train_job(**inputs)))  # fmt: skip
    evaluated = evaluate(model=trained.model, data=data)
    return PipelineResult(trained.accuracies, evaluated.accuracy, evaluated.confusion, trained.model, trained.wandb_run)


@workflow
def sweep(data_dir: FlyteDirectory, trials: list[Trial]) -> list[float]:
    """Return each trial's accuracy on the training images that it held out."""
    data = get_data(data_dir=data_dir)
    return map_task(functools.partial(validate, data=data), concurrency=4)(hyperparameters=trials)
