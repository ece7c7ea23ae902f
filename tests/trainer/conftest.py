"""Fixtures: the command line run in this process, and trainings that several tests compare with."""

import pytest

from tests.support.data import weights
from tests.support.processes import LONG, OUTPUTS, SHORT, Run, call, pytorchjob


@pytest.fixture(autouse=True)
def single_process(one_process):
    """What runs in this process gives results equal to the last bit."""


@pytest.fixture
def trained(data, tmp_path, capsys):
    """Train with the given arguments; return the log and the weights."""

    def trained(*argv, folder=data):
        status = call("--data", folder, "--save-model", tmp_path / "model", *argv)
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out, weights(tmp_path / "model")

    return trained


@pytest.fixture
def refused(data, capsys):
    """Run with arguments that end with exit status 1 and one line on standard error; return that line."""

    def refused(*argv, folder=data):
        status = call("--data", folder, *argv)
        out, err = capsys.readouterr()
        assert (status, out) == (1, "")
        assert err.startswith("mnist.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err

    return refused


@pytest.fixture(scope="session")
def short_run(data, tmp_path_factory):
    """The folder with the log, the checkpoint and the model file of a run with SHORT."""
    return Run(tmp_path_factory.mktemp("short"), "--data", data, *SHORT, *OUTPUTS).succeed().folder


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory):
    """The weights, by the number of processes, of runs with LONG that nobody interrupted."""
    runs = {n: pytorchjob(tmp_path_factory.mktemp("long"), n, "--data", data, *LONG, *OUTPUTS) for n in (1, 2)}
    return {n: weights([run.succeed() for run in runs[n]][0].folder / "model") for n in runs}
