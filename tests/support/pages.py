"""Pages read and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat

PROJECT = Path(__file__).resolve().parents[2]


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
    done = run(project, *command, start=start, **variables)
    return done, nbformat.read(result, as_version=4)


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


def nbval(project, name="mnist", start=None, **variables):
    """Run a page of a copy of the project and compare its outputs with those in the file; return the process.

    The solutions of its exercises are run, too, after the last cell.
    """
    append_solutions(project, name)
    command = "pytest", "--nbval", f"notebooks/{name}.ipynb", "-p", "no:cacheprovider"
    return run(project, *command, start=start, **variables)
