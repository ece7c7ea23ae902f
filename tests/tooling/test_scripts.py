"""The scripts in ci/, run on a page of a few cells."""

import json
import re
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ci.page import main, normalise_outputs
from tests.support.project import run

FIGURE = """import matplotlib.pyplot as plt
from IPython.display import display
figure, axes = plt.subplots()
axes.plot([0, 1])
plt.close()
display(figure, metadata={'image/png': {'alt': 'A line'}})"""


@pytest.fixture
def page(ready):
    """The project with a page that prints, draws, fails if told to, and ends with a table of what ran."""
    parameters = 'epochs = 5\nstrict = False\ndata = "MNIST"\nfault = ""'
    cells = [
        new_markdown_cell("# A page"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell("import os\nprint(epochs, 'epochs in', os.path.basename(os.getcwd()), strict)\nexec(fault)"),
        new_code_cell(FIGURE),
        new_code_cell("print(f'step  result\\ntrain  ran on {data}')", metadata={"tags": ["what-ran"]}),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for name in "mnist", "flyte":
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), ready / f"notebooks/{name}.ipynb")
    (ready / "ci/cluster/with").write_text('#!/bin/sh\necho with a cluster; exec "$@"\n')
    return ready


@pytest.mark.slow
def test_tutorial(page, tmp_path):
    """From another folder, for a user with a kernel of his own that does not work, with a cluster."""
    kernel = tmp_path / "home/.local/share/jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["false"], "display_name": "The user's", "language": "python"}))
    variables = {"HOME": tmp_path / "home", "JUPYTER_PATH": kernel.parents[2], "MNIST_DIR": "digits"}
    options = ["-p", "epochs", "1", "-p", "fault", "print(os.environ['MNIST_DIR'])"]
    done = run(page / "ci/tutorial", "--cluster", *options, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert "1 epochs in notebooks" in done.stderr and f"{tmp_path}/digits" in done.stderr
    assert done.stdout.startswith("with a cluster\n\nstep  result\ntrain  ran on MNIST\n")
    assert {path.name for path in (page / "build").iterdir()} == {"mnist.html", "mnist.ipynb"}
    html = (page / "build/mnist.html").read_text()
    assert re.search(r'<img[^>]+alt="A line"', html) and 'src="data:image/png;base64,' in html
    assert "1 epochs in notebooks" in html
    assert html.rindex(".err { border: none }") > html.index(".err { border: 1px solid")  # no red frames
    assert "WARNING" not in done.stderr  # as of a kernel that others may listen to


@pytest.mark.slow
def test_tutorial_stops(page):
    """Another page; nothing of an earlier run is left that looks like success."""
    (page / "build").mkdir()
    (page / "build/flyte.html").write_text("of an earlier run")
    done = run(page / "ci/tutorial", "flyte", "-p", "fault", "raise ValueError('the fault that was asked for')")
    assert done.returncode == 1 and done.stdout == "" and "5 epochs" in done.stderr
    assert done.stderr.count("error:") == 1 and "ValueError: the fault that was asked for" in done.stderr
    assert f"As far as it ran: {page / 'build/flyte.ipynb'}" in done.stderr
    assert [path.name for path in (page / "build").iterdir()] == ["flyte.ipynb"]
    assert "5 epochs" in (page / "build/flyte.ipynb").read_text()


def test_wrong_arguments():
    with pytest.raises(SystemExit, match="there is no page 'another'. The pages are .*failures, .*, mnist"):
        main("tutorial", "another")
    with pytest.raises(SystemExit, match="ci/refresh takes the name of a page and nothing else"):
        main("refresh", "flyte", "-p", "epochs", "1")


@pytest.mark.slow
def test_refresh(page):
    """The outputs are put in; nothing else changes, and nothing in them tells of the machine or the time."""
    path = page / "notebooks/mnist.ipynb"
    before = nbformat.read(path, as_version=4)
    done = run(page / "ci/refresh")
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    after = nbformat.read(path, as_version=4)
    code = [cell for cell in after.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[1].outputs[0].text == "5 epochs in notebooks True\n"
    assert code[2].outputs[0].metadata["image/png"]["alt"] == "A line"
    for cell in code:
        cell.execution_count, cell.outputs = None, []
    assert after == before and text.endswith("}\n")
    assert "papermill" not in text and "iopub" not in text and str(page) not in text


def test_refresh_refuses_paths_of_this_machine(monkeypatch):
    monkeypatch.setenv("MNIST_DIR", "/srv/mnist")
    outputs = [new_output("stream", text=text) for text in ("/srv/mnist-2 ", "is not ", "/srv/mnist")]
    [stream] = normalise_outputs(outputs[:2], 1)
    assert stream.text == "/srv/mnist-2 is not "
    with pytest.raises(SystemExit, match=r"cell \[3\] printed a path of this machine, /srv/mnist"):
        normalise_outputs(outputs, 3)


@pytest.mark.slow
def test_ci_run(page):
    """CI's entry: MNIST from the folder beside the clone, pytest's summary as the last line."""
    (page.parent / "shared/mnist").mkdir(parents=True)
    shutil.rmtree(page / "tests")
    (page / "tests").mkdir()
    expected = str(page.parent / "shared/mnist")
    test = f"import os\ndef test_variables():\n    assert os.environ['MNIST_DIR'] == {expected!r}\n"
    (page / "tests/test_variables.py").write_text(test)
    done = run(page / ".ci/run", PYTEST_ADDOPTS="")
    assert done.returncode == 0 and "1 passed" in done.stdout.splitlines()[-1], done.stdout
    assert done.stdout.startswith("with a cluster\n")


def test_lint(ready):
    """Every Python file, page and script of the project is clean."""
    done = run(ready / "ci/lint")
    assert done.returncode == 0, done.stdout + done.stderr
