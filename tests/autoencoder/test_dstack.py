"""support/dstack_tools.py with a real dstack server: its plans, their rehearsal, and what goes wrong with them."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support import dstack_tools
from support.digits import get_digits
from support.page import PageError

from tests.support.data import make_data
from tests.support.network import found_in
from tests.support.processes import PROJECT

pytestmark = pytest.mark.slow  # a server takes its fifteen seconds to start
AUTOENCODER, MNIST = PROJECT / "jobs/autoencoder.dstack.yml", PROJECT / "jobs/mnist.dstack.yml"
OURS = {name: value for name, value in os.environ.items() if not name.startswith("DSTACK_")} | {
    "PYTHONPATH": f"{PROJECT}:{PROJECT}/notebooks"
}


def servers():
    """Return the processes on this machine that are dstack servers of dstack_tools."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "dstack._internal.cli.main import main" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a server's folder")


@pytest.fixture(scope="module")
def server(folder):
    before = servers()
    with dstack_tools.server(folder / "dstack") as started:
        assert len(servers()) == len(before) + 1
        yield started
    assert servers() == before


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return get_digits(make_data(tmp_path_factory.mktemp("digits"), 640, 64))


def task(target, **changes):
    """Write a copy of the autoencoder's task with other values; return its path."""
    values = yaml.safe_load(AUTOENCODER.read_text())
    values["files"] = [f"{AUTOENCODER.parent}/{name}" for name in values["files"][:2]]
    path = target / "changed.dstack.yml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.mark.parametrize("path", [AUTOENCODER, MNIST])
def test_plan(server, path):
    """Machines, GPUs, memory, files, volume and time as they stand in the file, and our commands unchanged."""
    stated, plan = yaml.safe_load(path.read_text()), server.plan(path)
    assert [job.job_spec.job_num for job in plan.job_plans] == list(range(stated["nodes"]))
    for node, job in enumerate(plan.job_plans):
        spec, resources = job.job_spec, job.job_spec.requirements.resources
        assert (resources.gpu.count.min, resources.gpu.count.max) == (1, 1)
        assert (resources.cpu.count.min, resources.memory.min, resources.shm_size) == (2, 8, 2)
        assert spec.env == {name: str(value) for name, value in stated["env"].items()}
        assert [file.path for file in spec.file_archives] == [name.split(":")[-1] for name in stated["files"]]
        mounts = [(str(volume.instance_path), str(volume.path)) for volume in spec.volumes]
        assert mounts == [(f"/mnt/{stated['name']}", "/results")]
        assert (spec.max_duration, spec.retry.duration) == (7200, 3600)
        variables, (setup, commands) = dstack_tools.variables(plan, node), dstack_tools.commands(plan, node)
        assert (variables["DSTACK_NODE_RANK"], variables["DSTACK_NODES_NUM"]) == (str(node), str(stated["nodes"]))
        assert "uv venv" in setup and "python find 3.11" in setup and commands == " && ".join(stated["commands"])
    assert repr(dstack_tools.table({"it": plan})).splitlines()[-1].split()[-1] == "0"  # nothing to run on


def test_files_that_are_not_valid_tasks(server, tmp_path):
    for changes, message in (
        ({"python": "2.7"}, "'2.7' is not a valid PythonVersion"),
        ({"artifacts": ["results"]}, "artifacts\n.*Extra inputs are not permitted"),
        ({"volumes": ["no-such-volume:/results"]}, "Volume .*no-such-volume.* not found"),
        ({"files": ["nothing.py"]}, "nothing.py' specified in `files` does not exist"),
    ):
        with pytest.raises(PageError, match=rf"(?s)changed.dstack.yml is not a valid task: .*{message}"):
            server.plan(task(tmp_path, **changes))
    with pytest.raises(PageError, match="nowhere.yml is not a valid task: FileNotFoundError"):
        server.plan(tmp_path / "nowhere.yml")


def test_a_secret_is_only_named(server, folder, tmp_path):
    """Its value is in no plan, log or file but the server's database."""
    key = "k3y" + os.urandom(16).hex()
    server.client.client.secrets.create_or_update("main", "wandb_api_key", key)
    plan = server.plan(task(tmp_path), WANDB_API_KEY="${{ secrets.wandb_api_key }}")
    assert key not in plan.model_dump_json()
    assert plan.job_plans[0].job_spec.env["WANDB_API_KEY"] == "${{ secrets.wandb_api_key }}"
    assert {Path(path).name.split("-")[0] for path in found_in(folder, key)} <= {"sqlite.db"}
    assert server.variables["DSTACK_TOKEN"] not in (folder / "dstack" / "server.log").read_text()


def test_no_server_is_left(tmp_path):
    """Not even when the kernel is killed."""
    before = servers()
    program = (
        "import sys, time\nfrom support import dstack_tools\nwith dstack_tools.server(sys.argv[1]):\n"
        "    print('started', flush=True)\n    time.sleep(100)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "dstack")]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, env=OURS, **output) as process:
        assert process.stdout.readline() == "started\n" and len(servers()) == len(before) + 1
        process.kill()
    end = time.monotonic() + 10
    while servers() != before and time.monotonic() < end:
        time.sleep(0.1)
    assert servers() == before


# The rehearsal


def test_a_machine_that_fails_ends_the_others(server, digits, tmp_path):
    command = "if [ $DSTACK_NODE_RANK = 1 ]; then echo no luck; exit 7; else sleep 100; fi"
    plan, started = server.plan(task(tmp_path, commands=[command], nodes=2)), time.monotonic()
    with pytest.raises(PageError, match="node 1 ended with 7; the end of its log:\nno luck"):
        dstack_tools.rehearse(plan, tmp_path / "rehearsed", digits)
    assert time.monotonic() - started < 60
    assert ["sleep", "100"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


def test_what_a_machine_sees(server, digits, tmp_path, monkeypatch):
    """Of this environment only what must be, and no key; of the file and of dstack, all variables."""
    plan = server.plan(task(tmp_path, commands=["env -0 > environment", "ls > files"], nodes=1))
    key = os.urandom(16).hex()
    monkeypatch.setenv("WANDB_API_KEY", key)
    _, place = dstack_tools.rehearse(plan, tmp_path / "rehearsed", digits)
    seen = dict(line.split("=", 1) for line in (place / "environment").read_text().rstrip("\0").split("\0"))
    assert key not in json.dumps(seen) and seen["WANDB_MODE"] == "offline"
    assert (seen["EPOCHS"], seen["DSTACK_GPUS_NUM"], seen["CUDA_VISIBLE_DEVICES"]) == ("10", "1", "")
    assert {"autoencoder.py", "mnist.py", "data", "results"} <= set((place / "files").read_text().split())


# A server to run on


def test_servers_that_cannot_be_used(server, tmp_path, monkeypatch):
    """None configured, one that is not there, one that refuses the token, and one without a fleet."""
    monkeypatch.setattr(dstack_tools, "CONFIG", tmp_path / "config.yml")
    monkeypatch.delenv("DSTACK_SERVER_URL", raising=False)
    assert dstack_tools.no_server() == "no dstack server is configured (dstack project add)"
    url, token = server.variables["DSTACK_SERVER_URL"], server.variables["DSTACK_TOKEN"]
    cases = ("http://127.0.0.1:9", "any", "refused"), (url, "wrong", "denied|token"), (url, token, "has no fleet$")
    for address, given, reason in cases:
        for name, value in dict(SERVER_URL=address, TOKEN=given, PROJECT="main").items():
            monkeypatch.setenv(f"DSTACK_{name}", value)
        assert re.search(f"configured dstack server .*({reason})", dstack_tools.no_server(2))
