"""notebooks/lightning.ipynb: what is committed, and the page run from top to bottom with the network cut off."""

import json
import os
import re
import secrets

import pytest

from tests.support.network import can_cut_off, cut_off, found_in
from tests.support.pages import append_solutions, cell, papermill, read, stable_outputs, text
from tests.support.project import copy_project

PAGE = read("lightning")
MNIST_DIR = os.environ.get("MNIST_DIR")


def validation_errors(page):
    """Return the validation errors of the run on one device, by epoch, and the table's rows of first and last ones."""
    errors = re.findall(r"^Epoch: .* val_loss=(\S+)$", text(cell("one", page)), re.MULTILINE)
    rows = re.findall(r"(?m)^(?:one device|2 processes) +(\S+) +(\S+) ", text(cell("several-compare", page)))
    return [float(error) for error in errors], [[float(error) for error in row] for row in rows]


def test_committed_outputs_are_those_of_a_run_on_mnist():
    table, (errors, rows) = text(cell("what-ran", PAGE)), validation_errors(PAGE)
    assert text(cell("data", PAGE)) == "MNIST\n" and len(errors) == 10 and errors[-1] <= 0.041
    assert f"error {errors[-1]} (MNIST)" in table and "failed" not in table and "skipped" not in table
    assert rows == [[errors[0], errors[-1]]] * 2 and text(cell("resume", PAGE)).endswith("two weights: 0.0\n")
    equal, unequal = map(float, re.findall(r"off by (\S+)", text(cell("means", PAGE))))  # shares of a batch
    assert equal < 1e-5 < 1e-2 < unequal
    compared = dict(re.findall(r"(?m)^(\S.*?) +[03] +(0\.\d{4})$", text(cell("compare", PAGE))))
    stated = re.findall(r"0\.\d{4}", cell("key-points", PAGE).source)
    assert stated == sorted(compared[name] for name in ("autoencoder.py", "PCA", "the mean image"))


@pytest.mark.slow
def test_the_page_runs_with_the_network_cut_off(tmp_path):
    """With other values, the solutions, and a key in the environment that must be found nowhere."""
    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    project, home, key = copy_project(tmp_path / "it's a folder with spaces"), tmp_path / "home", secrets.token_hex(20)
    home.mkdir()
    append_solutions(project, "lightning")
    values = [word for pair in ("epochs 2", "share 0.25") for word in ("-p", *pair.split())]
    variables = dict(HOME=str(home), WANDB_API_KEY=key, WANDB_MODE="offline", IPYTHONDIR=f"{home}/ipython")
    done, page = papermill(project, *values, name="lightning", start=cut_off, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    name = text(cell("data", page)).splitlines()[-1]  # the mirrors that do not answer come first
    assert name == ("MNIST" if MNIST_DIR else "stand-in digits, not MNIST")
    table, (errors, rows) = text(cell("what-ran", page)), validation_errors(page)
    assert table.count(f"({name})") == 3 and table.count(f"of {name}") == 1 and "failed" not in table
    assert len(errors) == len(rows) == 2 and all(row == pytest.approx(errors, abs=0.001) for row in rows)
    assert "val_loss=" in text(cell("fork", page)) or "skipped" in table
    assert key not in json.dumps(page) + done.stdout + done.stderr
    assert not found_in(project, key) and not found_in(home, key)
    assert not [path for path in home.rglob("*") if "wandb" in path.name]
    if MNIST_DIR:
        assert stable_outputs(page) == stable_outputs(PAGE)
        assert {"data", "summary", "sampler", "baseline", "refused"} <= stable_outputs(PAGE).keys()
