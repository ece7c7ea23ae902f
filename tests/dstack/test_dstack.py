"""support/dstack_tools.py with a real dstack server: its plans, their rehearsal, and what goes wrong with them."""

import contextlib
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
COLUMNS = "instance_name,location,gpu_count,gpu_name,gpu_memory,cpu,memory,price,spot\n"
PRICES = COLUMNS + "g5.xlarge,us-east-1,1,A10G,24,4,16,0.4,True\ng5.xlarge,us-east-1,1,A10G,24,4,16,1.0,False\n"


def servers():  # on this machine, of dstack_tools
    mark, processes = "dstack._internal.cli.main import main", psutil.process_iter(["cmdline"])
    return [process.pid for process in processes if mark in " ".join(process.info["cmdline"] or ())]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    before, folder = servers(), tmp_path_factory.mktemp("a server's folder")
    with contextlib.closing(dstack_tools.Server(folder, PRICES)) as started:
        assert len(servers()) == len(before) + 1
        yield started
    assert servers() == before


def task(target, **changes):  # a copy of the autoencoder's task with other values
    values = yaml.safe_load(AUTOENCODER.read_text())
    values["files"] = [f"{AUTOENCODER.parent}/{name}" for name in values["files"][:2]]
    path = target / "changed.dstack.yml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.mark.parametrize("path", [AUTOENCODER, MNIST])
def test_plan(server, path):
    """Machines, GPUs, memory, files, volume and time as they stand in the file, and our commands unchanged."""
    stated, plan = yaml.safe_load(path.read_text()), server.plan(path)
    assert len(plan.job_plans) == stated["nodes"]
    for job in plan.job_plans:
        spec, resources = job.job_spec, job.job_spec.requirements.resources
        assert (resources.gpu.count.min, resources.gpu.count.max) == (1, 1)
        assert (resources.cpu.count.min, resources.memory.min, resources.shm_size) == (2, 8, 2)
        assert spec.env == {name: str(value) for name, value in stated["env"].items()}
        assert [file.path for file in spec.file_archives] == [name.split(":")[-1] for name in stated["files"]]
        assert [f"{volume.instance_path}:{volume.path}" for volume in spec.volumes] == stated["volumes"]
        assert (spec.max_duration, spec.retry.duration, spec.requirements.max_price) == (7200, 3600, 1)
        assert spec.retry.on_events == ["interruption", "no-capacity"]  # not error: it would be paid again and again
        assert spec.commands[-1].endswith(" && " + " && ".join(stated["commands"]))
        assert plan.effective_run_spec.configuration.commands == stated["commands"]  # what a rehearsal runs
    assert not plan.job_plans[0].total_offers  # without a fleet


def test_files_that_are_not_valid_tasks(server, tmp_path):
    for changes, message in (
        ({"python": "2.7"}, "'2.7' is not a valid PythonVersion"),
        ({"artifacts": ["results"]}, "artifacts\n.*Extra inputs are not permitted"),
        ({"volumes": ["no-such-volume:/results"]}, "Volume .*no-such-volume.* not found"),
        ({"files": ["nothing.py"]}, "nothing.py' specified in `files` does not exist"),
    ):
        with pytest.raises(PageError, match=rf"(?s)changed.dstack.yml is not a valid task: .*{message}"):
            server.plan(task(tmp_path, **changes))


def test_a_secret_is_only_named(server, tmp_path):
    """Its value is in no plan, log or file but the server's database."""
    key, folder = "k3y" + os.urandom(16).hex(), Path(server.variables["HOME"])
    server.client.client.secrets.create_or_update("main", "wandb_api_key", key)
    plan = server.plan(task(tmp_path), env={"WANDB_API_KEY": "${{ secrets.wandb_api_key }}"})
    assert key not in plan.model_dump_json()
    assert plan.job_plans[0].job_spec.env["WANDB_API_KEY"] == "${{ secrets.wandb_api_key }}"
    assert {Path(path).name.split("-")[0] for path in found_in(folder, key)} <= {"sqlite.db"}
    assert server.variables["DSTACK_TOKEN"] not in (folder / "server.log").read_text()


def test_no_server_is_left_when_the_kernel_is_killed(tmp_path):
    before, program = servers(), "from support.dstack_tools import Server as S\ns = S('dstack', '')\nprint()\ninput()"
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT}/notebooks", "PYTHONUNBUFFERED": "1"}
    options = dict(cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], **options) as process:
        assert process.stdout.readline() == b"\n" and len(servers()) == len(before) + 1
        process.kill()
    end = time.monotonic() + 10
    while servers() != before and time.monotonic() < end:
        time.sleep(0.1)
    assert servers() == before


def test_a_machine_that_fails_ends_the_others(server, tmp_path):
    command = "if [ $DSTACK_NODE_RANK = 1 ]; then echo no luck; exit 7; else sleep 100; fi"
    plan, started = server.plan(task(tmp_path, commands=[command], nodes=2)), time.monotonic()
    with pytest.raises(PageError, match="node 1 ended with 7; the end of its log:\nno luck"):
        dstack_tools.rehearse(plan, tmp_path / "rehearsed")
    assert time.monotonic() - started < 60
    assert ["sleep", "100"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


def test_what_a_machine_sees(server, tmp_path, monkeypatch):
    """Of this environment only what must be, and no key; of the file and of dstack, all variables."""
    plan = server.plan(task(tmp_path, commands=["env -0 > environment", "ls . data/MNIST/raw > files"], nodes=1))
    key, place = os.urandom(16).hex(), tmp_path / "rehearsed" / "node-0"
    monkeypatch.setenv("WANDB_API_KEY", key)
    dstack_tools.rehearse(plan, place.parent, get_digits(make_data(tmp_path / "digits", 64, 8)))
    seen = dict(line.split("=", 1) for line in (place / "environment").read_text().rstrip("\0").split("\0"))
    assert key not in str(seen) and seen["WANDB_MODE"] == "offline"
    assert (seen["EPOCHS"], seen["DSTACK_GPUS_NUM"], seen["CUDA_VISIBLE_DEVICES"]) == ("10", "1", "")
    files = (place / "files").read_text().split()
    assert {"autoencoder.py", "mnist.py", "results", "train-images-idx3-ubyte"} <= {*files}


def test_servers_that_cannot_be_used(server, tmp_path, monkeypatch):
    """None configured, one that is not there, one that refuses the token, and one without a fleet."""
    monkeypatch.setattr(dstack_tools, "CONFIG", tmp_path / "config.yml")
    monkeypatch.delenv("DSTACK_SERVER_URL", raising=False)
    assert dstack_tools.no_server() == "no dstack server is configured (dstack project add)"
    url, token = (server.variables[f"DSTACK_{name}"] for name in ("SERVER_URL", "TOKEN"))
    cases = ("http://127.0.0.1:9", "any", "refused"), (url, "wrong", "denied|token"), (url, token, "has no fleet$")
    for address, given, reason in cases:
        for name, value in dict(SERVER_URL=address, TOKEN=given, PROJECT="main").items():
            monkeypatch.setenv(f"DSTACK_{name}", value)
        assert re.search(f"configured dstack server .*({reason})", dstack_tools.no_server(2))


def test_offers(server, tmp_path, monkeypatch):
    """Those that both the task and the fleet allow, the cheapest first; a fleet's own default is on-demand."""
    for name, lines in ("plain", []), ("spot", ["spot_policy: auto"]):
        lines += ["type: fleet", f"name: {name}", "nodes: 0..2", "placement: cluster", "resources:", "  gpu: 1..4"]
        (tmp_path / "fleet.dstack.yml").write_text("\n".join(lines))
        server.fleet(tmp_path / "fleet.dstack.yml")
    limited = {"max_price": 0.5, "nodes": 2}
    cases = ("plain", {}, [1.0]), ("spot", {}, [0.4, 1.0]), ("spot", limited, [0.4]), ("spot", {"gpus": 3}, [])
    for fleet, changes, prices in cases:
        plan = server.plan(MNIST, fleets=[fleet], **changes)
        assert [offer.price for offer in plan.job_plans[0].offers] == prices, (fleet, changes)
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    assert dstack_tools.no_server() == ""
