"""Run a page, a notebook in notebooks/, with papermill: the first one, mnist, if none is named.

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
PAGES_WITHOUT_BACKEND = {"flyte", "lightning", "dstack"}  # the project has no Flyte installation, and no dstack server
# Lines of 120 columns fit, on paper, too; long cells scroll; what is folded shows its triangle; no red frames around
# what is not Python.
STYLE = """.container { width: 96%; max-width: 1170px }
.highlight .err { border: none }
summary { display: list-item; cursor: pointer }
div.input_area { max-height: 600px; overflow: auto }
div.highlight pre { font-size: 12px; white-space: pre; word-break: normal }
div.output_area pre { font-size: 12px; word-break: normal }
@media print { div.input_area { max-height: none } div.highlight pre { font-size: 6.5pt } }"""
PAPERMILL_MESSAGES = ("Input Notebook:", "Output Notebook:", "Working directory:", "Executing Cell", "Ending Cell")


class Log(logging.Handler):
    """Show what the cells print, without papermill's messages around it."""

    def emit(self, record):
        text = record.getMessage().strip("\n")
        if text.strip() and not text.startswith(PAPERMILL_MESSAGES):
            print(text, file=sys.stderr, flush=True)


def execute(page, arguments):
    """Run a page and return the executed notebook and its path in build/; end with a message if the page stops."""
    result = PROJECT / "build" / f"{page}.ipynb"
    result.parent.mkdir(exist_ok=True)
    for old in (result, result.with_suffix(".html")):
        old.unlink(missing_ok=True)
    running = result.with_name(f".{page}-{os.getpid()}.ipynb")  # two runs at once must not mix in one file
    options = ["--cwd", str(PAGES[page].parent), "--log-output", "--no-progress-bar", *arguments]
    logging.getLogger().addHandler(Log())
    logging.getLogger("papermill").setLevel(logging.INFO)
    KernelManager.transport_encryption.default_value = "auto"  # or the kernel warns of those who may listen in
    problem = None
    try:
        papermill.main([*options, str(PAGES[page]), str(running)], "ci/tutorial", standalone_mode=False)
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
            running.replace(result)
    if problem:
        so_far = f"\nAs far as it ran: {result}" if result.exists() else ""
        sys.exit(f"error: the page did not run to its end: {problem}{so_far}")
    if not result.exists():  # --help and the like
        sys.exit()
    return nbformat.read(result, as_version=4), result


def summary(notebook):
    """Return the text of the page's own table of what ran."""
    cells = [cell for cell in notebook.cells if "what-ran" in cell.metadata.get("tags", [])]
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    return text.rstrip("\n") or sys.exit("error: no cell of the page that is tagged what-ran printed a table.")


def tutorial(page, arguments):
    """Run a page, write it as HTML, too, and print its table."""
    notebook, result = execute(page, arguments)
    table = summary(notebook)
    notebook.metadata.pop("widgets", None)  # or nbconvert would show them instead of their pictures, from the internet
    # nbconvert's default template leaves out the alternative texts of the figures; this one has them.
    exporter = HTMLExporter(template_name="classic", preprocessors=[CoalesceStreamsPreprocessor])
    resources = {"metadata": {"name": page, "path": str(PAGES[page].parent)}}
    text = exporter.from_notebook_node(notebook, resources)[0]
    text = text.replace("</head>", f"<style>{STYLE}</style></head>", 1)
    html = result.with_suffix(".html")
    html.write_text(text, encoding="utf-8")
    print(f"\n{table}\n\nThe page with its results: {result}\n{' ' * 27}{html}")


def refresh(page):
    """Run a page with its own parameters and put the outputs into it; the rest stays as it was written."""
    path = PAGES[page]
    executed, _ = execute(page, [] if page in PAGES_WITHOUT_BACKEND else ["-p", "strict", "True"])
    if "not MNIST" in summary(executed):
        sys.exit(
            f"error: the page ran on other digits than MNIST, so that {path} was left as it is.\n"
            f"Name a folder with the four files of MNIST: MNIST_DIR=/path/to/mnist ci/refresh {page}"
        )
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.execution_count = count
        cell.outputs = normalise_outputs(outputs[cell.id], count)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    nbformat.write(notebook, unfinished)
    unfinished.replace(path)
    print(f"{path} holds the outputs of this run.")


def normalise_outputs(outputs, count):
    """Return a cell's outputs without what differs by chance: widgets, and how a stream was cut into pieces."""
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


def main(action, *arguments):
    page, others = "mnist", list(arguments)
    if others and not others[0].startswith("-"):
        page = others.pop(0)
    if page not in PAGES:
        sys.exit(f"error: there is no page {page!r}. The pages are {', '.join(PAGES)}.")
    if action == "tutorial":
        tutorial(page, others)
    elif others:
        sys.exit(f"error: ci/refresh takes the name of a page and nothing else, not {' '.join(others)}.")
    else:
        refresh(page)


if __name__ == "__main__":
    main(*sys.argv[1:])
