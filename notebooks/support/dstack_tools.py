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
import zipfile
from pathlib import Path

import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # or dstack cannot be imported where there is no git
from dstack._internal.core.backends.aws.models import AWSAccessKeyCreds, AWSBackendConfigWithCreds  # noqa: E402
from dstack._internal.core.errors import DstackError  # noqa: E402
from dstack._internal.core.models.fleets import FleetSpec  # noqa: E402
from dstack._internal.core.models.profiles import Profile  # noqa: E402
from dstack.api import Client, Task  # noqa: E402

from support.page import PageError, shell  # noqa: E402

CONFIG = Path.home() / ".dstack" / "config.yml"  # dstack's own place for the servers of a user
PLAIN = dict(COLUMNS="88", TERM="dumb", FORCE_COLOR="", CLICOLOR_FORCE="0")  # no colours, which a kernel asks for
# dstack's program, ended with its standard input: so it does not outlive this process, even if that is killed. There
# is no account: AWS is not asked whether the key is good, how much it may rent and in which zones.
PROGRAM = """
import os, threading
from dstack._internal.cli.main import main
from dstack._internal.core.backends.aws import compute, configurator
configurator.AWSConfigurator.validate_config = lambda *_, **__: None
compute._get_regions_to_quotas = lambda regions, **_: {region: {} for region in regions}
compute._get_regions_to_zones = lambda regions, **_: {region: [] for region in regions}
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
    """A dstack server on a free port of this machine, which plans runs on the machines of a price list of AWS.

    Its database and its user's settings are in a folder, which starts empty, so that yours stay as they are. It ends
    by close() or with this process. Raises PageError if it does not answer within `timeout` seconds.
    """

    def __init__(self, folder, prices, timeout=120):
        folder = Path(folder).absolute()
        shutil.rmtree(folder, ignore_errors=True)
        checked = folder / ".cache" / ".dstack" / "cli" / "last_check"  # dstack asks for a newer version once a day
        for file in checked, folder / "catalog" / "aws" / "version", folder / "catalog" / "aws" / "1" / "catalog.zip":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("1")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("aws.csv", prices)
        port, token, log = get_free_port(), secrets.token_hex(16), folder / "server.log"
        url = f"http://127.0.0.1:{port}"
        unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = f"{unproxied},127.0.0.1"  # for the client here, too
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DSTACK_")} | {
            "HOME": str(folder), "DSTACK_SERVER_DIR": f"{folder}/server", "DSTACK_SERVER_ADMIN_TOKEN": token,
            "DSTACK_SERVER_CONFIG_DISABLED": "1", "DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED": "1",
            "DSTACK_SERVER_LOG_FORMAT": "standard", "GPUHUNT_CATALOG_URL": (folder / "catalog").as_uri(),
            **PLAIN}  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, "server", "--host", "127.0.0.1", "--port", str(port), "-l", "WARNING"]
        with open(log, "w") as output:
            options = dict(stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True)
            self.process, end = subprocess.Popen(command, **options), time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/healthcheck", timeout=5).close()
                break
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                last = "\n".join(log.read_text().strip().splitlines()[-3:])
                raise PageError(f"the dstack server did not start; the end of its log:\n{last}")
            time.sleep(0.2)
        self.client = Client.from_config("main", url, token)
        self.variables = dict(HOME=str(folder), DSTACK_PROJECT="main", DSTACK_SERVER_URL=url, DSTACK_TOKEN=token)
        key = AWSAccessKeyCreds(access_key="none", secret_key="none")
        self.client.client.backends.create("main", AWSBackendConfigWithCreds(regions=["us-east-1"], creds=key))

    def close(self):
        self.process.kill()
        self.process.communicate()

    def fleet(self, path):
        """Make the fleet that a file describes."""
        spec = FleetSpec(configuration=yaml.safe_load(Path(path).read_text()), profile=Profile(name="any"))
        self.client.client.fleets.apply_plan("main", self.client.client.fleets.get_plan("main", spec))

    def plan(self, path, nodes=None, gpus=None, env=(), **settings):
        """Return the server's plan of a task's file, with other numbers of nodes and GPUs, variables and settings.

        Raises PageError if the file is not a valid task.
        """
        try:
            values = yaml.safe_load(Path(path).read_text()) | settings
            values["nodes"] = nodes or values.get("nodes", 1)
            values["resources"]["gpu"] = gpus or values["resources"]["gpu"]
            values["env"] = values.get("env", {}) | dict(env)
            return self.client.runs.get_run_plan(Task.model_validate(values), configuration_path=str(path))
        except (DstackError, ValueError, yaml.YAMLError, KeyError, TypeError, OSError) as error:
            raise PageError(f"{path} is not a valid task: {type(error).__name__}: {error}") from error

    def apply(self, path, *options):
        """Show what `dstack apply` says of a file; its question, whether to submit the run, is answered by no."""
        command = shlex.join(["dstack", "apply", "-f", str(path), *options])
        shell(f"echo n | {command}", **self.variables, **PLAIN)


def variables(plan, node, addresses=None):
    """Return what dstack's runner puts into a node's environment; without addresses, all nodes are this machine."""
    nodes, gpus = len(plan.job_plans), plan.job_plans[node].job_spec.requirements.resources.gpu.count.min
    return {
        "DSTACK_RUN_NAME": plan.effective_run_spec.run_name, "DSTACK_NODE_RANK": str(node),
        "DSTACK_NODES_NUM": str(nodes), "DSTACK_NODES_IPS": "\n".join(addresses or ["127.0.0.1"] * nodes),
        "DSTACK_MASTER_NODE_IP": (addresses or ["127.0.0.1"])[0], "DSTACK_GPUS_PER_NODE": str(gpus),
        "DSTACK_GPUS_NUM": str(nodes * gpus)}  # fmt: skip


def rehearse(plan, folder, digits=None, show=True):
    """Run the commands of a plan's nodes on this machine, all at once, each in folder/node-N with the files it names.

    Two variables have other values than in the task: RESULTS, as there is no volume, and PORT, any free one. Each
    process takes the CPU for a GPU. Shows what node 0 prints; returns what each printed, which is in its file log, too.
    Raises PageError if a node fails, and ends the others.
    """
    # Offline: what is to be installed is here already, and nothing is put in its place.
    shared = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PORT": str(get_free_port()),
        "LANG": os.environ.get("LANG", ""), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "UV_PYTHON": sys.executable, "UV_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "1", "RESULTS": "results"}  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    task, nodes = plan.effective_run_spec.configuration, []
    folders = [Path(folder).absolute() / f"node-{node}" for node in range(len(plan.job_plans))]
    try:
        for node, (job, place) in enumerate(zip(plan.job_plans, folders)):
            raw = place / "data" / "MNIST" / "raw"  # where torchvision looks for unpacked files before it downloads
            raw.mkdir(parents=True)
            for file in digits.files if digits else ():
                content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                (raw / file.name.removesuffix(".gz")).write_bytes(content)
            for file in task.files:
                shutil.copy(file.local_path, place / file.path)
            (place / "results").mkdir()
            environment = {**job.job_spec.env, **variables(plan, node), **shared, "HOME": str(place)}
            command = ["/bin/bash", "-c", " && ".join(task.commands)]
            with open(place / "log", "w") as log:
                options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                nodes.append(subprocess.Popen(command, cwd=place, env=environment, **options))
        with open(folders[0] / "log") as log:
            states = [None]
            while None in states and not any(states):
                states = [node.poll() for node in nodes]
                print(log.read() if show else "", end="", flush=True)
                time.sleep(0.1)
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it and all that it started have ended
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    logs = [(place / "log").read_text() for place in folders]
    for node, state in enumerate(states):
        if state:
            last = "\n".join(logs[node].splitlines()[-5:])
            raise PageError(f"node {node} ended with {state}; the end of its log:\n{last}")
    return logs


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
