"""What the Lightning page uses: a dstack server on this machine, its plans, and their commands rehearsed here."""
import contextlib
import gzip
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or dstack cannot be imported where there is no git
from dstack._internal.core.errors import DstackError  # noqa: E402
from dstack.api import Client, Task  # noqa: E402

from helpers import PageError, Table, shell  # noqa: E402

CONFIG = Path.home() / ".dstack" / "config.yml"  # dstack's own place for the servers of a user
# dstack's program, which ends when its standard input does: so the server goes with this process, however that ends.
PROGRAM = """
import os, threading
from dstack._internal.cli.main import main
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
main()
"""


def no_server(patience=10):
    """Return why no dstack server can take a run; an empty text if the configured one answers and has a fleet.

    patience: seconds to wait for its answer.
    """
    if not CONFIG.exists() and not (os.environ.get("DSTACK_SERVER_URL") and os.environ.get("DSTACK_TOKEN")):
        return "no dstack server is configured (dstack project add)"
    try:
        client = Client.from_config()
        url = client.client.base_url
        urllib.request.urlopen(f"{url}/healthcheck", timeout=patience).close()
        fleets = client.client.fleets.list(client.project)
    except DstackError as error:
        return f"dstack cannot be used: {str(error).splitlines()[0]}"
    except OSError as error:
        return f"the dstack server {url} does not answer ({getattr(error, 'reason', error)})"
    return "" if fleets else f"the project {client.project} of the dstack server {url} has no fleet"


def here(missing_server, strict=False):
    """Return a Table of what is here; with strict, raise PageError if there is no dstack server to take a run."""
    if strict and missing_server:
        raise PageError(f"strict is set, and nothing can run on dstack: {missing_server}")
    gpus = torch.cuda.device_count()
    online = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    return Table([*([name, version(name), ""] for name in ("torch", "lightning", "wandb", "dstack")),
                  ["GPUs", gpus or "none", "" if gpus else "training runs on the CPU"],
                  ["Weights & Biases", online, "" if online == "online" else "kept in a folder; no account needed"],
                  ["dstack server", "none to run on" if missing_server else "ready", missing_server]],
                 ["what", "found", "note"])


class Server:
    """A dstack server on this machine, which plans and has nothing to run on."""

    def __init__(self, url, token, environment):
        self.client = Client.from_config("main", url, token)
        self.environment = environment

    def plan(self, path, nodes=None, gpus=None, **variables):
        """Return the server's plan for a task's file, with other numbers of nodes and GPUs and other variables.

        Raises PageError if the file is no task for the server, or if the server refuses it.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
            values["nodes"] = values["nodes"] if nodes is None else nodes
            values["resources"]["gpu"] = values["resources"]["gpu"] if gpus is None else gpus
            values["env"] |= variables
            task = Task.model_validate(values)
            if task.nodes < 1 or task.resources.gpu.count.min < 1:  # which the server takes
                raise ValueError(f"{task.resources.gpu.count.min} GPUs and {task.nodes} nodes must be at least 1")
            return self.client.runs.get_run_plan(task, configuration_path=str(path))
        except (DstackError, ValueError, yaml.YAMLError, KeyError, TypeError, OSError) as error:
            raise PageError(f"{path} is no task for dstack: {type(error).__name__}: {error}") from error

    def apply(self, path, *options):
        """Show what `dstack apply` says of a file; its question, whether to submit the run, is answered by no."""
        command = [Path(sys.executable).parent / "dstack", "apply", "-f", path, *options]
        try:
            done = subprocess.run(command, input="n\n", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env=self.environment, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PageError(f"dstack apply did not answer: {error}") from error
        print(done.stdout)
        if done.returncode:
            raise PageError(f"dstack apply ended with {done.returncode}")


@contextlib.contextmanager
def server(folder, port=None, patience=120):
    """Start a dstack server on a port of this machine, any free one by default; yield a Server; stop it at the end.

    Its database and its user's settings are in a folder, which starts empty, so that yours stay as they are. It does
    not ask for the prices of clouds, which is work in the background. Raises PageError if the port is taken, or if it
    does not answer within `patience` seconds.
    """
    folder = Path(folder).absolute()
    port = free_port(port or 0)
    shutil.rmtree(folder, ignore_errors=True)
    checked = folder / ".cache" / ".dstack" / "cli" / "last_check"  # dstack asks for a newer version once a day
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.touch()
    url, token = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    unproxied = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith("DSTACK_") and name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}  # a kernel sets these
    environment = kept | {
        "HOME": str(folder), "DSTACK_SERVER_DIR": str(folder / "server"), "DSTACK_SERVER_ADMIN_TOKEN": token,
        "DSTACK_SERVER_CONFIG_DISABLED": "1", "DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED": "1",
        "DSTACK_SERVER_LOG_FORMAT": "standard", "COLUMNS": "100", "TERM": "dumb", "no_proxy": unproxied}
    before, log, started = os.environ.get("no_proxy"), folder / "server.log", []
    try:
        os.environ["no_proxy"] = unproxied  # for the client in this process
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "server", "--host", "127.0.0.1", "--port", str(port), "-l", "WARNING"],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        started.append(process)
        end = time.monotonic() + patience
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text().strip().splitlines()[-3:])
                raise PageError(f"the dstack server did not start; the end of its log:\n{last}")
            time.sleep(0.2)
        yield Server(url, token, environment)
    finally:
        stop(started)
        for process in started:
            process.stdin.close()
        if before is None:
            os.environ.pop("no_proxy", None)
        else:
            os.environ["no_proxy"] = before


def answers(url):
    """Tell whether a dstack server answers."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/healthcheck", timeout=5).close()
    except OSError:
        return False
    return True


def stop(processes, patience=15):
    """End processes, each the leader of a group, and what they started; after `patience` seconds, by force."""
    def left():
        for process in processes:
            process.poll()  # or it stays in its group as a zombie
            with contextlib.suppress(OSError):
                os.killpg(process.pid, 0)
                yield process.pid

    for sign in signal.SIGTERM, signal.SIGKILL:
        for group in left():
            with contextlib.suppress(OSError):  # it has just ended
                os.killpg(group, sign)
        end = time.monotonic() + patience
        while any(left()) and time.monotonic() < end:
            time.sleep(0.05)


def specs(plan):
    """Return the server's specification of each node of a plan."""
    return [job.job_spec for job in plan.job_plans]


def gpus(spec):
    return spec.requirements.resources.gpu.count.min


def table(plans):
    """Return a Table of what plans, by name, ask for, and how many machines are offered to them."""
    rows = []
    for name, plan in plans.items():
        asked = specs(plan)[0].requirements.resources
        rows.append([name, len(plan.job_plans), asked.gpu.count.min, f"{asked.cpu.count.min} or more",
                     f"{asked.memory.min:g} GB or more", sum(job.total_offers for job in plan.job_plans)])
    return Table(rows, ["plan", "machines", "GPUs of each", "CPUs", "memory", "offers"])


def commands(plan, node=0):
    """Return (what the server puts before a node's commands to set its container up, the commands)."""
    ours = " && ".join(plan.effective_run_spec.configuration.commands)
    *_, script = specs(plan)[node].commands
    if not script.endswith(f" && {ours}"):
        raise PageError("the server has changed the commands of the file")
    return script.removesuffix(f" && {ours}"), ours


def variables(plan, node):
    """Return what dstack's runner puts into the environment of a node, if all nodes were on this machine."""
    nodes, each = len(plan.job_plans), gpus(specs(plan)[node])
    return {"DSTACK_RUN_NAME": plan.effective_run_spec.run_name, "DSTACK_NODE_RANK": str(node),
            "DSTACK_NODES_NUM": str(nodes), "DSTACK_NODES_IPS": "\n".join(["127.0.0.1"] * nodes),
            "DSTACK_MASTER_NODE_IP": "127.0.0.1", "DSTACK_GPUS_PER_NODE": str(each),
            "DSTACK_GPUS_NUM": str(nodes * each)}


def rehearse(plan, folder, digits):
    """Run the commands of a plan's nodes on this machine, all at once, each in a folder of its own with its files.

    Two variables of the task's file have other values here: RESULTS, as there is no volume, and PORT, any free one.
    Each process takes the CPU in place of a GPU. Shows what node 0 prints; what the others print goes to their file
    log. Returns what node 0 printed and its folder. Raises PageError if a node fails, and ends the others.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "OMP_NUM_THREADS")}
    port, folders, nodes = str(free_port()), [], []
    for node in range(len(specs(plan))):
        place = Path(folder).absolute() / f"node-{node}"
        shutil.rmtree(place, ignore_errors=True)
        unpack(digits, place / "data" / "MNIST" / "raw")
        for file in plan.effective_run_spec.configuration.files:
            shutil.copy(file.local_path, place / file.path)
        (place / "results").mkdir()
        folders.append(place)
    try:
        for node, (spec, place) in enumerate(zip(specs(plan), folders)):
            # Offline: what is to be installed is here already, and nothing is put in its place.
            environment = {**kept, "PATH": path, "UV_PYTHON": sys.executable, "UV_OFFLINE": "1",
                           "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false",
                           "DO_NOT_TRACK": "1", **{f"WANDB_{kind}_DIR": str(place / "wandb")
                                                   for kind in ("DATA", "CACHE", "CONFIG")},
                           **spec.env, **variables(plan, node), "PORT": port, "RESULTS": str(place / "results")}
            with open(place / "log", "w") as log:
                nodes.append(subprocess.Popen(["/bin/bash", "-c", commands(plan, node)[1]], cwd=place, env=environment,
                                              stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                              start_new_session=True))
        with open(folders[0] / "log") as log:
            running = True
            while running:
                running = any(node.poll() is None for node in nodes) and not any(node.poll() for node in nodes)
                print(log.read(), end="", flush=True)
                time.sleep(0.1)
        failed = [number for number, node in enumerate(nodes) if node.poll()]  # before the others are ended
    finally:
        stop(nodes)
    for node in failed[:1]:
        last = "\n".join((folders[node] / "log").read_text().splitlines()[-5:])
        raise PageError(f"node {node} ended with {nodes[node].returncode}; the end of its log:\n{last}")
    return (folders[0] / "log").read_text(), folders[0]


def unpack(digits, target):
    """Write the four files of digits unpacked into a folder, where torchvision looks for them before it downloads."""
    target.mkdir(parents=True)
    for path in digits.files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (target / path.name.removesuffix(".gz")).write_bytes(content)


def submit(path, *options):
    """Run a task on the configured dstack server as `dstack apply` does, and show its log; stop it if this is stopped.

    Returns the name of the run, one of its own, so that no other run is taken for it. Raises PageError if it fails.
    """
    name = f"{yaml.safe_load(Path(path).read_text())['name']}-{secrets.token_hex(3)}"
    try:
        shell(shlex.join(["dstack", "apply", "-y", "-f", path, "--name", name, *options]))
    finally:
        with contextlib.suppress(DstackError):  # the server is away: what has happened before matters more
            run = Client.from_config().runs.get(name)
            if run and not run.status.is_finished():
                run.stop()
                print(f"The run {name} is told to stop.")
    return name


def free_port(port=0):
    """Return a port of this machine, any free one for 0; raise PageError if it is taken."""
    try:
        with socket.create_server(("127.0.0.1", port)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise PageError(f"no dstack server can be started on port {port}: {os.strerror(error.errno)}") from error
