"""Runs the first page, notebooks/mnist.ipynb, with papermill.

    page.py tutorial ARG...   for ci/tutorial: arguments go to papermill, results to build/
    page.py refresh           for ci/refresh: the outputs go into notebooks/mnist.ipynb
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
PAGE = PROJECT / "notebooks" / "mnist.ipynb"
RUN = PROJECT / "build" / "mnist.ipynb"
HTML = RUN.with_suffix(".html")
PAPERMILL_SAYS = ("Input Notebook:", "Output Notebook:", "Working directory:", "Executing Cell", "Ending Cell")


class Log(logging.Handler):
    """Shows what the cells print, without the lines around them."""

    def emit(self, record):
        text = record.getMessage().strip("\n")
        if text.strip() and not text.startswith(PAPERMILL_SAYS):
            print(text, file=sys.stderr, flush=True)


def run_page(arguments):
    """Runs the page to RUN and returns the executed notebook; ends with a message if the page stops."""
    RUN.parent.mkdir(exist_ok=True)
    for old in (RUN, HTML):
        old.unlink(missing_ok=True)
    # Two runs at once must not mix in one file.
    running = RUN.with_name(f".mnist-{os.getpid()}.ipynb")
    options = ["--cwd", str(PAGE.parent), "--log-output", "--no-progress-bar"]
    logging.getLogger().addHandler(Log())
    logging.getLogger("papermill").setLevel(logging.INFO)
    KernelManager.transport_encryption.default_value = "auto"  # or the kernel warns of those who may listen in
    problem = None
    try:
        papermill.main([*options, *arguments, str(PAGE), str(running)], "ci/tutorial", standalone_mode=False)
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
            running.replace(RUN)
    if problem:
        so_far = f"\nAs far as it ran: {RUN}" if RUN.exists() else ""
        sys.exit(f"error: the page did not run to its end: {problem}{so_far}")
    if not RUN.exists():  # --help and the like
        sys.exit()
    return nbformat.read(RUN, as_version=4)


def what_ran(notebook):
    """The text of the page's own table of what ran."""
    text = ""
    for cell in notebook.cells:
        if "what-ran" in cell.metadata.get("tags", []):
            for output in cell.outputs:
                text += output.get("text") or output.get("data", {}).get("text/plain", "")
    if not text:
        sys.exit(f"error: no cell of {RUN} that is tagged what-ran printed a table of what ran.")
    return text.rstrip("\n")


def write(path, text):
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def tutorial(arguments):
    notebook = run_page(arguments)
    table = what_ran(notebook)
    # nbconvert's default template leaves out the alternative texts of the figures; this one has them.
    exporter = HTMLExporter(template_name="classic", embed_images=True, preprocessors=[CoalesceStreamsPreprocessor])
    resources = {"metadata": {"name": "mnist", "path": str(PAGE.parent)}}
    html = exporter.from_notebook_node(notebook, resources)[0]
    # It takes the $ and ! of IPython's commands for faults, and frames them in red.
    write(HTML, html.replace("</head>", "<style>.highlight .err { border: none }</style></head>", 1))
    print(f"\n{table}\n\nThe page with its results: {RUN}\n{' ' * 27}{HTML}")


def refresh():
    executed = run_page(["-p", "strict", "True"])
    if "not MNIST" in what_ran(executed):
        sys.exit(f"error: the page ran on other digits than MNIST, so that {PAGE} was left as it is.\n"
                 "Name a folder with the four files of MNIST: MNIST_DIR=/path/to/mnist ci/refresh")
    # Only outputs come from the run: the rest, cell ids too, stays as it was written.
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    page = nbformat.read(PAGE, as_version=4)
    for name in ("papermill", "widgets"):
        page.metadata.pop(name, None)
    page.metadata.get("language_info", {}).pop("version", None)
    count = 0
    for cell in page.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = without_noise(outputs[cell.id], count)
    write(PAGE, nbformat.writes(page) + "\n")
    print(f"{PAGE} holds the outputs of this run.")


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
    if sys.argv[1] == "tutorial":
        tutorial(sys.argv[2:])
    else:
        refresh()
