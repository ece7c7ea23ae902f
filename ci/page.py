"""Runs a page, a notebook in notebooks/, with papermill: the first one, mnist, if none is named.

    page.py tutorial [PAGE] ARG...   for ci/tutorial: arguments go to papermill, results to build/
    page.py refresh [PAGE]           for ci/refresh: the outputs go into the page
"""

import logging
import os
import re
import sys
import tempfile
from pathlib import Path

import click
import nbformat
from jupyter_client import KernelManager
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from papermill.cli import papermill
from papermill.exceptions import PapermillExecutionError

PROJECT = Path(__file__).resolve().parent.parent
PAGES = {path.stem: path for path in sorted((PROJECT / "notebooks").glob("*.ipynb"))}
NOT_STRICT = {"flyte", "lightning"}  # no machine of the project has a Flyte installation or a dstack server
PAPERMILL_SAYS = ("Input Notebook:", "Output Notebook:", "Working directory:", "Executing Cell", "Ending Cell")


class Log(logging.Handler):
    """Shows what the cells print, without the lines around them."""

    def emit(self, record):
        text = record.getMessage().strip("\n")
        if text.strip() and not text.startswith(PAPERMILL_SAYS):
            print(text, file=sys.stderr, flush=True)


def choose(arguments):
    """Returns the name of the page and the arguments for papermill."""
    if not arguments or arguments[0].startswith("-"):
        return "mnist", arguments
    if arguments[0] not in PAGES:
        sys.exit(f"error: there is no page {arguments[0]!r}. The pages are {', '.join(PAGES)}.")
    return arguments[0], arguments[1:]


def result(page):
    """The executed notebook of a page; its HTML is beside it."""
    return PROJECT / "build" / f"{page}.ipynb"


def run_page(page, arguments):
    """Runs a page to its result and returns the executed notebook; ends with a message if the page stops."""
    run = result(page)
    run.parent.mkdir(exist_ok=True)
    for old in (run, run.with_suffix(".html")):
        old.unlink(missing_ok=True)
    # Two runs at once must not mix in one file.
    running = run.with_name(f".{page}-{os.getpid()}.ipynb")
    options = ["--cwd", str(PAGES[page].parent), "--log-output", "--no-progress-bar"]
    logging.getLogger().addHandler(Log())
    logging.getLogger("papermill").setLevel(logging.INFO)
    KernelManager.transport_encryption.default_value = "auto"  # or the kernel warns of those who may listen in
    problem = None
    try:
        papermill.main([*options, *arguments, str(PAGES[page]), str(running)], "ci/tutorial", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        problem = "it was interrupted"
    except PapermillExecutionError as error:
        problem = f"cell [{error.exec_count}] ended with {error.ename}: " + "\n".join(error.evalue.splitlines()[-5:])
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        if running.exists():
            running.replace(run)
    if problem:
        so_far = f"\nAs far as it ran: {run}" if run.exists() else ""
        sys.exit(f"error: the page did not run to its end: {problem}{so_far}")
    if not run.exists():  # --help and the like
        sys.exit()
    return nbformat.read(run, as_version=4)


def what_ran(notebook):
    """The text of the page's own table of what ran."""
    text = ""
    for cell in notebook.cells:
        if "what-ran" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                text += output.get("text") or output.get("data", {}).get("text/plain", "")
    if not text:
        sys.exit("error: no cell of the page that is tagged what-ran printed a table of what ran.")
    return text.rstrip("\n")


def write(path, text):
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def tutorial(page, arguments):
    notebook = run_page(page, arguments)
    run, html = result(page), result(page).with_suffix(".html")
    table = what_ran(notebook)
    # nbconvert's default template leaves out the alternative texts of the figures; this one has them.
    exporter = HTMLExporter(template_name="classic", embed_images=True, preprocessors=[CoalesceStreamsPreprocessor])
    resources = {"metadata": {"name": page, "path": str(PAGES[page].parent)}}
    text = exporter.from_notebook_node(notebook, resources)[0]
    # It takes the $ and ! of IPython's commands for faults, and frames them in red.
    write(html, text.replace("</head>", "<style>.highlight .err { border: none }</style></head>", 1))
    print(f"\n{table}\n\nThe page with its results: {run}\n{' ' * 27}{html}")


def refresh(page):
    path = PAGES[page]
    executed = run_page(page, [] if page in NOT_STRICT else ["-p", "strict", "True"])
    if "not MNIST" in what_ran(executed):
        sys.exit(f"error: the page ran on other digits than MNIST, so that {path} was left as it is.\n"
                 f"Name a folder with the four files of MNIST: MNIST_DIR=/path/to/mnist ci/refresh {page}")
    # Only outputs come from the run: the rest, cell ids too, stays as it was written.
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    notebook = nbformat.read(path, as_version=4)
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    count = 0
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = without_noise(outputs[cell.id], count)
    write(path, nbformat.writes(notebook) + "\n")
    print(f"{path} holds the outputs of this run.")


def without_noise(outputs, count):
    kept = []
    for output in outputs:
        for place in (PROJECT, Path.home(), Path(tempfile.gettempdir()), os.environ.get("MNIST_DIR")):
            if place and re.search(rf"{re.escape(str(place))}(?![\w.-])", str(output)):
                sys.exit(f"error: cell [{count}] printed a path of this machine, {place}; the page was left as it is.")
        if output.output_type == "execute_result":
            output.execution_count = count
        if "data" in output:
            output.data.pop("application/vnd.jupyter.widget-view+json", None)  # lives only in the kernel
            if not output.data:
                continue
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


if __name__ == "__main__":
    chosen, others = choose(sys.argv[2:])
    if sys.argv[1] == "tutorial":
        tutorial(chosen, others)
    elif others:
        sys.exit(f"error: ci/refresh takes the name of a page and nothing else, not {' '.join(others)}.")
    else:
        refresh(chosen)
