"""What the Flyte page uses: whether Flyte answers, what a package holds, a task's pod rehearsed on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import grpc
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.core.literals_pb2 import LiteralMap
from flyteidl.core.tasks_pb2 import Resources
from flyteidl.plugins.kubeflow.pytorch_pb2 import DistributedPyTorchTrainingTask
from flytekit.clients.auth_helper import get_channel
from flytekit.configuration import PlatformConfig
from flytekit.configuration.file import get_config_file
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import LiteralMap as Literals
from google.protobuf.json_format import MessageToDict, ParseDict

from support.page import PageError, Table


def no_backend(timeout: float = 10) -> str:
    """Return why no Flyte installation can be used; an empty text if the configured one answers in time (seconds)."""
    if not (os.environ.get("FLYTE_PLATFORM_URL") or get_config_file(None)):
        return "no Flyte installation is configured (flytectl config init, or FLYTE_PLATFORM_URL)"
    platform = PlatformConfig.auto()
    with get_channel(platform) as channel, contextlib.suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout)
        return ""
    return f"the Flyte installation {platform.endpoint} does not answer"


@contextlib.contextmanager
def restore_signal_handlers():
    """Restore the signal handlers at the end: torch's launcher leaves its own, and no cell could be interrupted."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_package(path: str | Path) -> dict:
    """Return the task templates in a package of `pyflyte package`, by the tasks' names without the module's."""
    templates = {}
    with tarfile.open(path) as package:
        for member in sorted(package.getnames()):
            if member.endswith("_1.pb") and ".map_" not in member:  # 1 is a task, 2 a workflow, 3 a launch plan
                template = TaskSpec.FromString(package.extractfile(member).read()).template
                templates[template.id.name.split(".")[-1]] = template
    return templates


def pytorch_job(template):
    """Return the DistributedPyTorchTrainingTask that a task template holds for Flyte's PyTorch plugin."""
    return ParseDict(MessageToDict(template.custom), DistributedPyTorchTrainingTask())


def amounts(entries) -> dict[str, str]:
    """Return the requests or limits of a template's resources as a dict, like {"CPU": "500m", "MEMORY": "1Gi"}."""
    return {Resources.ResourceName.Name(entry.name): entry.value for entry in entries}


def pods(templates):
    """Return a Table of the pods that each task would have, with the requests and limits of each pod."""
    rows = []

    def add(count, requests, limits):
        texts = [", ".join(f"{what.lower()} {value}" for what, value in kind.items()) for kind in (requests, limits)]
        rows.append([template.id.name.split(".")[-1], template.type, count, *texts])

    for template in templates.values():
        if template.type == "pytorch":
            job = pytorch_job(template)
            for role, spec in ("master", job.master_replicas), ("worker", job.worker_replicas):
                add(f"{spec.replicas} {role}", amounts(spec.resources.requests), amounts(spec.resources.limits))
        elif template.HasField("k8s_pod"):  # with GPUs, because of the toleration
            (container,) = template.k8s_pod.pod_spec["containers"]
            add("1", **container["resources"])
        else:
            add("1", amounts(template.container.resources.requests), amounts(template.container.resources.limits))
    return Table(rows, ["task", "type", "pods", "requests of each", "limits of each"])


class Pod:
    """A task's pod, simulated by a process on this machine: what Flyte would run in it, with the same arguments.

    The locations of inputs, outputs and checkpoints, which Flyte's engine (Propeller) puts into the arguments, are in a
    folder. Each attempt finds the checkpoint of the one before it.
    """

    def __init__(self, template, folder, task, **inputs):
        self.template, self.folder, self.task = template, Path(folder), task
        self.folder.mkdir(parents=True)
        context, types = FlyteContextManager.current_context(), task.python_interface.inputs
        literals = TypeEngine.dict_to_literal_map(context, inputs, types)
        (self.folder / "inputs.pb").write_bytes(literals.to_flyte_idl().SerializeToString())

    def command(self, attempt):
        """Return the command of an attempt, 1 or later."""
        locations = {
            "input": self.folder / "inputs.pb",
            "outputPrefix": self.folder / f"outputs-{attempt}",
            "rawOutputDataPrefix": self.folder / f"files-{attempt}",
            "checkpointOutputPrefix": self.folder / f"checkpoint-{attempt}",
            "prevCheckpointPrefix": self.folder / f"checkpoint-{attempt - 1}" if attempt > 1 else "",  # or none
        }
        command = list(self.template.container.args)
        for name, location in locations.items():
            command = [argument.replace(f"{{{{.{name}}}}}", str(location)) for argument in command]
        return command

    def start(self, attempt, **environment):
        """Start an attempt, apart from this process's W&B (WANDB_SERVICE); return its process, which has a stdout."""
        program, *arguments = self.command(attempt)
        environment = {name: value for name, value in {**os.environ, **environment}.items() if name != "WANDB_SERVICE"}
        options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        return subprocess.Popen([Path(sys.executable).parent / program, *arguments], text=True, **options)

    def literals(self, attempt):
        """Return the outputs of an attempt that came to its end, as Flyte's literals by name."""
        path = self.folder / f"outputs-{attempt}" / "outputs.pb"
        if not path.exists():
            raise PageError(f"attempt {attempt} of {self.template.id.name} has no outputs: see what it printed")
        return LiteralMap.FromString(path.read_bytes()).literals

    def outputs(self, attempt):
        """Return the same as Python's values."""
        literals = Literals.from_flyte_idl(LiteralMap(literals=self.literals(attempt)))
        context, types = FlyteContextManager.current_context(), self.task.python_interface.outputs
        return TypeEngine.literal_map_to_kwargs(context, literals, types)
