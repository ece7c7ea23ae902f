"""notebooks/lightning.ipynb: what is committed, and the page run from top to bottom with the network cut off."""
import json
import os
import re
import secrets
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from test_flyte import found_in
from test_flyte_page import can_cut_off, cut_off
from test_page import cell, nbval, papermill, text

PROJECT = Path(__file__).resolve().parents[1]
PAGE = nbformat.read(PROJECT / "notebooks" / "lightning.ipynb", as_version=4)
MNIST_DIR = os.environ.get("MNIST_DIR")
FILES = {"module": "autoencoder.py", "task": "autoencoder.dstack.yml", "classifier-task": "mnist.dstack.yml"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_equals_its_cell(name):
    magic, content = cell(name, PAGE).source.split("\n", 1)
    assert magic == f"%%writefile {FILES[name]}"
    assert (PROJECT / FILES[name]).read_text() == content + "\n"


def validation_errors(name, page=PAGE):
    """Return the validation errors that a cell printed, by epoch."""
    return [float(error) for error in re.findall(r"^Epoch: .* val_loss=(\S+)$", text(cell(name, page)), re.MULTILINE)]


def test_committed_outputs_are_those_of_a_run_on_mnist():
    assert text(cell("data", PAGE)) == "MNIST\n"
    errors = validation_errors("one")
    assert len(errors) == 10 and errors[-1] <= 0.041
    table = text(cell("what-ran", PAGE))
    assert f"error {errors[-1]:.4f} (MNIST)" in table and "failed" not in table
    assert re.search(r"^run on dstack +skipped +no dstack server is configured", table, re.MULTILINE)
    assert "has never been run against a machine of dstack's" in " ".join(cell("remote-text", PAGE).source.split())
    for name in "several", "rehearsal":
        assert abs(validation_errors(name)[-1] - errors[-1]) <= 0.001
    rows = re.findall(r"^(1 GPU|4 GPUs|2 machines|classifier) +(\d) +(\d) .* (\d+)$", text(cell("plans", PAGE)), re.M)
    assert rows == [("1 GPU", "1", "1", "0"), ("4 GPUs", "1", "4", "0"), ("2 machines", "2", "1", "0"),
                    ("classifier", "2", "1", "0")]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page run with other values, the network cut off, and a key in the environment that must not be used."""
    from conftest import copy_project

    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    project = copy_project(tmp_path_factory.mktemp("cut off") / "it's a folder with spaces")
    home = project.with_name("home")
    home.mkdir()
    key = secrets.token_hex(20)
    done, page = papermill(
        project, "-p", "epochs", "2", "-p", "share", "0.25", "-p", "seed", "3", "-p", "gpus", "3", name="lightning",
        start=cut_off, HOME=str(home), WANDB_API_KEY=key, WANDB_MODE="offline", IPYTHONDIR=str(home / "ipython"))
    assert done.returncode == 0, done.stderr[-3000:]
    return project, home, key, done, page


@pytest.mark.slow
def test_the_page_runs_with_the_network_cut_off(executed):
    project, home, key, done, page = executed
    *_, name = text(cell("data", page)).splitlines()  # the mirrors that do not answer come first
    assert name in ("MNIST", "stand-in digits, not MNIST") and (name == "MNIST") == bool(MNIST_DIR)
    table = text(cell("what-ran", page))
    assert table.count(f"({name})") == 3 and table.count(f"of {name}") == 1 and "failed" not in table
    one, several, rehearsed = (validation_errors(which, page) for which in ("one", "several", "rehearsal"))
    assert len(one) == len(several) == len(rehearsed) == 2 and one[1] < one[0]
    assert several == pytest.approx(one, abs=0.001) and rehearsed == pytest.approx(one, abs=0.001)
    assert "after one epoch: " in text(cell("fork", page)) or torch.cuda.is_available()
    assert "gpu=nvidia:3" in text(cell("plan", page)) and "\x1b" not in text(cell("plan", page))
    assert re.search(r"^3 GPUs +1 +3 ", text(cell("plans", page)), re.MULTILINE)
    assert len(re.findall("^accuracy=", text(cell("classifier-rehearsal", page)), re.MULTILINE)) == 1
    for file in FILES.values():  # the page wrote what was there
        assert (project / file).read_bytes() == (PROJECT / file).read_bytes()


@pytest.mark.slow
def test_the_page_leaves_no_key_no_server_and_nothing_in_the_home(executed):
    project, home, key, done, page = executed
    assert key not in json.dumps(page) + done.stdout + done.stderr
    assert not found_in(project, key) and not found_in(home, key)
    assert not list(home.glob(".dstack")) and not list(home.rglob("*wandb*")) and not list(home.rglob("*dstack*"))
    inside = [process.pid for process in psutil.process_iter(["cwd"])
              if str(process.info["cwd"] or "").startswith(str(project))]
    assert not inside


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message, stopped", [
    (["-p", "strict", "True"], "strict is set, and nothing can run on dstack: no dstack server", "here"),
    (["-p", "gpu", "1"], "there is no parameter 'gpu'; this page has epochs, share, seed, ", "start"),
    (["-p", "share", "1"], r"the parameter share is 1 but must be like 0.5, of type float", "start"),
    (["-p", "epochs", "0"], "epochs must be at least 1, not 0", "one"),
    (["-p", "data_dir", "no/such/folder"], "is not in .*no/such/folder", "data"),
])
def test_wrong_values_stop_the_page(project, arguments, message, stopped):
    done, page = papermill(project, *arguments, name="lightning", HOME=str(project))
    assert done.returncode == 1
    where, error = next((c.id, output) for c in page.cells for output in c.get("outputs", [])
                        if output.output_type == "error")
    assert where == stopped and re.search(message, error.evalue)
    assert not cell("several", page).outputs


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_DIR, reason="the committed outputs are of MNIST: set MNIST_DIR")
def test_committed_outputs_come_out_again(project):
    """nbval runs the whole page and compares the outputs of the cells that are not tagged nbval-ignore-output."""
    page = nbformat.read(project / "notebooks" / "lightning.ipynb", as_version=4)
    parameters = cell("parameters", page)
    for old, new in ("epochs = 10", "epochs = 1"), ("share = 0.5", "share = 0.1"):
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, new)
    nbformat.write(page, project / "notebooks" / "lightning.ipynb")
    done = nbval(project, "lightning")
    assert done.returncode == 0, done.stdout
    compared = [c.id for c in page.cells if c.cell_type == "code" and c.outputs
                and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    assert {"data", "summary", "baseline", "refused", "plans", "commands", "ours", "variables"} <= set(compared)
