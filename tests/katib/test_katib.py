"""What the page uses: its Experiment on the cluster, the reasons of what goes wrong, and the search on this machine."""

import copy
import sys
import time

import pytest
import yaml
from support import katib, pytorchjob
from support.page import PageError

from tests.support.cluster import REGISTRY, create, kubectl, wait_until_gone
from tests.support.cluster import namespace as namespace
from tests.support.project import PROJECT

cluster = pytest.mark.cluster
FILE = PROJECT / "jobs" / "katib-mnist.yaml"
MANIFEST = yaml.safe_load(FILE.read_text())
DOUBLE = {"parameterType": "double", "feasibleSpace": {"min": "0", "max": "1"}}
FROM_0 = [parameter | DOUBLE for parameter in MANIFEST["spec"]["parameters"]]
BAYESIAN = {"algorithm": {"algorithmName": "bayesianoptimization"}}
LABELLED = "katib.kubeflow.org/metrics-collector-injection=enabled"
EVERYTHING = "experiments,suggestions,trials,pytorchjobs,deployments,services,pods"


@cluster
def test_manifest_fits_the_installed_kind(namespace):
    """With all fields known, those of the PyTorchJob in it too."""
    kubectl("label", "namespace", namespace, LABELLED)
    options = "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-n", namespace
    assert "created" in kubectl("create", *options, "-f", str(FILE))
    trial = {"metadata": {"name": "trial"}, **MANIFEST["spec"]["trialTemplate"]["trialSpec"]}
    assert "created" in kubectl("create", *options, "-f", "-", given=yaml.safe_dump(trial))
    assert pytorchjob.find_cluster(**katib.KIND)[1] == ""


@pytest.fixture
def start(namespace):
    """A function that creates an Experiment whose trials run a shell script, $4 is --lr=..., and returns its name."""
    kubectl("label", "namespace", namespace, LABELLED)

    def create_experiment(script, image="mnist:base", **spec):
        experiment = copy.deepcopy(MANIFEST)
        experiment["metadata"]["namespace"] = namespace
        experiment["spec"] |= {"maxTrialCount": 2, "parallelTrialCount": 1, "maxFailedTrialCount": 0, **spec}
        job = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]
        container = job["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
        container |= {"image": f"{REGISTRY}/tutorial/{image}", "command": ["env", "sh", "-c", '"$SCRIPT"', "sh"]}
        container["env"].append({"name": "SCRIPT", "value": script})  # as Katib joins the words without quotes
        return create(experiment).split("/")[1]

    return create_experiment


@cluster
@pytest.mark.slow
def test_follow_raises_the_reason(start, namespace):
    fails = start("echo this is why; sleep 5; exit 3")
    silent = start("echo precision=0.9; sleep 5")
    no_image = start("true", image="nosuch:1")
    setting = {"algorithmName": "tpe", "algorithmSettings": [{"name": "no_such_setting", "value": "1"}]}
    no_setting, no_suggestion = start("true", algorithm=setting), start("true", parameters=FROM_0, **BAYESIAN)
    with pytest.raises(PageError, match="failed: Experiment has failed .*\n(.*\n)*.*this is why"):
        katib.follow(fails, namespace, patience=120)
    with pytest.raises(PageError, match="failed: Experiment has failed .*\n.* is MetricsUnavailable\n"):
        katib.follow(silent, namespace, patience=120)
    with pytest.raises(PageError, match=r"is not done after \d+ s\nIt cannot succeed. .*nosuch:1: not found"):
        katib.follow(no_image, namespace, patience=120)
    with pytest.raises(PageError, match="failed: Suggestion has failed\n.*unknown setting no_such_setting"):
        katib.follow(no_setting, namespace, patience=120)
    with pytest.raises(PageError, match=r"is not done after \d+ s\n.*should not contain 0"):
        katib.follow(no_suggestion, namespace, patience=1)


@cluster
@pytest.mark.slow
def test_follow_says_why_there_are_no_pods(start, namespace):
    kubectl("create", "quota", "pods", "--hard=pods=1", "-n", namespace)  # that of the suggestion service
    with pytest.raises(PageError, match=r"is not done after \d+ s\n.*exceeded quota"):
        katib.follow(start("true"), namespace, patience=15)


@cluster
def test_refused_experiments(start):
    for spec, reason in [
        ({"algorithm": {"algorithmName": "nosuch"}}, "nosuch"),
        ({"maxFailedTrialCount": 9}, "less than or equal to spec.maxTrialCount"),
    ]:
        with pytest.raises(AssertionError, match=f"denied the request: .*{reason}"):
            start("true", **spec)


@cluster
@pytest.mark.slow
def test_search_that_is_deleted_in_the_middle_leaves_nothing(start, namespace):
    """One trial has ended, the other one is running."""
    name = start('echo "accuracy=${4#--lr=}"; sleep 5', maxTrialCount=9)
    deadline = time.monotonic() + 120
    while [trial.state for trial in katib.get_trials(name, namespace)][:2] != ["Succeeded", "Running"]:
        assert time.monotonic() < deadline, katib.get_trials(name, namespace)
        time.sleep(0.5)
    trial = katib.get_trials(name, namespace)[0]
    assert trial.accuracy == pytest.approx(float(trial.parameters["lr"]))
    assert trial.parameters["batch_size"] in ("128", "256", "512", "1024")
    kubectl("delete", "experiment", name, "-n", namespace)
    wait_until_gone(EVERYTHING, "-n", namespace)


def search(algorithm="random", program="print('accuracy=0.5')", **spec):
    """Return the trials of a search whose trials are a line of Python, called with the learning rate."""
    experiment = copy.deepcopy(MANIFEST)
    experiment["spec"] |= {"maxTrialCount": 6, "parallelTrialCount": 1, **spec}
    experiment["spec"]["algorithm"]["algorithmName"] = algorithm
    return katib.search(experiment, [sys.executable, "-c", program, "--lr=${trialParameters.lr}"])


@pytest.mark.parametrize("algorithm", katib.SAMPLERS)
def test_search_without_a_cluster(algorithm, capsys):
    program = "import sys; print('accuracy=0.1\\naccuracy=%s' % (float(sys.argv[1][5:]) / 2))"
    trials, again = search(algorithm, program), search(algorithm, program)
    for trial in trials:
        values = trial.parameters
        assert 0.001 <= float(values["lr"]) <= 1 and 0.3 <= float(values["momentum"]) <= 0.95
        assert values["batch_size"] in ("128", "256", "512", "1024")
        assert (trial.state, trial.accuracy) == ("Succeeded", float(values["lr"]) / 2)
    assert trials == again  # random_state
    assert capsys.readouterr().out.splitlines()[5].startswith("6 Succeeded; best: ")


def test_trials_run_side_by_side():
    program = "import time; begun = time.time(); time.sleep(1); print(f'accuracy={begun}')"
    first, second = (trial.accuracy for trial in search(program=program, maxTrialCount=2, parallelTrialCount=2))
    assert abs(first - second) < 0.9


def test_search_whose_trial_fails():
    with pytest.raises(PageError, match="trial-0 failed with {'lr': (.*\n)+.*no such thing"):
        search(program="import sys; sys.exit('no such thing')")
