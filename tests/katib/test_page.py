"""notebooks/katib.ipynb, run from top to bottom: by papermill on the cluster, and by nbval without one."""

import re

import pytest

from tests.support.cluster import run_page, wait_until_gone
from tests.support.data import make_data
from tests.support.network import cut_off
from tests.support.pages import cell, figures, nbval, papermill, read, text
from tests.support.project import PROJECT, copy_project

PAGE = read("katib")
ALGORITHMS = "random", "tpe", "bayesianoptimization"
TRIALS = 4  # of each search, in the tests
pytestmark = pytest.mark.slow
cluster = pytest.mark.cluster
of_mnist = pytest.mark.skipif(
    "not os.environ.get('MNIST_DIR')", reason="smaller data have no 50,000 images to hold out"
)


def results(page):
    """Return what the page's table says of each step that ran, by the step."""
    rows = [re.split(" {2,}", line) for line in text(cell("what-ran", page)).splitlines()[2:]]
    return {row[0]: row[3] for row in rows if row[1] == "ran"}


def test_committed_outputs_are_of_mnist_and_a_cluster():
    assert text(cell("data", PAGE)) == "MNIST\n" and " skipped " not in text(cell("what-ran", PAGE))
    for algorithm in ALGORITHMS:
        assert int(results(PAGE)[f"{algorithm} search by Katib"].split()[0]) >= 12
    assert float(results(PAGE)["train on all, test once"].split("%")[0]) > 99


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page, run on the cluster with a small budget; --validation 50000 leaves 10,000 images to train on."""
    values = {"max_trials": TRIALS, "validation": 50_000, "algorithms": "random,tpe"}
    return run_page("katib", tmp_path_factory.mktemp("it's a tarball"), **values)


@cluster
@of_mnist
def test_all_steps_run_and_leave_nothing_behind(executed):
    table = text(cell("what-ran", executed))
    assert " skipped " not in table and " failed " not in table
    kinds = "experiments,suggestions,trials,pytorchjobs,trainjobs,deployments,services,pods"
    wait_until_gone(kinds, besides="service/kubernetes")
    written = executed.project / "jobs" / "katib-mnist.yaml"
    assert written.read_bytes() == (PROJECT / "jobs" / "katib-mnist.yaml").read_bytes()


@cluster
@of_mnist
def test_searches(executed):
    """Each has all its trials; the page's best one is Katib's optimum."""
    found = [results(executed)[f"{name} search by Katib"] for name in ("random", "tpe")]
    best = max((re.match(rf"{TRIALS} Succeeded; best: (\S+)% ", result)[1] for result in found), key=float)
    assert text(cell("optimum", executed)).splitlines()[-1].startswith(f"{best}% {{'lr': ")
    assert text(cell("optimum", executed)).count("ExperimentMaxTrialsReached") == 2
    assert len(figures(executed)) == len(figures(PAGE))


@cluster
@of_mnist
def test_what_katib_adds_to_a_trial(executed):
    assert "metrics-logger-and-collector" in text(cell("collector", executed))
    assert re.search(
        r"python /app/mnist.py .*--lr=0\.\d+ .*1>/var/log/katib/metrics.log", text(cell("collector", executed))
    )
    for resource in "experiment.kubeflow.org/mnist-", "suggestion.kubeflow.org/mnist-", "trial.kubeflow.org/mnist-":
        assert resource in text(cell("look", executed))


@cluster
@of_mnist
def test_medianstop_stops_a_trial_by_its_rule(executed):
    (figure,) = [output for output in cell("early-plot", executed).outputs if "data" in output]
    ends = re.findall(r"lr (\S+), (\w+) after (\d) epochs", figure.metadata["image/png"]["alt"])
    assert sorted(ends) == [("0.0002", "EarlyStopped", "2"), ("0.05", "Succeeded", "4"), ("0.1", "Succeeded", "4")]
    rules = re.findall(r"stop below (.+)", text(cell("early-plot", executed)))
    assert rules[0] == "(no rule)" and all(0.5 < float(rule) < 1 for rule in rules[1:])


@cluster
@of_mnist
def test_trials_that_are_trainjobs(executed):
    assert results(executed)["trials as TrainJobs"].startswith("2 Succeeded; best: ")
    assert text(cell("trainjob", executed)).count("trainjob.trainer.kubeflow.org/") == 2
    assert text(cell("sdk", executed)).startswith("Complete 2 trials; accuracy")


@of_mnist
def test_without_a_cluster_the_same_search_runs_here(tmp_path):
    """nbval runs the page without network and cluster, with the budget of the tests, and the solutions after it."""
    project = copy_project(tmp_path / "project")
    path = project / "notebooks" / "katib.ipynb"
    small = path.read_text().replace("max_trials = 12", f"max_trials = {TRIALS}").replace("10_000  #", "50_000  #")
    path.write_text(small)
    done = nbval(project, "katib", start=cut_off, KUBECONFIG="no/such/kubeconfig")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values, problem", [
    (("-p", "strict", "True", "-p", "image", "localhost:9/a:1"), "strict is set and there is no cluster: "),
    (("-p", "algorithms", "random, grid"), "algorithms is 'random, grid'; without Katib there are random, tpe, bayes"),
])  # fmt: skip
def test_page_stops_before_it_trains(tmp_path, values, problem):
    project = copy_project(tmp_path / "project")
    done, page = papermill(
        project, "-p", "data_dir", make_data(tmp_path / "data"), *values, name="katib", start=cut_off
    )
    assert done.returncode and f"PageError: {problem}" in done.stderr
    assert not cell("baseline", page).outputs
