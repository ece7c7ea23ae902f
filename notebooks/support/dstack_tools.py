"""A dstack server on this machine, its plans of tasks, and a rehearsal of their commands."""

import contextlib
import gzip
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or dstack cannot be imported where there is no git
from dstack._internal.core.errors import DstackError  # noqa: E402
from dstack.api import Client, Task  # noqa: E402

from support.page import PageError, Table, shell  # noqa: E402

CONFIG = Path.home() / ".dstack" / "config.yml"  # dstack's own place for the servers of a user
PLAIN = dict(COLUMNS="100", TERM="dumb", FORCE_COLOR="", CLICOLOR_FORCE="0")  # no colours, which a kernel asks for
# dstack's program, ended with its standard input: so it does not outlive this process, even if that is killed.
PROGRAM = """
import os, threading
from dstack._internal.cli.main import main
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
main()
"""


def no_server(timeout: float = 10) -> str:
    """Return why no dstack server can take a run, or "" if one answers within `timeout` seconds and has a fleet."""
    if not CONFIG.exists() and not (os.environ.get("DSTACK_SERVER_URL") and os.environ.get("DSTACK_TOKEN")):
        return "no dstack server is configured (dstack project add)"
    try:
        client = Client.from_config()
        urllib.request.urlopen(f"{client.client.base_url}/healthcheck", timeout=timeout).close()
        fleets = client.client.fleets.list(client.project)
    except (DstackError, OSError) as error:
        return f"the configured dstack server cannot be used: {str(error).splitlines()[0]}"
    return "" if fleets else f"the project {client.project} of the configured dstack server has no fleet"


class Server:
    """A dstack server that plans runs, and has nothing to run them on."""

    def __init__(self, url, token, home):
        self.client = Client.from_config("main", url, token)
        self.variables = dict(HOME=home, DSTACK_PROJECT="main", DSTACK_SERVER_URL=url, DSTACK_TOKEN=token, **PLAIN)

    def plan(self, path, nodes=None, gpus=None, **variables):
        """Return the server's plan of a task's file, with other numbers of nodes and GPUs and other variables.

        Raises PageError if the file is not a valid task.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
            values["nodes"] = nodes or values["nodes"]
            values["resources"]["gpu"] = gpus or values["resources"]["gpu"]
            values["env"] |= variables
            return self.client.runs.get_run_plan(Task.model_validate(values), configuration_path=str(path))
        except (DstackError, ValueError, yaml.YAMLError, KeyError, TypeError, OSError) as error:
            raise PageError(f"{path} is not a valid task: {type(error).__name__}: {error}") from error

    def apply(self, path, *options):
        """Show what `dstack apply` says of a file; its question, whether to submit the run, is answered by no."""
        shell("echo n | " + shlex.join(["dstack", "apply", "-f", path, *options]), **self.variables)


@contextlib.contextmanager
def server(folder, timeout=120):
    """Start a dstack server on a free port of this machine; yield a Server; stop it at the end.

    Its database and its user's settings are in a folder, which starts empty, so that yours stay as they are. It does
    not ask clouds for their prices. Raises PageError if it does not answer within `timeout` seconds.
    """
    folder = Path(folder).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    checked = folder / ".cache" / ".dstack" / "cli" / "last_check"  # dstack asks for a newer version once a day
    checked.parent.mkdir(parents=True)
    checked.touch()
    port, token, log = get_free_port(), secrets.token_hex(16), folder / "server.log"
    url = f"http://127.0.0.1:{port}"
    unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [unproxied, "127.0.0.1"]))  # for the client here, too
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSTACK_")} | {
        "HOME": str(folder), "DSTACK_SERVER_DIR": f"{folder}/server", "DSTACK_SERVER_ADMIN_TOKEN": token,
        "DSTACK_SERVER_CONFIG_DISABLED": "1", "DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED": "1",
        "DSTACK_SERVER_LOG_FORMAT": "standard", **PLAIN}  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, "server", "--host", "127.0.0.1", "--port", str(port), "-l", "WARNING"]
    with open(log, "w") as output:
        options = dict(stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True)
        process = subprocess.Popen(command, **options)
    try:
        end = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/healthcheck", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text().strip().splitlines()[-3:])
                raise PageError(f"the dstack server did not start; the end of its log:\n{last}")
            time.sleep(0.2)
        yield Server(url, token, str(folder))
    finally:
        terminate_groups([process])
        process.stdin.close()


def terminate_groups(processes, timeout=15):
    """End processes, each the leader of a group, and what they started; after `timeout` seconds, by force."""
    for number in signal.SIGTERM, signal.SIGKILL:
        for process in processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # the group has ended
                os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)


def table(plans):
    """Return a Table of what plans, by name, ask for, and how many machines are offered to them."""
    rows = []
    for name, plan in plans.items():
        asked = plan.job_plans[0].job_spec.requirements.resources
        cpus, memory = f"{asked.cpu.count.min} or more", f"{asked.memory.min:g} GB or more"
        offers = sum(job.total_offers for job in plan.job_plans)
        rows.append([name, len(plan.job_plans), asked.gpu.count.min, cpus, memory, offers])
    return Table(rows, ["plan", "machines", "GPUs of each", "CPUs", "memory", "offers"])


def commands(plan, node=0):
    """Return (what the server puts before a node's commands to set its container up, the commands)."""
    ours = " && ".join(plan.effective_run_spec.configuration.commands)
    return plan.job_plans[node].job_spec.commands[-1].removesuffix(f" && {ours}"), ours


def variables(plan, node):
    """Return what dstack's runner puts into the environment of a node, if all nodes were on this machine."""
    nodes = len(plan.job_plans)
    gpus = plan.job_plans[node].job_spec.requirements.resources.gpu.count.min
    return {
        "DSTACK_RUN_NAME": plan.effective_run_spec.run_name, "DSTACK_NODE_RANK": str(node),
        "DSTACK_NODES_NUM": str(nodes), "DSTACK_NODES_IPS": "\n".join(["127.0.0.1"] * nodes),
        "DSTACK_MASTER_NODE_IP": "127.0.0.1", "DSTACK_GPUS_PER_NODE": str(gpus),
        "DSTACK_GPUS_NUM": str(nodes * gpus)}  # fmt: skip


def rehearse(plan, folder, digits):
    """Run the commands of a plan's nodes on this machine, all at once, each in a folder of its own with its files.

    Two variables of the task's file have other values here: RESULTS, as there is no volume, and PORT, any free one.
    Each process takes the CPU in place of a GPU. Shows what node 0 prints; what the others print goes to their file
    log. Returns what node 0 printed and its folder. Raises PageError if a node fails, and ends the others.
    """
    # Offline: what is to be installed is here already, and nothing is put in its place.
    shared = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PORT": str(get_free_port()),
        "LANG": os.environ.get("LANG", ""), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "UV_PYTHON": sys.executable, "UV_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "1", "RESULTS": "results"}  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    nodes, folders = [], [Path(folder).absolute() / f"node-{node}" for node in range(len(plan.job_plans))]
    try:
        for node, (job, place) in enumerate(zip(plan.job_plans, folders)):
            raw = place / "data" / "MNIST" / "raw"  # where torchvision looks for unpacked files before it downloads
            raw.mkdir(parents=True)
            for file in digits.files:
                content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                (raw / file.name.removesuffix(".gz")).write_bytes(content)
            for file in plan.effective_run_spec.configuration.files:
                shutil.copy(file.local_path, place / file.path)
            (place / "results").mkdir()
            environment = {**job.job_spec.env, **variables(plan, node), **shared, "HOME": str(place)}
            command = ["/bin/bash", "-c", commands(plan, node)[1]]
            with open(place / "log", "w") as log:
                options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                nodes.append(subprocess.Popen(command, cwd=place, env=environment, **options))
        with open(folders[0] / "log") as log:
            while any(node.poll() is None for node in nodes) and not any(node.poll() for node in nodes):
                print(log.read(), end="", flush=True)
                time.sleep(0.1)
            print(log.read(), end="", flush=True)
        failed = [number for number, node in enumerate(nodes) if node.poll()]  # before the others are ended
    finally:
        terminate_groups(nodes)
    for node in failed[:1]:
        last = "\n".join((folders[node] / "log").read_text().splitlines()[-5:])
        raise PageError(f"node {node} ended with {nodes[node].returncode}; the end of its log:\n{last}")
    return (folders[0] / "log").read_text(), folders[0]


def submit(path: str, *options: str) -> None:
    """Run a task on the configured server and show its log; stop it if this is stopped; raise PageError if it fails."""
    name = f"{yaml.safe_load(Path(path).read_text())['name']}-{secrets.token_hex(3)}"
    try:
        shell(shlex.join(["dstack", "apply", "-y", "-f", path, "--name", name, *options]))
    finally:
        with contextlib.suppress(DstackError):  # the server is away: what has happened before matters more
            run = Client.from_config().runs.get(name)
            if run and not run.status.is_finished():
                run.stop()
                print(f"The run {name} is being stopped.")
