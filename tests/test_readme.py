"""Every command of the README is run by a test: here, or where TESTED says."""
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from trainer import make_data

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
TRAINERS = [command for command in COMMANDS if re.search(r" (mnist|autoencoder)\.py ", command)]
TESTED = {
    "ci/tutorial -p epochs 1": "test_tarball.py",
    "ci/tutorial flyte -p epochs 1": "test_scripts.py",
    "ci/tutorial lightning -p epochs 2": "test_scripts.py",
    'curl -fL "$ADDRESS" | tar xz': "test_tarball.py",
    "ci/lab": "test_scripts.py",
    "ci/tutorial --cluster -p epochs 1 -p strict True": "test_environment.py",
    "ci/tutorial -p image registry.example.com/me/mnist:1 -p namespace team": "test_scripts.py",
    "ci/refresh --cluster": "test_scripts.py",
    "ci/refresh flyte": "test_scripts.py",
    "ci/refresh lightning": "test_scripts.py",
    "dstack apply -f autoencoder.dstack.yml --gpu 4 -e EPOCHS=20": "test_dstack.py",
    "pyflyte run flyte_mnist.py pipeline --data_dir /path/to/mnist --hyperparameters "
    "'{\"epochs\": 1}'": "test_flyte.py",
    "ci/test": "test_environment.py",
}


def test_every_command_is_tested():
    assert set(COMMANDS) == {*TRAINERS, *TESTED}
    for command, file in TESTED.items():
        name = re.search(r"[\w/]+", command)[0].split("/")[-1]
        assert name in (PROJECT / "tests" / file).read_text(), command
    for script in set(re.findall(r"\bci/(\w+)(?!/)\b", README)):
        assert os.access(PROJECT / "ci" / script, os.X_OK), script


@pytest.mark.slow
def test_trainer_commands(project):
    """As they are written, on small data and for one epoch."""
    data = make_data(project / "small")
    for command in TRAINERS:
        command = re.sub("--epochs [0-9]+", "--epochs 1", command.replace("/path/to/mnist", str(data)))
        command = command.replace(f"--data {data}", f"--data '{data}'")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HOME": str(project)})
        assert done.returncode == 0, done.stderr
        assert re.search(r"^(accuracy|val_loss)=\d", done.stdout, re.MULTILINE)
    assert (project / "run.pt").exists() and (project / "mnist.pt").exists()


def test_files_that_it_names_are_there():
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (PROJECT / name).exists(), name


def test_table_is_that_of_the_committed_page():
    page = nbformat.read(PROJECT / "notebooks/mnist.ipynb", as_version=4)
    output, = next(cell for cell in page.cells if cell.id == "what-ran").outputs
    assert textwrap.indent(output.data["text/plain"], "    ") + "\n" in README
