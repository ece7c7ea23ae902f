"""notebooks/flyte.ipynb: what is committed, and the page run from top to bottom with the network cut off."""
import ctypes
import fcntl
import json
import os
import re
import secrets
import socket
import struct
import subprocess
from pathlib import Path

import nbformat
import pytest
from test_flyte import found_in
from test_page import cell, nbval, papermill, text

PROJECT = Path(__file__).resolve().parents[1]
PAGE = nbformat.read(PROJECT / "notebooks" / "flyte.ipynb", as_version=4)
MNIST_DIR = os.environ.get("MNIST_DIR")


def cut_off():
    """Put this process into a network namespace of its own, which has nothing but the loopback interface."""
    newnet, newuser = 0x40000000, 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(newnet) and libc.unshare(newnet | newuser):
        raise OSError(ctypes.get_errno(), "no network namespace can be made")
    with socket.socket() as any_socket:
        up = struct.pack("16sh", b"lo", 1)  # SIOCSIFFLAGS with IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)


def can_cut_off():
    try:
        subprocess.run(["true"], preexec_fn=cut_off, check=True)
    except (subprocess.SubprocessError, AttributeError):
        return False
    return True


def test_the_module_equals_its_cell():
    magic, content = cell("module", PAGE).source.split("\n", 1)
    assert magic == "%%writefile flyte_mnist.py"
    assert (PROJECT / "flyte_mnist.py").read_text() == content + "\n"


def test_committed_outputs_are_those_of_a_run_on_mnist():
    assert text(cell("data", PAGE)) == "MNIST\n"
    accuracies = re.findall(r"^accuracy=(\S+)$", text(cell("alone", PAGE)), re.MULTILINE)
    assert len(accuracies) == 5 and float(accuracies[-1]) > 0.99
    table = text(cell("what-ran", PAGE))
    assert f"{float(accuracies[-1]):.2%} of MNIST" in table
    assert re.search(r"^run on Flyte +skipped +no Flyte installation is configured", table, re.MULTILINE)
    assert "has never been run against one" in cell("remote-text", PAGE).source
    apart = float(re.search(r"differ by (\S+) points", text(cell("elastic-compare", PAGE)))[1])
    assert apart <= 0.3
    seconds = float(re.match(r"(\S+) s, the same model: True", text(cell("cached", PAGE)))[1])
    assert seconds < 2  # of the run that is committed; not timed here


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page run with other values, the network cut off, and a key in the environment that must not be used."""
    from conftest import copy_project

    if not can_cut_off():
        pytest.skip("no network namespace can be made here")
    project = copy_project(tmp_path_factory.mktemp("cut off") / "a folder with spaces")
    home = project.with_name("home")
    home.mkdir()
    key = secrets.token_hex(20)
    done, page = papermill(
        project, "-p", "epochs", "1", "-p", "seed", "3", "-y", "learning_rates: [0.05, 0.1]", name="flyte",
        start=cut_off, HOME=str(home), WANDB_API_KEY=key, WANDB_MODE="offline", IPYTHONDIR=str(home / "ipython"),
        OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    return project, home, key, done, page


@pytest.mark.slow
def test_the_page_runs_with_the_network_cut_off(executed):
    project, home, key, done, page = executed
    *_, name = text(cell("data", page)).splitlines()  # the mirrors that do not answer come first
    assert name in ("MNIST", "stand-in digits, not MNIST") and (name == "MNIST") == bool(MNIST_DIR)
    table = text(cell("what-ran", page))
    assert table.count(f"of {name}") == 3 and "failed" not in table
    assert re.search(r"^the same, from the cache +ran", table, re.MULTILINE)
    assert "3 epochs in two attempts" in table and "sweep over 2 learning rates" in table
    assert "with 1 x cpu" in text(cell("alone", page)) and "with 2 x cpu" in text(cell("elastic", page))
    assert {"epochs = 1", "seed = 3"} <= set(text(cell("records", page)).splitlines())
    assert text(cell("crash-first", page)).endswith("killed\n")
    assert "Going on from checkpoint.pt: 1 epochs and 0 steps are done" in text(cell("crash-second", page))
    one, two = (text(cell("flyte2-run", page)).split(f"Flyte {which}: ")[1].split("\n")[0] for which in (1, 2))
    assert len(one.split()) == 1 and one == two
    assert done.stderr.count("Traceback") == 0  # torch's launcher would leave one at the kernel's end
    assert (project / "flyte_mnist.py").read_bytes() == (PROJECT / "flyte_mnist.py").read_bytes()


@pytest.mark.slow
def test_the_page_leaves_no_key_and_nothing_in_the_home(executed):
    project, home, key, done, page = executed
    assert key not in json.dumps(page) + done.stdout + done.stderr
    assert not found_in(project, key) and not found_in(home, key)
    assert not list(home.glob(".flyte")) and not list(home.rglob("*wandb*"))


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", [
    (["-p", "strict", "True"], "strict is set, .*: no Flyte installation"),
    (["-p", "gpu", "1"], "there is no parameter 'gpu'; this page has epochs, seed, "),
    (["-p", "learning_rates", "0.1"], r"the parameter learning_rates is 0.1 but must be like \["),
])
def test_wrong_values_stop_the_page(project, arguments, message):
    done, page = papermill(project, *arguments, name="flyte")
    assert done.returncode == 1
    error = next(output for c in page.cells for output in c.get("outputs", []) if output.output_type == "error")
    assert re.search(message, error.evalue) and len(error.traceback) == 1
    assert not cell("alone", page).outputs


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_DIR, reason="the committed outputs are of MNIST: set MNIST_DIR")
def test_committed_outputs_come_out_again(project):
    """nbval runs the whole page and compares the outputs of the cells that are not tagged nbval-ignore-output."""
    page = nbformat.read(project / "notebooks" / "flyte.ipynb", as_version=4)
    parameters = cell("parameters", page)
    for old, new in ("epochs = 5", "epochs = 1"), ("[0.02, 0.05, 0.1, 0.2, 0.4]", "[0.05, 0.1]"):
        assert old in parameters.source
        parameters.source = parameters.source.replace(old, new)
    nbformat.write(page, project / "notebooks" / "flyte.ipynb")
    done = nbval(project, "flyte")
    assert done.returncode == 0, done.stdout
    compared = [c.id for c in page.cells if c.cell_type == "code" and c.outputs
                and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    assert {"data", "wrong", "templates", "custom", "arguments"} <= set(compared)
