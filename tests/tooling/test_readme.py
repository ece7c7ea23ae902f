"""What the README says can be done."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from tests.support.data import make_data
from tests.support.processes import environment
from tests.support.project import PROJECT

README = (PROJECT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PROGRAMS = [command for command in COMMANDS if re.search(r" (mnist|autoencoder)\.py", command)]


def test_files_that_it_names_are_there():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (PROJECT / name).exists(), name
    for script in set(re.findall(r"\bci/(\w+)(?!/)\b", README)) - {"cluster"}:
        assert os.access(PROJECT / "ci" / script, os.X_OK), script


def test_options_that_it_names_are_there():
    assert len(PROGRAMS) >= 4
    for command in PROGRAMS:
        program, options = re.search(r"(\w+\.py)(.*)", command).groups()
        known = re.findall(r'"(--[\w-]+)"', (PROJECT / program).read_text())
        assert set(re.findall(r" (--[\w-]+)", options)) <= {*known}, command


@pytest.mark.slow
def test_trainer_commands(project):
    """As they are written, on small data and for one epoch."""
    make_data(project / "data/MNIST/raw")  # where the page puts MNIST
    variables = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", HOME=str(project))
    for command in PROGRAMS:
        if " mnist.py" in command:
            command = re.sub("--epochs [0-9]+", "--epochs 1", command)
            options = {"shell": True, "cwd": project, "capture_output": True, "text": True, "timeout": 120}
            done = subprocess.run(command, env=variables, **options)
            assert done.returncode == 0, done.stderr
            assert re.search(r" accuracy=\d", done.stdout)
    assert (project / "run.pt").exists() and (project / "mnist.pt").exists()


def test_table_is_that_of_the_committed_page():
    page = nbformat.read(PROJECT / "notebooks/mnist.ipynb", as_version=4)
    [output] = next(cell for cell in page.cells if cell.id == "what-ran").outputs
    assert textwrap.indent(output.data["text/plain"], "    ") + "\n" in README
