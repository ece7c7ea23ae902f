"""ci/tutorial, ci/refresh and ci/lab, run on a page of a few cells."""

import json
import re
import subprocess
import time
import urllib.request

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from test_environment import assert_stopped, environment, run

pytestmark = pytest.mark.slow  # each starts a kernel


@pytest.fixture
def page(ready):
    """The project with a page that prints, draws, fails if told to, and ends with a table of what ran."""
    cells = [
        new_markdown_cell("# A page"),
        new_code_cell('epochs = 5\ndata = "MNIST"\nfault = ""', metadata={"tags": ["parameters"]}),
        new_code_cell("import os\nfrom pathlib import Path\nprint(epochs, 'epochs in', Path.cwd().name)\n"
                      "exec(fault)"),
        new_code_cell("import matplotlib.pyplot as plt\nfrom IPython.display import display\n"
                      "figure, axes = plt.subplots()\n"
                      "axes.plot([0, 1])\nplt.close()\ndisplay(figure, metadata={'image/png': {'alt': 'A line'}})"),
        new_code_cell("print(f'step  result\\ntrain  ran on {data}')", metadata={"tags": ["what-ran"]}),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), ready / "notebooks/mnist.ipynb")
    return ready


def test_tutorial(page, tmp_path):
    """From another folder, for a user with a kernel of his own that does not work."""
    kernel = tmp_path / "home/.local/share/jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["false"], "display_name": "The user's", "language": "python"}))
    done = subprocess.run([page / "ci/tutorial", "-p", "epochs", "1", "-p", "fault", "print(os.environ['MNIST_DIR'])"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env=environment(HOME=tmp_path / "home", JUPYTER_PATH=kernel.parents[2], MNIST_DIR="digits"))
    assert done.returncode == 0, done.stderr
    assert "1 epochs in notebooks" in done.stderr and f"{tmp_path}/digits" in done.stderr
    assert done.stdout.startswith("\nstep  result\ntrain  ran on MNIST\n")
    assert sorted(path.name for path in (page / "build").iterdir()) == ["mnist.html", "mnist.ipynb"]
    html = (page / "build/mnist.html").read_text()
    assert re.search(r'<img[^>]+alt="A line"', html) and 'src="data:image/png;base64,' in html
    assert "1 epochs in notebooks" in html
    assert html.rindex(".err { border: none }") > html.index(".err { border: 1px solid")  # no red frames
    assert "WARNING" not in done.stderr  # as of a kernel that others may listen to


def test_with_a_cluster(page):
    """--cluster is for the script; all else goes on to papermill."""
    (page / "ci/cluster/with").write_text('#!/bin/sh\necho with a cluster; exec "$@"\n')
    done = run(page / "ci/tutorial", "--cluster", "-p", "epochs", "1")
    assert done.returncode == 0 and done.stdout.startswith("with a cluster\n"), done.stderr
    assert "1 epochs in notebooks" in done.stderr
    done = run(page / "ci/refresh", "--cluster")
    assert done.returncode == 0 and done.stdout.startswith("with a cluster\n"), done.stderr


def test_tutorial_stops(page):
    """Nothing of an earlier run is left that looks like success."""
    (page / "build").mkdir()
    (page / "build/mnist.html").write_text("of an earlier run")
    done = run(page / "ci/tutorial", "-p", "fault", "raise ValueError('the fault that was asked for')")
    assert_stopped(done, "ValueError: the fault that was asked for", str(page / "build/mnist.ipynb"))
    assert done.stdout == "" and "5 epochs" in done.stderr
    assert [path.name for path in (page / "build").iterdir()] == ["mnist.ipynb"]
    assert "5 epochs" in (page / "build/mnist.ipynb").read_text()


def test_tutorial_without_a_table(page):
    notebook = nbformat.read(page / "notebooks/mnist.ipynb", as_version=4)
    del notebook.cells[-1]
    nbformat.write(notebook, page / "notebooks/mnist.ipynb")
    assert_stopped(run(page / "ci/tutorial"), "table of what ran")
    assert not (page / "build/mnist.html").exists()


def test_another_page(page):
    """It is named first; its results stand beside those of the first page."""
    other = page / "notebooks/other.ipynb"
    other.write_bytes((page / "notebooks/mnist.ipynb").read_bytes())
    assert run(page / "ci/tutorial").returncode == 0
    done = run(page / "ci/tutorial", "other", "-p", "epochs", "2")
    assert done.returncode == 0 and "2 epochs" in done.stderr and "build/other.html" in done.stdout
    names = ["mnist.html", "mnist.ipynb", "other.html", "other.ipynb"]
    assert sorted(path.name for path in (page / "build").iterdir()) == names
    for script in "tutorial", "refresh":
        pages = "The pages are flyte, lightning, mnist, other."
        assert_stopped(run(page / "ci" / script, "another"), f"no page 'another'. {pages}")
    before = (page / "notebooks/mnist.ipynb").read_bytes()
    done = run(page / "ci/refresh", "other")
    assert done.returncode == 0, done.stderr
    assert "5 epochs" in other.read_text() and (page / "notebooks/mnist.ipynb").read_bytes() == before
    assert_stopped(run(page / "ci/refresh", "other", "-p", "epochs", "1"), "takes the name of a page and nothing else")


def test_only_pages_without_a_backend_of_ours_are_refreshed_without_it(page):
    """Their parameter strict stays as it is."""
    notebook = nbformat.read(page / "notebooks/mnist.ipynb", as_version=4)
    notebook.cells[1].source += "\nstrict = False"
    notebook.cells[2].source += "\nprint('strict' if strict else 'lenient')"
    for name, how in ("mnist", "strict"), ("flyte", "lenient"), ("lightning", "lenient"):
        path = page / f"notebooks/{name}.ipynb"
        nbformat.write(notebook, path)
        done = run(page / "ci/refresh", name)
        assert done.returncode == 0, done.stderr
        assert nbformat.read(path, as_version=4).cells[2].outputs[0].text.endswith(f"{how}\n")


def test_tutorial_wrong_option(page):
    done = run(page / "ci/tutorial", "--no-such-option")
    assert done.returncode == 2 and "--no-such-option" in done.stderr and "Traceback" not in done.stderr


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
    assert code[1].outputs[0].text == "5 epochs in notebooks\n"
    assert code[2].outputs[0].metadata["image/png"]["alt"] == "A line"
    for cell in code:
        cell.execution_count, cell.outputs = None, []
    assert after == before
    assert "papermill" not in text and "iopub" not in text and str(page) not in text
    assert run(page / "ci/refresh").returncode == 0 and path.read_text() == text


@pytest.mark.parametrize("change, message", [
    ('data = "stand-in digits, not MNIST"', "other digits than MNIST"),
    ('data = "MNIST"\nprint(__import__("os").getcwd())', "a path of this machine"),
    ('data = "MNIST"\nprint(__import__("os").environ["MNIST_DIR"])', "a path of this machine"),
    ('data = "MNIST"\nraise ValueError("a fault")', "ValueError: a fault"),
])
def test_refresh_refuses(page, change, message):
    path = page / "notebooks/mnist.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace('data = "MNIST"', change)
    nbformat.write(notebook, path)
    before = path.read_bytes()
    assert_stopped(run(page / "ci/refresh", MNIST_DIR="/srv/mnist"), message)
    assert path.read_bytes() == before


def test_lab(page, tmp_path):
    """JupyterLab is opened on the page."""
    browser, opened = tmp_path / "browser", tmp_path / "opened.html"
    browser.write_text(f'#!/bin/sh\ncp "${{1#file://}}" "{opened}.part" && mv "{opened}.part" "{opened}"\n')
    browser.chmod(0o755)
    options = ["--allow-root", "--ServerApp.port=0", "--IdentityProvider.token=secret"]
    log = tmp_path / "log.txt"
    with log.open("w") as file, subprocess.Popen([page / "ci/lab", *options], stdout=file, stderr=file, env=environment(
            HOME=tmp_path, BROWSER=browser)) as lab:
        try:
            deadline = time.monotonic() + 60
            while not opened.exists():
                assert lab.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            address = re.search(r'href="(http://\S+?)/lab/tree/notebooks/mnist.ipynb\?', opened.read_text())[1]
            with urllib.request.urlopen(f"{address}/api/contents/notebooks/mnist.ipynb?token=secret") as answer:
                assert "# A page" in answer.read().decode()
        finally:
            lab.terminate()
