"""Pages read and run."""

import datetime
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parents[2]
RUN = {}  # what record writes


def read(name, project=PROJECT):
    """Return a page as it is in a project."""
    return nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)


def cell(name, page):
    """Return a cell of a page by its id."""
    return next(cell for cell in page.cells if cell.get("id") == name)


def text(cell):
    """Return what a cell printed or showed as text."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def figures(page):
    """Return the outputs of a page that are figures."""
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def run(project, *arguments, start=None, **variables):
    """Run a Python module in a project, without a cluster if none is given; return the process.

    start: a function that the new process calls first.
    """
    # With this variable, ipykernel does not show what a kernel's child processes print.
    ours = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=900,
        env=ours | {"KUBECONFIG": "no/such/kubeconfig"} | variables,
        preexec_fn=start,
    )


def papermill(project, *arguments, name="mnist", start=None, **variables):
    """Run a page of a copy of the project; return the process and the executed page."""
    result = project / "executed.ipynb"
    command = "papermill", f"notebooks/{name}.ipynb", result, "--cwd", "notebooks", *arguments
    begun = time.monotonic()
    done = run(project, *command, start=start, **variables)
    page = nbformat.read(result, as_version=4)
    if done.returncode == 0:
        record(name, text(cell("what-ran", page)), time.monotonic() - begun)
    return done, page


def versions():
    """Return the versions of PyTorch and, if the tests have a cluster, of Kubernetes and what runs on it."""
    found = {"torch": version("torch")}
    if os.environ.get("TUTORIAL_CLUSTER"):
        told = subprocess.run(["kubectl", "version", "-o", "json"], capture_output=True, text=True, check=True).stdout
        found["Kubernetes"] = json.loads(told)["serverVersion"]["gitVersion"]
        for name in "training-operator", "trainer", "kueue", "katib":
            required = (PROJECT / "ci/cluster/mod" / name / "go.mod").read_text()
            found[name] = re.search(rf"/{name}(?:/v\d)? (v\S+)", required)[1]
    return found


def record(name, table, seconds):
    """Write into build/run.json how a page ran: seconds of the run that left out least, and accuracy on MNIST."""
    if not RUN:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        pages = {path.stem: {"ran": False} for path in sorted((PROJECT / "notebooks").glob("*.ipynb"))}
        RUN.update(date=now, commit=commit.stdout.strip(), versions=versions(), pages=pages)
    page, left_out = RUN["pages"][name], dict(re.findall(r"^(.+?) +skipped +(.+)$", table, re.MULTILINE))
    if len(left_out) <= len(page.get("left_out", table)):
        page.update(ran=True, seconds=round(seconds), left_out=left_out)
    page["accuracy"] = "".join(re.findall(r"\S+% of MNIST$", table, re.MULTILINE)[-1:]) or page.get("accuracy", "")
    (PROJECT / "build").mkdir(exist_ok=True)
    (PROJECT / "build/run.json").write_text(json.dumps(RUN, indent=1))


def solutions(cell):
    """Return the Python code of the solutions, which are folded, of a cell of prose."""
    folded = re.findall(r"<summary>Solution</summary>(.*?)</details>", cell.source, re.DOTALL)
    return re.findall(r"```python\n(.*?)```", "\n".join(folded), re.DOTALL)


def append_solutions(project, name):
    """Make the solutions of a page's exercises its last cells, so that they are run, too."""
    page = read(name, project)
    for code in [code for cell in page.cells if cell.cell_type == "markdown" for code in solutions(cell)]:
        page.cells.append(nbformat.v4.new_code_cell(code, metadata={"tags": ["nbval-ignore-output"]}))
    nbformat.write(page, project / "notebooks" / f"{name}.ipynb")


def stable_outputs(page):
    """Return what is printed by those cells that print the same in each run, by their ids; nbval compares them."""
    cells = [c for c in page.cells if c.cell_type == "code" and "nbval-ignore-output" not in c.metadata.get("tags", [])]
    return {c.id: text(c) for c in cells if c.outputs}


def nbval(project, name, start=None, **variables):
    """Run a page of a copy of the project and compare its outputs with those in the file; return the process.

    The solutions of its exercises are run, too, after the last cell.
    """
    append_solutions(project, name)
    command = "pytest", "--nbval", f"notebooks/{name}.ipynb", "-p", "no:cacheprovider"
    return run(project, *command, start=start, **variables)
