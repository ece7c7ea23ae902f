"""Fixtures: copies of the project for the tests that run its scripts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import PROJECT, copy_project, link_environment

# A shell ignores SIGINT in what it starts with &, and children inherit that; tests send it as Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cluster") and not os.environ.get("TUTORIAL_CLUSTER"):
            item.add_marker(pytest.mark.skip(reason="needs a cluster of its own, which ci/test --cluster brings up"))
    # The site last, as it tells what the tests ran; and after it what takes the cluster down.
    late = ["test_draw.py", "test_site.py", "test_cluster.py"]
    items.sort(key=lambda item: late.index(item.path.name) if item.path.name in late else -1)


@pytest.fixture
def project(tmp_path):
    """A copy of the project in a folder with spaces in its name."""
    return copy_project(tmp_path / "a folder with spaces")


@pytest.fixture(scope="session")
def installed():
    """Be sure that the environment of the tests is that of requirements.txt, so that no script changes it."""
    uv = [Path(sys.prefix, "bin/uv"), "pip", "sync", "--check", "--offline", "--quiet", "--python", sys.executable]
    done = subprocess.run([*uv, PROJECT / "requirements.txt"], capture_output=True, text=True)
    assert done.returncode == 0, f"{sys.prefix} is not what requirements.txt names; ci/test makes it so\n{done.stderr}"


@pytest.fixture
def ready(project, installed):
    """The same with the environment that the tests run in; its scripts find it complete."""
    link_environment(project)
    return project


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the four files of a small data set."""
    from tests.support.data import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def one_process(monkeypatch):
    """One thread, which takes sums in one order, for results equal to the last bit; and no launcher's variables."""
    import torch

    from tests.support.processes import VARIABLES

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(threads)
