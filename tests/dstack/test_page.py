"""notebooks/dstack.ipynb: what is committed, and the page run from top to bottom with the network cut off."""

import os
import re
from unittest.mock import MagicMock, call

import psutil
import pytest

from tests.support.network import can_cut_off, cut_off, found_in
from tests.support.pages import append_solutions, cell, papermill, read, stable_outputs, text
from tests.support.project import copy_project

PAGE = read("dstack")
MNIST_DIR = os.environ.get("MNIST_DIR")


def test_committed_outputs():
    """Of a run on MNIST without a failed step, with offers and prices, and honest about what was never run."""
    table = text(cell("what-ran", PAGE))
    assert "failed" not in table and "of MNIST" in table and "(MNIST)" in table
    assert re.search(r"^run on dstack +skipped +no dstack server is configured", table, re.MULTILINE)
    honest = r"never\s+been\s+run\s+against\s+a\s+machine\s+of\s+dstack"
    assert re.search(honest, cell("title", PAGE).source) and re.search(honest, cell("remote-text", PAGE).source)
    rows = [re.split("  +", row) for row in text(cell("plans", PAGE)).splitlines()[2:]]
    assert [" ".join(row[1:4] + row[5:]) for row in rows] == ["1 1 5 $0.210", "1 4 3 $1.565", *["2 1 5 $0.210"] * 2]
    assert re.findall(r"\$\S+$", text(cell("cost", PAGE)), re.MULTILINE) == ["$2.17", "$8.67", "$4.33", "$4.33"]


def test_nothing_is_rented_unless_asked():
    run = [call("a", "--gpu", "4", "--max-price", "4")]
    for missing, rent, calls in ("no fleet", True, []), ("", False, []), ("", True, run):
        steps, tools, has = MagicMock(), MagicMock(), dict(rent=rent, env={}, autoencoder="a", gpus=4)
        exec(cell("remote", PAGE).source, has | dict(missing_server=missing, steps=steps, dstack_tools=tools))
        assert tools.submit.mock_calls == calls and steps.skip.called == (not calls)


@pytest.fixture
def run(tmp_path):
    """Run the page as `how` does, with the network cut off and a key that must be found nowhere; return its result.

    Nothing is left in the home, and no process.
    """
    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    project, home, key = copy_project(tmp_path / "it's a folder with spaces"), tmp_path / "home", os.urandom(20).hex()
    home.mkdir()
    variables = dict(HOME=str(home), WANDB_API_KEY=key, WANDB_MODE="offline", IPYTHONDIR=f"{home}/ipython")

    def run(how, *arguments):
        result = how(project, *arguments, name="dstack", start=cut_off, **variables)
        done = result[0] if isinstance(result, tuple) else result
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert key not in done.stdout + done.stderr and not found_in(tmp_path, key)
        assert not [path for path in home.rglob("*") if re.search("wandb|dstack", path.name)]
        assert not [p for p in psutil.process_iter(["cwd"]) if str(p.info["cwd"]).startswith(str(project))]
        return result

    run.project = project
    return run


@pytest.mark.slow
@pytest.mark.skipif(bool(MNIST_DIR), reason="with MNIST_DIR, the next test runs the page")
def test_the_page_runs_on_stand_in_digits(run):
    values = [word for pair in ("epochs 1", "share 0.25", "seed 3", "gpus 3") for word in ("-p", *pair.split())]
    _, page = run(papermill, *values)
    name, table = text(cell("data", page)).splitlines()[-1], text(cell("what-ran", page))  # mirrors are named before
    assert name == "stand-in digits, not MNIST" and "failed" not in table
    assert f"of {name}" in table and f"({name})" in table and "4 processes" in table
    assert "gpu=nvidia:3" in text(cell("plan", page)) and "\x1b" not in text(cell("plan", page))
    assert re.search("^3 GPUs +1 +3 +0 +none", text(cell("plans", page)), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_DIR, reason="the committed outputs are of MNIST: set MNIST_DIR")
def test_committed_outputs_come_out_again(run):
    """The page and its exercises are run, and the outputs of all cells compared but of those that vary."""
    append_solutions(run.project, "dstack")
    _, page = run(papermill, "-p", "epochs", "1", "-p", "share", "0.1")
    assert stable_outputs(page) == stable_outputs(PAGE)
    ignored = {c.id for c in PAGE.cells if "nbval-ignore-output" in c.metadata.get("tags", [])}
    assert ignored == {"here", "classifier-rehearsal", "rehearsal", "what-ran", "versions"}
