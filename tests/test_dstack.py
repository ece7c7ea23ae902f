"""notebooks/dstack_tools.py with a real dstack server: its plans, their rehearsal, and what goes wrong with them."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import yaml
from test_flyte import found_in
from test_flyte_page import can_cut_off, cut_off
from trainer import make_data, weights

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import dstack_tools  # noqa: E402
from digits import get_digits  # noqa: E402
from dstack_tools import PageError  # noqa: E402
from helpers import read_log  # noqa: E402

pytestmark = pytest.mark.slow  # a server takes its fifteen seconds to start


def servers():
    """Return the processes on this machine that are dstack servers of this module."""
    def command(process):
        with contextlib.suppress(psutil.Error):
            return " ".join(process.cmdline())
        return ""

    return [process.pid for process in psutil.process_iter() if "dstack._internal.cli.main import main" in
            command(process)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a server's folder")


@pytest.fixture(scope="module")
def server(folder):
    assert not servers()
    before = os.environ.get("no_proxy")
    with dstack_tools.server(folder / "dstack") as started:
        assert len(servers()) == 1
        yield started
    assert not servers()
    assert os.environ.get("no_proxy") == before


@pytest.fixture
def digits(tmp_path):
    return get_digits(make_data(tmp_path / "digits", 640, 64))


def task(target, **changes):
    """Write a copy of the autoencoder's task with other values; return its path."""
    values = yaml.safe_load((PROJECT / "autoencoder.dstack.yml").read_text()) | changes
    values["files"] = [f"{PROJECT / name}:{name}" for name in values["files"]]
    path = target / "changed.dstack.yml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", ["autoencoder", "mnist"])
def test_plan(server, name):
    """Machines, GPUs, memory, files, volume and time as they stand in the file, and our commands unchanged."""
    path = PROJECT / f"{name}.dstack.yml"
    stated = yaml.safe_load(path.read_text())
    plan = server.plan(path)
    specs = dstack_tools.specs(plan)
    assert [spec.job_num for spec in specs] == list(range(stated["nodes"]))
    for node, spec in enumerate(specs):
        resources = spec.requirements.resources
        assert (resources.gpu.count.min, resources.gpu.count.max) == (1, 1)
        assert (resources.cpu.count.min, resources.memory.min, resources.shm_size) == (2, 8, 2)
        assert spec.env == {name: str(value) for name, value in stated["env"].items()}
        assert [file.path for file in spec.file_archives] == stated["files"]
        assert [(str(volume.instance_path), str(volume.path)) for volume in spec.volumes] == [
            (f"/mnt/{name}", "/results")]
        assert (spec.max_duration, spec.retry.duration, [event.value for event in spec.retry.on_events]) == (
            7200, 3600, ["interruption", "error"])
        setup, commands = dstack_tools.commands(plan, node)
        assert "uv venv" in setup and "python find 3.11" in setup
        assert commands == " && ".join(stated["commands"])
    assert plan.job_plans[0].total_offers == 0  # nothing to run on, and the table says so
    assert repr(dstack_tools.table({"it": plan})).splitlines()[-1].split()[-1] == "0"


def test_plan_with_other_values(server):
    plan = server.plan(PROJECT / "autoencoder.dstack.yml", nodes=2, gpus=4, EPOCHS=3)
    assert [dstack_tools.gpus(spec) for spec in dstack_tools.specs(plan)] == [4, 4]
    assert {spec.env["EPOCHS"] for spec in dstack_tools.specs(plan)} == {"3"}
    assert plan.job_plans[0].job_spec.requirements.multinode
    assert dstack_tools.variables(plan, 1) == {
        "DSTACK_RUN_NAME": "autoencoder", "DSTACK_NODE_RANK": "1", "DSTACK_NODES_NUM": "2",
        "DSTACK_NODES_IPS": "127.0.0.1\n127.0.0.1", "DSTACK_MASTER_NODE_IP": "127.0.0.1",
        "DSTACK_GPUS_PER_NODE": "4", "DSTACK_GPUS_NUM": "8"}


def test_one_machine_needs_no_address(server):
    """Of some clouds dstack knows none."""
    _, commands = dstack_tools.commands(server.plan(PROJECT / "autoencoder.dstack.yml"))
    words = subprocess.run(["bash", "-c", commands.split(" && ")[-1].replace("torchrun", "printf '%s\n'", 1)],
                           env={"DSTACK_MASTER_NODE_IP": ""}, capture_output=True, text=True).stdout.splitlines()
    assert words[words.index("--master-addr") + 1] == "127.0.0.1"


def test_apply_shows_the_plan_and_submits_nothing(server, capsys):
    server.apply(PROJECT / "autoencoder.dstack.yml", "--gpu", "3")
    shown = capsys.readouterr().out
    assert "gpu=nvidia:3" in shown and "The project has no fleets" in shown and "\x1b" not in shown
    assert not server.client.runs.list(all=True)


@pytest.mark.parametrize("changes, message", [
    ({"python": "2.7"}, "'2.7' is not a valid PythonVersion"),
    ({"nodes": -1}, "nodes\n.*greater than or equal to 1"),
    ({"artifacts": ["results"]}, "artifacts\n.*Extra inputs are not permitted"),
    ({"resources": {"gpu": -1}}, "-1 GPUs and 2 nodes must be at least 1"),
    ({"volumes": ["no-such-volume:/results"]}, "Volume .*no-such-volume.* not found"),
    ({"commands": []}, "commands"),
])
def test_files_that_are_no_task(server, tmp_path, changes, message):
    with pytest.raises(PageError, match=rf"(?s)changed.dstack.yml is no task for dstack: .*{message}"):
        server.plan(task(tmp_path, **{"nodes": 2, **changes}))


def test_missing_files(server, tmp_path):
    with pytest.raises(PageError, match="nowhere.yml is no task for dstack: FileNotFoundError"):
        server.plan(tmp_path / "nowhere.yml")
    path = task(tmp_path)
    path.write_text(path.read_text().replace("mnist.py:", "nothing.py:"))
    with pytest.raises(PageError, match="nothing.py' specified in `files` does not exist"):
        server.plan(path)


def test_a_secret_is_only_named(server, folder, tmp_path):
    """Its value is in no plan, log or file but the server's database."""
    key = "k3y" + os.urandom(16).hex()
    server.client.client.secrets.create_or_update("main", "wandb_api_key", key)
    plan = server.plan(task(tmp_path), WANDB_API_KEY="${{ secrets.wandb_api_key }}")
    assert key not in plan.model_dump_json()
    assert dstack_tools.specs(plan)[0].env["WANDB_API_KEY"] == "${{ secrets.wandb_api_key }}"
    assert {Path(path).name.split("-")[0] for path in found_in(folder, key)} <= {"sqlite.db"}
    assert key not in (folder / "dstack" / "server.log").read_text()
    token = server.environment["DSTACK_SERVER_ADMIN_TOKEN"]
    assert token not in (folder / "dstack" / "server.log").read_text()


def test_port_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PageError) as caught:
        with dstack_tools.server(tmp_path / "dstack", taken.getsockname()[1]):
            pass
    assert str(caught.value).endswith(f"on port {taken_port(caught)}: Address already in use")
    assert not (tmp_path / "dstack").exists()


def taken_port(caught):
    return re.search(r"port (\d+)", str(caught.value))[1]


def test_a_server_that_does_not_start(tmp_path, monkeypatch):
    """Its last words are told, and nothing of it is left."""
    before = servers()
    monkeypatch.setattr(dstack_tools, "PROGRAM", "raise SystemExit('no such luck')")
    with pytest.raises(PageError, match="did not start; the end of its log:\nno such luck"):
        with dstack_tools.server(tmp_path / "dstack"):
            pass
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PageError, match="SSH client not found"):
        with dstack_tools.server(tmp_path / "dstack"):
            pass
    with pytest.raises(PageError, match="did not start; "):
        with dstack_tools.server(tmp_path / "dstack", patience=1):
            pass
    assert servers() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_server_is_left(tmp_path, how):
    """Neither after Ctrl-C in the block nor when the kernel is killed."""
    before = servers()
    program = ("import time, dstack_tools\n"
               f"with dstack_tools.server({str(tmp_path / 'dstack')!r}):\n"
               "    print('started', flush=True)\n"
               "    time.sleep(100)\n")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          env={**os.environ, "PYTHONPATH": str(PROJECT / "notebooks")}) as process:
        assert process.stdout.readline() == "started\n"
        assert len(servers()) == len(before) + 1
        process.send_signal(how)
    end = time.monotonic() + 10
    while servers() != before and time.monotonic() < end:
        time.sleep(0.1)
    assert servers() == before


# The rehearsal


def test_two_machines_train_the_classifier(server, digits, tmp_path, capsys):
    """They come to the weights that torchrun's two processes come to, as the trainer is the same; the log is the first
    machine's."""
    plan = server.plan(PROJECT / "mnist.dstack.yml", EPOCHS=2)
    log, place = dstack_tools.rehearse(plan, tmp_path / "it's rehearsed", digits)
    assert capsys.readouterr().out == log
    read = read_log(log)
    assert "with 2 x cpu" in log and len(read["accuracies"]) == 2
    assert weights(place / "results" / "mnist.pt").keys() >= {"conv1.weight"}
    assert not list((place.with_name("node-1") / "results").iterdir())
    again, _ = dstack_tools.rehearse(plan, tmp_path / "it's rehearsed", digits)  # from an empty folder
    assert read_log(again)["losses"] == read["losses"]


def test_two_machines_train_the_autoencoder(server, digits, tmp_path):
    import autoencoder

    plan = server.plan(PROJECT / "autoencoder.dstack.yml", nodes=2, EPOCHS=2, SHARE=1.0)
    log, place = dstack_tools.rehearse(plan, tmp_path, digits)
    assert "Training on 2 x cpu" in log
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec")  # of Lightning with today's torch
        model = autoencoder.Autoencoder.load_from_checkpoint(place / "results" / "last.ckpt")
    images = autoencoder.Images(digits.folder).validation
    error = ((model(images) - autoencoder.pixels(images)) ** 2).mean().item()
    assert f"val_loss={error:.4f}" in log


@pytest.mark.parametrize("node, end, status", [(0, "exit 7", 7), (1, "exit 7", 7), (1, "kill -9 $$", -9)])
def test_a_machine_that_fails_ends_the_others(server, digits, tmp_path, node, end, status):
    command = f"if [ $DSTACK_NODE_RANK = {node} ]; then echo no luck; {end}; else sleep 100; fi"
    plan = server.plan(task(tmp_path, commands=[command], nodes=2))
    started = time.monotonic()
    with pytest.raises(PageError, match=f"node {node} ended with {status}; the end of its log:\nno luck"):
        dstack_tools.rehearse(plan, tmp_path / "rehearsed", digits)
    assert time.monotonic() - started < 60
    assert not [process for process in psutil.process_iter(["cmdline"])
                if process.info["cmdline"] == ["sleep", "100"]]


def test_what_a_machine_sees(server, digits, tmp_path):
    """Of this environment only what must be, and no key; of the file and of dstack, all variables."""
    plan = server.plan(task(tmp_path, commands=["env -0 > environment", "ls > files"], nodes=1))
    os.environ["WANDB_API_KEY"] = key = os.urandom(16).hex()
    try:
        _, place = dstack_tools.rehearse(plan, tmp_path / "rehearsed", digits)
    finally:
        del os.environ["WANDB_API_KEY"]
    seen = dict(line.split("=", 1) for line in (place / "environment").read_text().rstrip("\0").split("\0"))
    assert key not in json.dumps(seen)
    assert (seen["EPOCHS"], seen["DSTACK_GPUS_NUM"], seen["CUDA_VISIBLE_DEVICES"]) == ("10", "1", "")
    assert seen["WANDB_MODE"] == "offline" and seen["RESULTS"] == str(place / "results")
    assert {"autoencoder.py", "mnist.py", "requirements-dstack.txt", "data"} <= set(
        (place / "files").read_text().split())


def test_what_is_installed_is_what_the_tasks_install():
    """So that a rehearsal has nothing to install, and runs the locked versions."""
    done = subprocess.run(
        [Path(sys.executable).parent / "uv", "pip", "install", "--dry-run", "--offline", "--no-deps",
         "--require-hashes", "-r", PROJECT / "requirements-dstack.txt", "--python", sys.executable],
        capture_output=True, text=True)
    assert done.returncode == 0 and "Would make no changes" in done.stderr


# A server to run on


def test_no_server_is_configured(tmp_path, monkeypatch):
    monkeypatch.setattr(dstack_tools, "CONFIG", tmp_path / "config.yml")
    for name in ("DSTACK_SERVER_URL", "DSTACK_TOKEN", "DSTACK_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    assert dstack_tools.no_server() == "no dstack server is configured (dstack project add)"
    with pytest.raises(PageError, match="strict is set, and nothing can run on dstack: no dstack server"):
        dstack_tools.here(dstack_tools.no_server(), strict=True)


def test_servers_that_cannot_be_used(server, monkeypatch):
    """One that is not there, one that refuses the token, and one without a fleet."""
    url = server.client.client.base_url
    for address, token, why in (
            ("http://127.0.0.1:9", "any", "the dstack server http://127.0.0.1:9 does not answer"),
            (url, "wrong", "dstack cannot be used: .*(denied|token)"),
            (url, server.environment["DSTACK_SERVER_ADMIN_TOKEN"], f"the project main of .*{url} has no fleet$")):
        monkeypatch.setenv("DSTACK_SERVER_URL", address)
        monkeypatch.setenv("DSTACK_TOKEN", token)
        monkeypatch.setenv("DSTACK_PROJECT", "main")
        assert re.match(why, dstack_tools.no_server(2))


SUBMIT = """
import os, sys
import dstack_tools

# A server that works on what is submitted, unlike the page's.
dstack_tools.PROGRAM = ("import os\\ndel os.environ['DSTACK_SERVER_BACKGROUND_PROCESSING_DISABLED']\\n"
                        + dstack_tools.PROGRAM)
with dstack_tools.server(sys.argv[1]) as server:
    os.environ.update(HOME=sys.argv[1], DSTACK_SERVER_URL=server.client.client.base_url, DSTACK_PROJECT="main",
                      DSTACK_TOKEN=server.environment["DSTACK_SERVER_ADMIN_TOKEN"])
    try:
        dstack_tools.submit("autoencoder.dstack.yml", *sys.argv[2:])
    except dstack_tools.PageError as error:
        print("PageError:", error)
    except KeyboardInterrupt:
        print("interrupted")
    run, = server.client.runs.list(all=True)
    print("in the end:", run.name, run.status.value)
"""


def test_a_run_is_submitted(tmp_path):
    """To a real server that is cut off from the network; it has no fleet to run on, so that the run fails."""
    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSTACK_")}
    done = subprocess.run([sys.executable, "-c", SUBMIT, str(tmp_path / "home"), "--gpu", "1"], cwd=PROJECT, text=True,
                          capture_output=True, timeout=300, preexec_fn=cut_off,
                          env={**environment, "PYTHONPATH": f"{PROJECT / 'notebooks'}"})
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert "PageError: exit status 1 of: dstack apply -y -f autoencoder.dstack.yml --name autoencoder-" in done.stdout
    assert re.search(r"in the end: autoencoder-\w{6} failed$", done.stdout, re.MULTILINE)


ATTEMPTS = """
import contextlib, os, re, sys, urllib.request
from pathlib import Path

def attempts():  # to reach an address for which there is no way, which here is any but this machine's; RFC 2011
    names, values = re.findall(r"^Ip: (.*)$", Path("/proc/self/net/snmp").read_text(), re.MULTILINE)
    return int(dict(zip(names.split(), values.split()))["OutNoRoutes"])

import autoencoder, dstack_tools
with dstack_tools.server(sys.argv[1]) as server:
    server.plan("autoencoder.dstack.yml")
    server.apply("autoencoder.dstack.yml")
print("by dstack:", attempts())
autoencoder.train(sys.argv[2], sys.argv[1] + "/results", epochs=1)
print("by Lightning and W&B:", attempts())
with contextlib.suppress(OSError):
    urllib.request.urlopen("http://192.0.2.1", timeout=5)
print("by this line:", attempts())
"""


def test_nobody_is_told(tmp_path):
    """No report of use, no question for a newer version, no price list: no connection beyond this machine is tried."""
    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DSTACK_", "WANDB_"))}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path / "home"), str(make_data(tmp_path / "digits", 640, 64))],
        cwd=PROJECT, text=True, capture_output=True, timeout=300, preexec_fn=cut_off,
        env={**environment, "PYTHONPATH": f"{PROJECT / 'notebooks'}", "DO_NOT_TRACK": "1",
             "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(count) for count in re.findall(r"^by .*: (\d+)$", done.stdout, re.MULTILINE)]
    assert counts[:2] == [0, 0] and counts[2] > 0
