"""TrainJobs on a cluster: followed to their end, with the reason of what goes wrong, on which a TrainJob is silent."""

import contextlib
import json
import time
from pathlib import Path

import yaml
from kubernetes import client

from support.page import PageError
from support.pytorchjob import Follower, cannot_succeed, explain, find_cluster, get_conditions, query

KIND = {"api": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "operator": "Kubeflow Trainer v2"}
LABEL = "jobset.sigs.k8s.io/jobset-name"  # of the pods


def write(manifest: dict, path) -> str:
    """Write a manifest as YAML and return its text, as a reader would write it."""
    text = yaml.safe_dump(manifest, sort_keys=False)
    Path(path).write_text(text)
    return text


def get(resource, namespace, *options):
    """Return what the cluster knows of a resource, like trainjob/mnist-x7k2p, as a dict; raise PageError if nothing."""
    found, text = query("kubectl", "get", resource, f"--namespace={namespace}", "--output=json", *options)
    if not found:
        raise PageError(f"kubectl cannot get {resource}: {text}")
    return json.loads(text)


def get_pods(name, namespace):
    """Return the pods of a TrainJob as dicts, the node of rank 0 first."""
    pods = get("pods", namespace, f"--selector={LABEL}={name}")["items"]
    return sorted(pods, key=lambda pod: pod["metadata"]["name"])


def no_queue():
    """Return why there can be no queue for PyTorchJobs and TrainJobs; an empty text if there can."""
    problem = find_cluster("kueue.x-k8s.io/v1beta2", "LocalQueue", "Kueue")[1] or find_cluster()[1]  # of PyTorchJobs
    allowed = query("kubectl", "auth", "can-i", "create", "clusterqueues.kueue.x-k8s.io")[0]
    return problem or ("" if allowed else "you may not create a ClusterQueue")


def find_reason(name: str, namespace: str) -> str:
    """Return why a TrainJob does not go on, as pods, logs and events tell; empty if nothing hinders it."""
    cluster = Follower(f"trainjob/{name}", namespace)
    try:
        pods = cluster.core.list_namespaced_pod(namespace, label_selector=f"{LABEL}={name}").items
        if reason := cluster.find_reason(pods):
            return f"It cannot succeed. {reason}" if cannot_succeed(pods) else reason
        # Pod Security or a quota refused pods to the Job, or the API server the Job to the JobSet.
        refused = [text for text in cluster.warnings(f"{name}-node-0") if "FailedCreate" in text]
        return "".join((cluster.warnings(name) * (not pods) + refused)[-1:])
    except client.ApiException as error:
        raise PageError(explain(error)) from None


def watch(name: str, namespace: str, patience: float = 300, kind="trainjob", find_reason=find_reason):
    """Yield a TrainJob, or a resource of another kind, a dict, every second, and show what hinders it.

    Raises PageError with the reason if it fails, cannot succeed, or is not done within `patience` seconds.
    """
    end, reason = time.monotonic() + patience, ""
    while True:
        job = get(f"{kind}/{name}", namespace)
        conditions = get_conditions(job)
        found = "" if {"Complete", "Succeeded", "Suspended"} & conditions.keys() else find_reason(name, namespace)
        if found and found != reason:
            print(f"({found})", flush=True)
        reason = found or reason
        stays = f"{reason}\nThe {kind} stays, to be looked at; to end it: kubectl delete -n {namespace} {kind}/{name}"
        if failed := conditions.get("Failed"):
            raise PageError(f"{name} failed: {failed['message']}\n{stays}")
        if reason.startswith("It cannot succeed") or time.monotonic() > end:
            raise PageError(f"{name} is not done after {patience - end + time.monotonic():.0f} s\n{stays}")
        yield job
        time.sleep(1)


def follow(trainer, name: str, patience: float = 300) -> None:
    """Show a TrainJob's log until it is complete; raises what `watch` raises. trainer: a TrainerClient."""
    namespace, shown = trainer.backend.namespace, None
    try:
        while True:
            for job in watch(name, namespace, patience):
                pods = get_pods(name, namespace)
                statuses = [status for pod in pods[:1] for status in pod["status"].get("containerStatuses", [])]
                container = [status.get("containerID") for status in statuses]  # another one after each restart
                ready = pods and "Pending" not in [pod["status"]["phase"] for pod in pods]
                if ready and container != shown:
                    break
                if "Complete" in get_conditions(job):
                    return
            shown = container
            with contextlib.suppress(RuntimeError):  # the pod has gone in this moment
                for line in trainer.get_job_logs(name, follow=True):
                    print(line, flush=True)
    except KeyboardInterrupt:
        print(f"The job goes on. To end it: kubectl delete -n {namespace} trainjob/{name}")
        raise
