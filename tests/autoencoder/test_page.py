"""notebooks/lightning.ipynb: what is committed, and the page run from top to bottom with the network cut off."""

import json
import os
import re
import secrets

import nbformat
import psutil
import pytest

from tests.support.network import can_cut_off, cut_off, found_in
from tests.support.pages import PROJECT, cell, nbval, papermill, read, text
from tests.support.project import copy_project

PAGE = read("lightning")
MNIST_DIR = os.environ.get("MNIST_DIR")


def validation_errors(name, page=PAGE):
    """Return the validation errors that a cell printed, by epoch."""
    return [float(error) for error in re.findall(r"^Epoch: .* val_loss=(\S+)$", text(cell(name, page)), re.MULTILINE)]


@pytest.mark.parametrize("name", ["autoencoder.py", "jobs/autoencoder.dstack.yml", "jobs/mnist.dstack.yml"])
def test_a_file_equals_its_cell(name):
    (source,) = (c.source for c in PAGE.cells if c.source.startswith(f"%%writefile {name}\n"))
    assert (PROJECT / name).read_text() == source.split("\n", 1)[1] + "\n"


def test_committed_outputs_are_those_of_a_run_on_mnist():
    errors, table = validation_errors("one"), text(cell("what-ran", PAGE))
    assert text(cell("data", PAGE)) == "MNIST\n" and len(errors) == 10 and errors[-1] <= 0.041
    assert f"error {errors[-1]:.4f} (MNIST)" in table and "failed" not in table
    assert re.search(r"^run on dstack +skipped +no dstack server is configured", table, re.MULTILINE)
    assert "has never been run against a machine of dstack's" in " ".join(cell("remote-text", PAGE).source.split())
    rows = re.findall(r"^(1 GPU|4 GPUs|2 machines|classifier) +(\d) +(\d) .* (\d+)$", text(cell("plans", PAGE)), re.M)
    assert [row[1:] for row in rows] == [("1", "1", "0"), ("1", "4", "0"), ("2", "1", "0"), ("2", "1", "0")]


@pytest.mark.slow
def test_the_page_runs_with_the_network_cut_off(tmp_path):
    """With other values, and a key in the environment that must be found nowhere; nothing is left in the home."""
    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    project, home, key = copy_project(tmp_path / "it's a folder with spaces"), tmp_path / "home", secrets.token_hex(20)
    home.mkdir()
    values = [word for pair in ("epochs 2", "share 0.25", "seed 3", "gpus 3") for word in ("-p", *pair.split())]
    variables = dict(HOME=str(home), WANDB_API_KEY=key, WANDB_MODE="offline", IPYTHONDIR=f"{home}/ipython")
    done, page = papermill(project, *values, name="lightning", start=cut_off, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    name = text(cell("data", page)).splitlines()[-1]  # the mirrors that do not answer come first
    assert name == ("MNIST" if MNIST_DIR else "stand-in digits, not MNIST")
    table = text(cell("what-ran", page))
    assert table.count(f"({name})") == 3 and table.count(f"of {name}") == 1 and "failed" not in table
    one, several, rehearsed = (validation_errors(which, page) for which in ("one", "several", "rehearsal"))
    assert len(one) == 2 and several == pytest.approx(one, abs=0.001) and rehearsed == pytest.approx(one, abs=0.001)
    assert "after one epoch: " in text(cell("fork", page)) or "skipped" in table
    assert "gpu=nvidia:3" in text(cell("plan", page)) and "\x1b" not in text(cell("plan", page))
    assert re.search("^accuracy=", text(cell("classifier-rehearsal", page)), re.MULTILINE)
    assert key not in json.dumps(page) + done.stdout + done.stderr
    assert not found_in(project, key) and not found_in(home, key)
    assert not [path for path in home.rglob("*") if re.search("wandb|dstack", path.name)]
    running = [process.info["cwd"] for process in psutil.process_iter(["cwd"])]
    assert not [folder for folder in running if str(folder).startswith(str(project))]


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_DIR, reason="the committed outputs are of MNIST: set MNIST_DIR")
def test_committed_outputs_come_out_again(project):
    """nbval runs the whole page and compares the outputs of the cells that are not tagged nbval-ignore-output."""
    page = read("lightning", project)
    parameters = cell("parameters", page)
    for old, new in ("epochs = 10", "epochs = 1"), ("share = 0.5", "share = 0.1"):
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, new)
    nbformat.write(page, project / "notebooks" / "lightning.ipynb")
    done = nbval(project, "lightning", WANDB_MODE="disabled")
    assert done.returncode == 0, done.stdout
    ignored = [c.id for c in page.cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert not set(ignored) & {"data", "summary", "baseline", "refused", "plans", "commands", "ours", "variables"}
