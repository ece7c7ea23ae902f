"""notebooks/flyte.ipynb: what is committed, and the page run from top to bottom with the network cut off."""

import json
import os
import re
import secrets

import pytest

from tests.support.network import can_cut_off, cut_off, found_in
from tests.support.pages import append_solutions, cell, papermill, read, stable_outputs, text
from tests.support.project import copy_project

PAGE = read("flyte")
MNIST_DIR = os.environ.get("MNIST_DIR")


def test_committed_outputs_are_those_of_a_run_on_mnist():
    assert text(cell("data", PAGE)) == "MNIST\n"
    accuracies = re.findall(r" accuracy=(\S+)$", text(cell("alone", PAGE)), re.MULTILINE)
    assert len(accuracies) == 5 and float(accuracies[-1]) > 0.99
    table = text(cell("what-ran", PAGE))
    assert f"{float(accuracies[-1]):.2%} of MNIST" in table and "miss, hit, hit, miss, miss" in table
    assert re.search(r"^run on Flyte +skipped +no Flyte installation is configured", table, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not can_cut_off(), reason="no network namespace can be made here")
def test_the_page_runs_with_the_network_cut_off(tmp_path):
    """With other values, the solutions, and a key in the environment that must be found nowhere."""
    project = copy_project(tmp_path / "a folder with spaces")
    append_solutions(project, "flyte")
    home = tmp_path / "home"
    home.mkdir()
    key = secrets.token_hex(20)
    values = "-p", "epochs", "1", "-p", "seed", "3", "-y", "learning_rates: [0.05, 0.1]"
    variables = dict(WANDB_API_KEY=key, WANDB_MODE="offline\n", HOME=str(home), IPYTHONDIR=str(home / "ipython"))
    done, page = papermill(project, *values, name="flyte", start=cut_off, OMP_NUM_THREADS="2", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {name: text(cell(name, page)) for name in (c.id for c in page.cells if c.cell_type == "code")}
    *_, name = said["data"].splitlines()  # the mirrors that do not answer come first
    assert name in ("MNIST", "stand-in digits, not MNIST") and (name == "MNIST") == bool(MNIST_DIR)
    assert said["what-ran"].count(f"of {name}") == 1 and "failed" not in said["what-ran"]
    assert "miss, hit, hit, miss, miss" in said["what-ran"]
    assert "2 epochs in two attempts" in said["what-ran"] and "sweep over 2 learning rates" in said["what-ran"]
    assert "with 1 x cpu" in said["alone"] and "with 2 x cpu" in said["elastic"]
    assert {"epochs = 1", "seed = 3"} <= set(said["records"].splitlines())
    assert said["crash-first"].endswith("killed\n")
    assert "Resuming from checkpoint.pt: 1 epochs and 0 steps are done" in said["crash-second"]
    assert said["crash-compare"].count("equal") >= 8 and "differs" not in said["crash-compare"]
    before = re.search("Flyte 1 had (\\S+)", said["flyte2-run"])[1]
    assert said["flyte2-run"].split("wanted")[-1].count(before) == 2
    assert done.stderr.count("Traceback") == 0
    assert key not in json.dumps(page) + done.stdout + done.stderr
    assert not found_in(project, key) and not found_in(home, key)
    assert not list(home.glob(".flyte")) and not list(home.rglob("*wandb*"))
    if MNIST_DIR:
        assert stable_outputs(page) == stable_outputs(PAGE)
        assert {"data", "small-run", "types", "no-if", "wrong", "templates", "arguments"} <= stable_outputs(PAGE).keys()
