"""What the Flyte page uses: what is here, a package looked into, a task's pod rehearsed on this machine."""
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import grpc
import torch
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.core.literals_pb2 import LiteralMap
from flyteidl.core.tasks_pb2 import Resources
from flyteidl.plugins.kubeflow.pytorch_pb2 import DistributedPyTorchTrainingTask
from flytekit.configuration import PlatformConfig
from flytekit.configuration.file import get_config_file
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import LiteralMap as Literals
from google.protobuf.json_format import MessageToDict, ParseDict

from helpers import PageError, Table


def no_backend(patience=10):
    """Return why no Flyte installation can be used; an empty text if the one that is configured answers.

    patience: seconds to wait for its answer.
    """
    if not (os.environ.get("FLYTE_PLATFORM_URL") or get_config_file(None)):
        return "no Flyte installation is configured (flytectl config init, or FLYTE_PLATFORM_URL)"
    platform = PlatformConfig.auto()
    with (grpc.insecure_channel(platform.endpoint) if platform.insecure else
          grpc.secure_channel(platform.endpoint, grpc.ssl_channel_credentials())) as channel:
        try:
            grpc.channel_ready_future(channel).result(patience)
        except grpc.FutureTimeoutError:
            return f"the Flyte installation {platform.endpoint} does not answer"
    return ""


def here(missing_backend, strict=False):
    """Return a Table of what is here; with strict, raise PageError if there is no Flyte installation to use."""
    if strict and missing_backend:
        raise PageError(f"strict is set, and the workflow cannot run on a Flyte installation: {missing_backend}")
    online = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return Table([*([name, version(name), ""] for name in ("torch", "flytekit", "wandb", "flyte")),
                  ["GPU", gpu or "none", "" if gpu else "training runs on the CPU"],
                  ["Weights & Biases", online, "" if online == "online" else "kept in a folder; no account needed"],
                  ["Flyte installation", "none" if missing_backend else PlatformConfig.auto().endpoint,
                   missing_backend]], ["what", "found", "note"])


@contextlib.contextmanager
def signals_kept():
    """Put the handlers of signals back at the end: torch's launcher leaves its own, and no cell could be stopped."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                                                signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_package(path):
    """Return the task templates of what `pyflyte package` made, by the tasks' names without their module's."""
    templates = {}
    with tarfile.open(path) as package:
        for member in sorted(package.getnames()):
            if member.endswith("_1.pb"):  # 1 is a task, 2 a workflow, 3 a launch plan
                template = TaskSpec.FromString(package.extractfile(member).read()).template
                templates[template.id.name.split(".")[-1]] = template
    return {name: template for name, template in templates.items() if not name.startswith("map_")}


def pytorch_job(template):
    """Return the DistributedPyTorchTrainingTask that a task template holds for Flyte's PyTorch plugin."""
    return ParseDict(MessageToDict(template.custom), DistributedPyTorchTrainingTask())


def amounts(entries):
    """Return the requests or limits of a template's resources as a dict, like {"CPU": "500m", "MEMORY": "1Gi"}."""
    return {Resources.ResourceName.Name(entry.name): entry.value for entry in entries}


def pods(templates):
    """Return a Table of the pods that each task would have, with what each of them requests and its limits."""
    def texts(resources):
        return [", ".join(f"{name.lower()} {amount}" for name, amount in amounts(entries).items())
                for entries in (resources.requests, resources.limits)]

    rows = []
    for name, template in templates.items():
        if template.type == "pytorch":
            job = pytorch_job(template)
            rows += [[name, template.type, f"{spec.replicas} {role}", *texts(spec.resources)] for role, spec in (
                ("master", job.master_replicas), ("worker", job.worker_replicas))]
        elif template.HasField("k8s_pod"):  # with GPUs, as their nodes have to be tolerated
            container, = template.k8s_pod.pod_spec["containers"]
            rows.append([name, template.type, "1", *(", ".join(f"{what} {amount}" for what, amount in sorted(
                container["resources"][kind].items())) for kind in ("requests", "limits"))])
        else:
            rows.append([name, template.type, "1", *texts(template.container.resources)])
    return Table(rows, ["task", "type", "pods", "each requests", "limits"])


class Pod:
    """A task's pod, rehearsed as a process on this machine: what Flyte would run in it, with the same arguments.

    On a cluster, Flyte's engine (Propeller) puts the places of inputs, outputs and checkpoints into the arguments of
    the task's container. Here they are in a folder. Each attempt finds the checkpoint of the one before it.
    """

    def __init__(self, template, folder, task, **inputs):
        self.template, self.folder, self.task = template, Path(folder), task
        self.folder.mkdir(parents=True)
        literals = TypeEngine.dict_to_literal_map(FlyteContextManager.current_context(), inputs,
                                                  task.python_interface.inputs)
        (self.folder / "inputs.pb").write_bytes(literals.to_flyte_idl().SerializeToString())

    def command(self, attempt):
        """Return the command of an attempt, 1 or later."""
        before = self.folder / f"checkpoint-{attempt - 1}"  # given by Propeller whether there is one or not
        places = {"input": self.folder / "inputs.pb", "outputPrefix": self.folder / f"outputs-{attempt}",
                  "rawOutputDataPrefix": self.folder / f"files-{attempt}",
                  "checkpointOutputPrefix": self.folder / f"checkpoint-{attempt}",
                  "prevCheckpointPrefix": before if attempt > 1 else ""}
        command = list(self.template.container.args)
        for name, place in places.items():
            command = [argument.replace(f"{{{{.{name}}}}}", str(place)) for argument in command]
        return command

    def start(self, attempt, **environment):
        """Start an attempt; return its process, whose stdout has all that it prints."""
        program, *arguments = self.command(attempt)
        ours = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # of this process's W&B
        return subprocess.Popen([Path(sys.executable).parent / program, *arguments], text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**ours, **environment})

    def literals(self, attempt):
        """Return the outputs of an attempt that came to its end, as Flyte's literals by name."""
        path = self.folder / f"outputs-{attempt}" / "outputs.pb"
        if not path.exists():
            raise PageError(f"attempt {attempt} of {self.template.id.name} has no outputs: see what it printed")
        return LiteralMap.FromString(path.read_bytes()).literals

    def outputs(self, attempt):
        """Return the same as Python's values."""
        literals = Literals.from_flyte_idl(LiteralMap(literals=self.literals(attempt)))
        return TypeEngine.literal_map_to_kwargs(FlyteContextManager.current_context(), literals,
                                                self.task.python_interface.outputs)
