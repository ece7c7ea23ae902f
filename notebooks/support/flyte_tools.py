"""What the Flyte page uses: folders, graphs of workflows, what a package holds, a task's pod played on this machine."""

import contextlib
import os
import re
import shlex
import tarfile
from pathlib import Path

os.environ.update(FLYTE_SDK_RICH_TRACEBACKS="0", WANDB_ERROR_REPORTING="false", DO_NOT_TRACK="1")  # read at import

import flyte._persistence._db
import flytekit.core.local_cache
import grpc
import networkx as nx
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.core.literals_pb2 import LiteralMap
from flyteidl.plugins.kubeflow.pytorch_pb2 import DistributedPyTorchTrainingTask
from flytekit import FlyteContextManager
from flytekit.clients.auth_helper import get_channel
from flytekit.configuration import PlatformConfig, get_config_file
from flytekit.extend import TypeEngine
from flytekit.models.literals import LiteralMap as Literals
from google.protobuf.json_format import MessageToDict, ParseDict

from support.page import BLACK, BLUE, PageError, Process, Table


def use_folder(folder: Path, **variables) -> None:
    """Let Flyte 1, Flyte 2 and W&B keep their files in a folder, an absolute path; set other variables, too."""
    variables |= {f"WANDB_{kind}_DIR": folder / "wandb" for kind in ("DATA", "CACHE", "CONFIG")}
    os.environ.update({name: str(value) for name, value in variables.items()}, FLYTE_SDK_LOCAL_SANDBOX=str(folder))
    FlyteContextManager.initialize()  # once more: the last variable is read only here, and when flytekit is imported
    flytekit.core.local_cache.CACHE_LOCATION = f"{folder}/cache"
    flyte._persistence._db.LocalDB._get_cache_dir = staticmethod(lambda: folder / "cache2")


def no_backend(timeout: float = 10) -> str:
    """Return why no Flyte installation can be used; an empty text if the configured one answers in time (seconds)."""
    if not (os.environ.get("FLYTE_PLATFORM_URL") or get_config_file(None)):
        return "no Flyte installation is configured (flytectl config init, or FLYTE_PLATFORM_URL)"
    platform = PlatformConfig.auto()
    with get_channel(platform) as channel, contextlib.suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout)
        return ""
    return f"the Flyte installation {platform.endpoint} does not answer"


def draw(workflow, axes):
    """Draw a workflow's graph: its tasks, and an arrow wherever one takes what another returns."""
    graph, names, ends, boxes = nx.DiGraph(), {}, {}, {}
    for node in workflow.nodes:
        cases = [(node, "")]
        if branch := getattr(node.flyte_entity, "_ifelse_block", None):  # of a conditional
            whens = [(case.then_node, case.condition.comparison.right_value) for case in (branch.case, *branch.other)]
            cases = [(then, f"\nif {value.primitive.string_value}") for then, value in whens]
            cases.append((branch.else_node, "\nelse"))
        ends[node.id] = [node.id + when for _, when in cases]
        for (case, when), end in zip(cases, ends[node.id]):
            each = getattr(case.flyte_entity, "python_function_task", None)  # of map_task
            names[end] = (each or case.flyte_entity).name.split(".")[-1] + ("\nfor each" if each else when)
            graph.add_node(end)
            graph.add_edges_from((start, end) for node in case.upstream_nodes for start in ends.get(node.id, []))
    for x, layer in enumerate(nx.topological_generations(graph)):
        for y, end in enumerate(layer):
            look = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=BLUE)
            boxes[end] = axes.text(x, len(layer) / 2 - y, names[end], ha="center", va="center", bbox=look)
    for start, end in graph.edges:
        one, other = boxes[start].get_position(), boxes[end].get_position()
        arrow = dict(patchA=boxes[start].get_bbox_patch(), patchB=boxes[end].get_bbox_patch(), arrowstyle="-|>")
        arrow |= dict(connectionstyle="arc3,rad=-0.45") if other[0] - one[0] > 1 else {}  # over what lies between
        axes.annotate("", other, one, arrowprops=dict(arrow, mutation_scale=15, color=BLACK))
    axes.set(xlim=(-0.4, x + 0.4), ylim=(-1.3, 2.7), title=workflow.name.split(".")[-1])
    axes.set_axis_off()


def read_package(path: str | Path) -> dict:
    """Return the task templates in a package of `pyflyte package`, by the tasks' names without the module's."""
    with tarfile.open(path) as package:
        names = sorted(name for name in package.getnames() if name.endswith("_1.pb"))  # 2: a workflow, 3: a launch plan
        files = [package.extractfile(name) for name in names if ".map_" not in name]
        templates = [TaskSpec.FromString(file.read()).template for file in files]
    return {template.id.name.split(".")[-1]: template for template in templates}


def pods(templates):
    """Return a Table of the pods that each task would have, with the requests and limits of each pod."""
    rows = []
    for name, template in templates.items():
        resources = {"1": template.container.resources}
        if template.type == "pytorch":
            job = ParseDict(MessageToDict(template.custom), DistributedPyTorchTrainingTask())
            roles = {"master": job.master_replicas, "worker": job.worker_replicas}
            resources = {f"{spec.replicas} {role}": spec.resources for role, spec in roles.items()}
        elif template.HasField("k8s_pod"):  # with GPUs, because of the toleration
            resources = {"1": template.k8s_pod.pod_spec["containers"][0]["resources"]}
        for count, each in resources.items():
            kinds = [MessageToDict(each)[kind] for kind in ("requests", "limits")]
            pairs = [kind.items() if isinstance(kind, dict) else [e.values() for e in kind] for kind in kinds]
            rows.append([name, template.type, count, *(", ".join(f"{a.lower()} {b}" for a, b in p) for p in pairs)])
    return Table(rows, ["task", "type", "pods", "requests of each", "limits of each"])


class Pod:
    """A task's pod, simulated by a process on this machine: what Flyte would run in it, with the same arguments."""

    def __init__(self, template, folder, task, **inputs):
        self.template, self.folder, self.task = template, Path(folder), task
        self.folder.mkdir(parents=True, exist_ok=True)  # if the cell is run again
        context = FlyteContextManager.current_context()
        literals = TypeEngine.dict_to_literal_map(context, inputs, task.python_interface.inputs)
        (self.folder / "inputs.pb").write_bytes(literals.to_flyte_idl().SerializeToString())

    def command(self, attempt):
        """Return the command of an attempt, 1 or later, with places in the folder for what Propeller would fill in."""
        names = {"input": "inputs.pb", "outputPrefix": f"outputs-{attempt}", "rawOutputDataPrefix": f"files-{attempt}"}
        names |= dict(checkpointOutputPrefix=f"checkpoint-{attempt}", prevCheckpointPrefix=f"checkpoint-{attempt - 1}")
        place = {name: str(self.folder / target) for name, target in names.items() if target != "checkpoint-0"}
        return [re.sub(r"{{\.(\w+)}}", lambda match: place.get(match[1], ""), a) for a in self.template.container.args]

    def start(self, attempt, **environment):
        """Start an attempt, apart from this process's W&B (WANDB_SERVICE); return its process, which has a stdout."""
        return Process(f"exec env -u WANDB_SERVICE {shlex.join(self.command(attempt))}", **environment)

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
