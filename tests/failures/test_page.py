"""notebooks/failures.ipynb, run from top to bottom: by papermill on the cluster, and by nbval without one."""

import re

import pytest

from tests.support.cluster import kubectl, run_page, wait_until_gone
from tests.support.data import make_data
from tests.support.network import cut_off
from tests.support.pages import cell, figures, nbval, papermill, read, text
from tests.support.project import PROJECT, copy_project

PAGE = read("failures")
HERE = ["SIGKILL", "SIGTERM", "SIGSEGV", "SIGSTOP", "disk", "torn"]
ON_CLUSTER = ["process killed", "node drained", "memory limit", "network cut", "master's pod deleted"]
ON_CLUSTER += ["worker's pod deleted", "process killed", "process killed"]  # the last two in TrainJobs
STEPS = 118  # in an epoch of MNIST
pytestmark = pytest.mark.slow
cluster = pytest.mark.cluster
of_mnist = pytest.mark.skipif("not os.environ.get('MNIST_DIR')", reason="smaller data train too quickly to be struck")


def table(name, page):
    """Return the rows of a table of strikes: failure, where, what you see, seconds, steps repeated, weights."""
    return [re.split(" {2,}", line) for line in text(cell(name, page)).splitlines()[2:]]


def check_strikes(rows, expected):
    """All happened, left their line in the log, cost at most an epoch, and did not change the weights."""
    assert [row[0] for row in rows] == expected
    for failure, _, line, seconds, repeated, weights in rows:
        assert line and float(seconds) > 1 and int(repeated) <= STEPS and weights == "equal", failure
        told = re.search("SIGTERM|deleted|drained", failure)
        assert not told or int(repeated) == 0, failure  # by SIGTERM, they save before they end


def test_committed_outputs_are_of_mnist_and_a_cluster():
    assert text(cell("data", PAGE)) == "MNIST\n" and " skipped " not in text(cell("what-ran", PAGE))
    here, there = table("local-table", PAGE), table("table", PAGE)
    check_strikes(here, ["SIGKILL"] * 3 + HERE[1:])
    check_strikes(there[len(here) + 1 :], ON_CLUSTER)
    assert int(there[len(here)][4]) > 2 * STEPS and "no checkpoint" in there[len(here)][1]
    assert ["memory limit", "PyTorchJob", "OOMKilled, exit code 137"] in [row[:3] for row in there]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page, run on the cluster with few epochs and one strike on this machine."""
    values = {"epochs": 3, "kills": 1, "strikes": "SIGKILL", "timeout": 20}  # a pod may take longer than 10 s to start
    return run_page("failures", tmp_path_factory.mktemp("it's a tarball"), **values)


@cluster
@of_mnist
def test_all_steps_run_and_leave_nothing_behind(executed):
    ran = text(cell("what-ran", executed))
    assert " skipped " not in ran and " failed " not in ran and "4 of 4 equal" in ran
    wait_until_gone("pytorchjobs,trainjobs,trainingruntimes,jobsets,jobs,pods")
    assert "unschedulable" not in kubectl("get", "nodes", "-o", "yaml")
    written = executed.project / "jobs" / "pytorchjob-checkpoint.yaml"
    assert written.read_bytes() == (PROJECT / "jobs" / "pytorchjob-checkpoint.yaml").read_bytes()


@cluster
@of_mnist
def test_every_strike_on_the_cluster(executed):
    """None was missed: a run in which nobody was killed would prove nothing."""
    rows = table("table", executed)
    check_strikes(rows[:1], ["SIGKILL"])
    check_strikes(rows[2:], ON_CLUSTER)
    assert int(rows[1][4]) >= STEPS, "without a checkpoint all is lost"
    assert len(figures(executed)) == len(figures(PAGE))


@of_mnist
def test_every_strike_on_this_machine(tmp_path):
    """nbval runs the page without network and cluster, with few epochs, and the solutions after it."""
    project = copy_project(tmp_path / "project")
    path = project / "notebooks" / "failures.ipynb"
    path.write_text(path.read_text().replace("epochs = 5 ", "epochs = 2 ").replace("kills = 3 ", "kills = 1 "))
    done = nbval(project, "failures", start=cut_off, KUBECONFIG="no/such/kubeconfig")
    assert done.returncode == 0, done.stdout
    state = project / "build" / "failures"
    assert (state / "model.pt").read_bytes() == (state / "reference.pt").read_bytes()


@pytest.mark.parametrize("line, broken, problem", [
    ("torch.manual_seed(hash((seed, epoch, step, rank)))", "pass", "not equal: the disturbed run ended with other"),
    ("if checkpoint and rank == 0:", "if rank == 0 and 'undisturbed' in checkpoint:", r"\d+ steps were lost: "),
], ids=["random state not restored", "checkpoint not written"])  # fmt: skip
def test_broken_recovery_is_found(line, broken, problem, tmp_path):
    """The page says so and stops. SIGTERM, as it is the one after which a run goes on in the middle of an epoch."""
    project = copy_project(tmp_path / "project")
    trainer = (project / "mnist.py").read_text()
    assert trainer.count(line) == 1
    (project / "mnist.py").write_text(trainer.replace(line, broken))
    values = {"epochs": 3, "kills": 0, "strikes": "SIGTERM"}
    values["data_dir"] = make_data(tmp_path / "data", train=30_011, test=1009)
    arguments = [word for name, value in values.items() for word in ("-p", name, value)]
    done, page = papermill(project, *arguments, name="failures", start=cut_off)
    assert done.returncode and re.search(f"PageError: {problem}", done.stderr), done.stderr
    assert not cell("local-table", page).outputs


@pytest.mark.parametrize("values, problem", [
    (("-p", "strict", "True", "-p", "image", "localhost:9/a:1"), "strict is set and there is no cluster: "),
    (("-p", "strikes", "SIGKILL,SIGHUP"), "epochs and processes must be at least 2, strikes some of SIG"),
])  # fmt: skip
def test_page_stops_before_it_trains(tmp_path, values, problem):
    project, data = copy_project(tmp_path / "project"), make_data(tmp_path / "data")
    done, page = papermill(project, "-p", "data_dir", data, *values, name="failures", start=cut_off)
    assert done.returncode and f"PageError: {problem}" in done.stderr
    assert not cell("undisturbed", page).outputs
