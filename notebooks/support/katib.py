"""Hyperparameters tuned: Katib's Experiments followed on a cluster, and the same search by Optuna on this machine."""

import math
import os
import re
import subprocess
from dataclasses import dataclass

import optuna

from support.page import PageError
from support.pytorchjob import Follower, cannot_succeed, get_conditions
from support.trainjob import get, watch

KIND = {"api": "kubeflow.org/v1beta1", "kind": "Experiment", "operator": "Katib"}
LABEL = "katib.kubeflow.org/experiment"  # of an Experiment's trials and all their pods
COLLECTOR = "metrics-logger-and-collector"  # the container that Katib puts beside a trainer, and that has its log
SAMPLERS = {"random": "RandomSampler", "tpe": "TPESampler", "bayesianoptimization": "GPSampler"}  # of Optuna


@dataclass
class Trial:
    """One training: its parameters as on a command line, Katib's state, and its accuracy (0..1) or NaN."""

    name: str
    parameters: dict[str, str]
    state: str = "Created"
    accuracy: float = math.nan


def get_trials(name: str, namespace: str) -> list[Trial]:
    """Return the trials of an Experiment, in the order in which they were made."""
    items, trials = get("trials", namespace, f"--selector={LABEL}={name}")["items"], []
    for item in sorted(items, key=lambda item: (item["metadata"]["creationTimestamp"], item["metadata"]["name"])):
        parameters = {p["name"]: p["value"] for p in item["spec"]["parameterAssignments"]}
        state = ["Created", *get_conditions(item)][-1]
        observed = item.get("status", {}).get("observation", {}).get("metrics", [])
        latest = {metric["name"]: metric["latest"].replace("unavailable", "nan") for metric in observed}
        trials.append(Trial(item["metadata"]["name"], parameters, state, float(latest.get("accuracy", "nan"))))
    return trials


def describe(trials: list[Trial]) -> str:
    """Return a line on how far a search is."""
    states = [trial.state for trial in trials]
    line = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(["Succeeded", *sorted(states)]))
    if done := [trial for trial in trials if trial.state == "Succeeded"]:
        best = max(done, key=lambda trial: trial.accuracy)
        line += f"; best: {best.accuracy:.2%} with " + ", ".join(f"{k} {v[:6]}" for k, v in best.parameters.items())
    return line


def find_reason(name: str, namespace: str) -> str:
    """Return why an Experiment does not go on, as pods, logs and events tell; empty if nothing hinders it."""
    cluster = Follower(f"experiment/{name}", namespace, log_of=COLLECTOR)
    found = cluster.core.list_namespaced_pod(namespace, label_selector=f"{LABEL}={name}").items
    pods = [pod for pod in found if not pod.metadata.deletion_timestamp]  # the suggestion service ends by a signal
    pending = [pod for pod in pods if pod.status.phase == "Pending"]
    if cannot_succeed(pending):  # Katib lets it wait for ever; other failures it counts
        return f"It cannot succeed. {pending[0].metadata.name} waits: {cluster.waits_for(pending[0])}"
    trials = get_trials(name, namespace)
    suggestions = get("suggestions", namespace, f"--field-selector=metadata.name={name}")["items"]
    said = [c["message"] for s in suggestions for c in get_conditions(s).values() if c["type"] == "Failed"]
    said += [f"{t.name} is {t.state}" for t in trials if t.state in ("Failed", "MetricsUnavailable")]
    with_pods = [pod.metadata.labels.get("katib.kubeflow.org/trial") for pod in pods]
    said += [text for t in trials if t.name not in with_pods for text in cluster.warnings(t.name)]
    return cluster.find_reason(pods) or (said or cluster.warnings(name) * (not trials) or [""])[-1]


def follow(name: str, namespace: str, patience: float = 900) -> list[Trial]:
    """Show how far an Experiment is until it has succeeded; return its trials.

    Raises PageError with the reason if it fails, cannot succeed, or is not done within `patience` seconds.
    """
    said = ""
    try:
        for experiment in watch(name, namespace, patience, "experiment", find_reason):
            trials = get_trials(name, namespace)
            if (line := describe(trials)) != said:
                print(line, flush=True)
                said = line
            if "Succeeded" in get_conditions(experiment):
                return trials
    except KeyboardInterrupt:
        print(f"The search goes on. To end it: kubectl delete -n {namespace} experiment/{name}")
        raise


def search(experiment: dict, command: list[str]) -> list[Trial]:
    """Run the trials of an Experiment, a dict, as processes of this machine, with suggestions by Optuna's SAMPLERS.

    In the command, `${trialParameters.NAME}` stands for a parameter. Returns the trials; raises PageError if one fails.
    """
    spec, algorithm, trials = experiment["spec"], experiment["spec"]["algorithm"]["algorithmName"], []

    def objective(asked):
        for parameter in spec["parameters"]:
            name, values = parameter["name"], parameter["feasibleSpace"]
            if "list" in values:
                asked.suggest_categorical(name, values["list"])
            else:
                log = values.get("distribution") == "logUniform"
                asked.suggest_float(name, float(values["min"]), float(values["max"]), log=log)
        trial = Trial(f"trial-{asked.number}", {name: str(value) for name, value in asked.params.items()}, "Running")
        trials.append(trial)
        words = [re.sub(r"\$\{trialParameters\.(\w+)\}", lambda m: trial.parameters[m[1]], word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise PageError(f"{trial.name} failed with {trial.parameters}:\n{done.stdout}{done.stderr}")
        trial.state, trial.accuracy = "Succeeded", float(re.findall(r"accuracy=(\S+)", done.stdout)[-1])
        print(describe(trials), flush=True)
        return trial.accuracy

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {} if algorithm == "random" else {"n_startup_trials": 4}  # random ones at first
    seeds = [int(s["value"]) for s in spec["algorithm"]["algorithmSettings"] if s["name"] == "random_state"]
    sampler = getattr(optuna.samplers, SAMPLERS[algorithm])(seed=seeds[0], **options)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, spec["maxTrialCount"], n_jobs=spec["parallelTrialCount"])
    return trials
