"""Fixtures: copies of the project for the tests that run its scripts."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
# A shell ignores SIGINT in what it starts with &, and children inherit that; tests send it as Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)

MADE = {".git", ".venv", "build", "data", "dist"}  # by git and by the scripts


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cluster") and not os.environ.get("TUTORIAL_CLUSTER"):
            item.add_marker(pytest.mark.skip(reason="needs a cluster of its own, which ci/test --cluster brings up"))
    items.sort(key=lambda item: item.path.name == "test_cluster.py")  # last: it takes the cluster down


def copy_project(target):
    """Copy the project without anything that was made in it; return the copy's path."""
    def left_out(folder, names):
        return (MADE if Path(folder) == PROJECT else set()) | {"__pycache__", ".ipynb_checkpoints", ".pytest_cache"}

    return Path(shutil.copytree(PROJECT, target, ignore=left_out))


@pytest.fixture
def project(tmp_path):
    """A copy of the project in a folder with spaces in its name."""
    return copy_project(tmp_path / "a folder with spaces")


@pytest.fixture
def ready(project):
    """The same with an environment that the scripts take for theirs; its content is that of this Python's."""
    (project / ".venv").mkdir()
    for name in os.listdir(sys.prefix):
        if name != "made-from.txt":
            (project / ".venv" / name).symlink_to(Path(sys.prefix, name))
    stamp = "import environment; environment.STAMP.write_bytes(environment.stamp())"
    subprocess.run([sys.executable, "-c", stamp], cwd=project / "ci", check=True)
    return project


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the four files of a small data set."""
    from trainer import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def one_process(monkeypatch):
    """One thread, which takes sums in one order, for results equal to the last bit; and no launcher's variables."""
    import torch
    from trainer import VARIABLES

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(threads)
