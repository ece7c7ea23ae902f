"""PyTorchJobs on a cluster: what is needed, the manifest filled in, and a job followed to its end."""

import json
import math
import os
import re
import shutil
import subprocess
import time

import urllib3
from kubernetes import client, config, watch
from kubernetes.utils.quantity import parse_quantity

from support.page import PageError, no_registry, what_is_installed

LABEL = "training.kubeflow.org/job-name"
CONTAINER = "pytorch"  # the name that the operator looks for, too
# Why a container waits in vain. Pulling an image is tried again; that is in vain if there is none, or access is denied.
FATAL_REASONS = "InvalidImageName|ErrImageNeverPull|CreateContainer(Config)?Error|ImagePullBackOff.*("
FATAL_REASONS += "not found|denied|unauthorized|forbidden)"
MAX_FAILURES = 3  # of one container, after which the page gives up
REQUEST = {"_request_timeout": 30}  # seconds without an answer, or a line of the log: then the page looks again


def query(*command):
    """Return (whether it succeeded, what it printed) of a command that is asked for a fact."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, (done.stdout or done.stderr).strip()


def find_cluster(api="kubeflow.org/v1", kind="PyTorchJob", operator="the training operator"):
    """Return kubectl's context, and why it leads to no cluster that knows a kind: an empty text if it does."""
    named, context = query("kubectl", "config", "current-context")
    found, kinds = query("kubectl", "get", "--raw", f"/apis/{api}")  # open to all; `kubectl get crd` is not
    context = context if named else "the cluster around it"  # a pod's kubectl needs no kubeconfig
    if found and f'"{kind}"' in kinds:
        return context, ""
    if found or "(NotFound)" in kinds:
        return context, f"{context} does not know {kind}s: install {operator}"
    if not shutil.which("kubectl"):
        return context, "install kubectl to launch the job"
    if not named:
        return context, "give kubectl a kubeconfig with a current context"
    return context, f"{context} does not answer ({(kinds or 'no reason given').splitlines()[-1]})"


def prerequisites(namespace, image, strict=False, **kind):
    """Return a Table of what is here; with strict, raise PageError if cluster or registry are missing.

    kind: what the cluster has to know, as of find_cluster. The table's attributes no_cluster and no_registry
    say why there is none, and are empty if there is one.
    """
    (context, cluster_problem), registry_problem = find_cluster(**kind), no_registry(image)
    cluster = ["cluster", "none" if cluster_problem else f"{context}, namespace {namespace}", cluster_problem]
    registry = ["registry", "none" if registry_problem else image.split("/")[0], registry_problem]
    table = what_is_installed(["torch", "torchvision"], cluster, registry)
    table.no_cluster = cluster_problem and f"no cluster: {cluster_problem}"
    table.no_registry = registry_problem and f"no registry: {registry_problem}"
    if strict and (cluster_problem or registry_problem):
        raise PageError("strict is set and there is " + "; ".join(filter(None, [table.no_cluster, table.no_registry])))
    return table


def replicas(manifest: dict) -> int:
    """Return the number of pods that a PyTorchJob's manifest, as a dict, asks for."""
    return sum(spec.get("replicas", 1) for spec in manifest["spec"]["pytorchReplicaSpecs"].values())


def fill_in(manifest, image, epochs, seed, namespace="", workers=0, gpus=0, cpu="", memory="", checkpoint_claim=""):
    """Return a copy of a PyTorchJob's manifest with the values put in; 0 and "" leave what the manifest has.

    gpus, cpu and memory are those of each replica; checkpoint_claim is a PersistentVolumeClaim for the checkpoint, from
    which the job resumes if a pod is lost. Raises PageError for more than one GPU, ValueError for a wrong cpu.
    """
    if gpus not in (0, 1):
        raise PageError(f"gpus is {gpus} but must be 0 or 1: a replica is one process, which uses one; add workers")
    threads = max(1, math.ceil(parse_quantity(cpu or "1")))  # no more than there are CPUs for them
    manifest = json.loads(json.dumps(manifest))  # a copy in which no two replicas share a part, as they do in the file
    if namespace:
        manifest["metadata"]["namespace"] = namespace
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    if workers:
        replicas["Worker"]["replicas"] = workers
    for spec in replicas.values():
        container = spec["template"]["spec"]["containers"][0]
        container["image"] = image
        args = container["args"]
        args[args.index("--epochs") + 1] = str(epochs)
        args[args.index("--seed") + 1] = str(seed)
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        if cpu:
            requests["cpu"], container["env"] = cpu, [{"name": "OMP_NUM_THREADS", "value": str(threads)}]
        if memory:
            requests["memory"] = limits["memory"] = memory
        if gpus:
            requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = gpus  # Kubernetes wants them equal
    if checkpoint_claim:
        pod = replicas["Master"]["template"]["spec"]
        pod["securityContext"]["fsGroup"] = pod["securityContext"]["runAsUser"]  # may write to the volume
        pod["volumes"].append({"name": "checkpoints", "persistentVolumeClaim": {"claimName": checkpoint_claim}})
        container = pod["containers"][0]
        container["volumeMounts"].append({"name": "checkpoints", "mountPath": "/checkpoints"})
        label = {"fieldPath": f"metadata.labels['{LABEL}']"}
        container["env"].append({"name": "JOB_NAME", "valueFrom": {"fieldRef": label}})
        container["args"] += ["--checkpoint", "/checkpoints/$(JOB_NAME).pt"]  # one for each job
    return manifest


def get_conditions(job):
    """Return the conditions of a job, a dict, that are true now, by their types."""
    return {c["type"]: c for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"}


def statuses(pod):
    """Return the statuses of a pod's containers, init containers first."""
    return (pod.status.init_container_statuses or []) + (pod.status.container_statuses or [])


def get_failures(pods):
    """Return (pod, container's status, how it ended) of the containers that failed, the first first."""
    failures = [
        (pod, status, state.terminated)
        for pod in pods
        for status in statuses(pod)
        for state in (status.state, status.last_state)
        if state.terminated and state.terminated.exit_code
    ]
    return sorted(failures, key=lambda failure: str(failure[2].finished_at))


def cannot_succeed(pods):
    """Tell whether a container, of a pod that stays, waits in vain, has wrong arguments, or has failed too often."""
    for status in (status for pod in pods if not pod.metadata.deletion_timestamp for status in statuses(pod)):
        waiting, ended = status.state.waiting, status.state.terminated
        if waiting and re.match(FATAL_REASONS, f"{waiting.reason} {waiting.message}", re.DOTALL | re.IGNORECASE):
            return True
        if status.restart_count + bool(ended and ended.exit_code) >= MAX_FAILURES:
            return True
    return any(end.exit_code == 2 for *_, end in get_failures(pods))  # argparse's status for wrong arguments


class Follower:
    """A job that is followed: what the cluster says of it, and how much of its log was shown."""

    def __init__(self, job, namespace, log_of=""):
        try:
            config.load_kube_config(os.environ.get("KUBECONFIG"))
        except config.ConfigException:
            config.load_incluster_config()  # kubectl, too, needs no kubeconfig in a pod
        self.core, self.jobs = client.CoreV1Api(), client.CustomObjectsApi()
        self.job, self.name, self.namespace = job, job.split("/")[-1], namespace
        self.shown = set()  # lines of the log
        self.log_of = log_of  # the container whose log tells why another failed, if that is not the one that did

    def warnings(self, name):
        """Return the warnings about a job or a pod, the newest last."""
        selector = f"involvedObject.name={name},type=Warning"
        events = self.core.list_namespaced_event(self.namespace, field_selector=selector, **REQUEST).items
        events.sort(key=lambda event: event.last_timestamp or event.metadata.creation_timestamp)
        return list(dict.fromkeys(f"{event.reason}: {event.message}" for event in events))

    def waits_for(self, pod):
        """Return what a pod waits for; an empty text if it runs or has ended."""
        if pod.status.phase in ("Succeeded", "Failed"):
            return ""
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return condition.message or condition.reason
        for waiting in (status.state.waiting for status in statuses(pod) if status.state.waiting):
            # Only an event tells of a volume, or a sandbox around the containers, that cannot be made.
            failed = [text for text in self.warnings(pod.metadata.name) if re.match("Failed(?!Scheduling)", text)]
            return f"{waiting.reason} {waiting.message or ''.join(failed[-1:])}".strip()
        return "" if statuses(pod) else "for a node"

    def show_log(self):
        """Show what the master's container printed since the last look; return whether that was all until its end."""
        read, master = self.core.read_namespaced_pod_log, (f"{self.name}-master-0", self.namespace)
        for previous in True, False:
            options = dict(container=CONTAINER, previous=previous, timestamps=True, **REQUEST)
            try:
                for line in watch.Watch().stream(read, *master, **options):
                    if line not in self.shown:  # lines begin with their time, so that no two are equal
                        self.shown.add(line)
                        print(line.partition(" ")[2], flush=True)
            except urllib3.exceptions.HTTPError:
                return False  # the trainer is silent, or the connection was cut
            except client.ApiException as error:
                if error.status not in (400, 404):  # the pod is coming or going, or was never restarted
                    raise
        return True

    def describe_failure(self, pods):
        """Return what a person needs to know about a job that does not work: the pod, its last lines, its events."""
        lines, name = [], ""
        if failures := get_failures(pods):
            pod, status, end = failures[0]
            name = pod.metadata.name
            container = self.log_of or status.name
            logs = ["kubectl", "logs", name, f"--namespace={self.namespace}", f"--container={container}", "--tail=80"]
            answers = query(*logs), query(*logs, "--previous")  # it may have been started again at any moment
            log = next((log for ok, log in answers if ok and not re.match("unable to|$", log)), "(it is empty)")
            lines.append(f"{name} failed with exit code {end.exit_code} ({end.reason}); the end of its log:")
            log = re.split(r"^[EW]\d{4} .*torch/distributed/", log, maxsplit=1, flags=re.MULTILINE)[0] or log
            lines += [f"    {line}" for line in log.splitlines()[-8:]]  # without the report of torchrun after it
        elif waiting := [(pod.metadata.name, text) for pod in pods if (text := self.waits_for(pod))]:
            name, text = waiting[0]
            lines.append(f"{name} waits: {text}")
        lines += [f"    {text}" for text in self.warnings(name or self.name)[-3:]]
        target = f"pod/{name}" if name else self.job
        return "\n".join([*lines, f"To see more: kubectl describe -n {self.namespace} {target}"])

    def find_reason(self, pods):
        """Return what describe_failure does if something hinders the pods, else an empty text."""
        waiting = [text for pod in pods if (text := self.waits_for(pod)) not in ("", "for a node", "ContainerCreating")]
        return self.describe_failure(pods) if waiting or get_failures(pods) else ""

    def follow(self, patience):
        """Show what the pods wait for and the master's log until the job succeeds; raise PageError if it cannot."""
        begun, started, said = time.monotonic(), False, ""
        names, selector = ("kubeflow.org", "v1", self.namespace, "pytorchjobs", self.name), f"{LABEL}={self.name}"
        while True:
            pods = self.core.list_namespaced_pod(self.namespace, label_selector=selector, **REQUEST).items
            job = self.jobs.get_namespaced_custom_object(*names, **REQUEST)
            conditions = get_conditions(job)
            waiting = [f"({pod.metadata.name} waits: {text})" for pod in pods if (text := self.waits_for(pod))]
            started = started or len(pods) >= replicas(job) and not waiting
            succeeded = "Succeeded" in conditions
            log_is_complete = (succeeded or not waiting) and self.show_log()
            if succeeded and log_is_complete:
                return
            if "Failed" in conditions:
                raise PageError(f"the job failed: {conditions['Failed']['message']}\n{self.describe_failure(pods)}")
            if cannot_succeed(pods):
                raise PageError(f"the job cannot succeed\n{self.describe_failure(pods)}")
            if not started and time.monotonic() - begun > patience:
                raise PageError(f"the job did not start within {patience} s\n{self.describe_failure(pods)}")
            if not pods:  # refused by a quota or a policy?
                waiting = [f"({text})" for text in self.warnings(self.name)[-1:]]
            if waiting and waiting != said:
                print(*waiting, sep="\n", flush=True)
                said = waiting
            time.sleep(1)


def explain(error):
    """Return what the API server said, in the client's exception."""
    try:
        return json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def follow(job: str, namespace: str, patience: float = 300, keep: bool = False) -> None:
    """Show what a PyTorchJob's pods wait for, then its master's log as it comes, until the job has succeeded.

    Raises PageError if the job fails or cannot succeed, or if its pods do not start within `patience` seconds: then it
    is deleted, unless `keep`. Raises it, too, if the API server refuses or does not answer; then the job goes on.
    """
    delete = f"kubectl delete -n {namespace} {job}"
    try:
        Follower(job, namespace).follow(patience)
    except PageError as error:  # the job failed, or will never succeed
        if keep:
            raise
        deleted, said = query(*delete.split())
        fate = "The job was deleted. With keep_job = True it stays, to be looked at."
        raise PageError(f"{error}\n{fate if deleted else f'The job could not be deleted ({said}): {delete}'}") from None
    except (client.ApiException, urllib3.exceptions.HTTPError) as error:
        problem = explain(error) if isinstance(error, client.ApiException) else f"no API server answers: {error}"
        raise PageError(f"{problem}. The job goes on; run this cell again to follow it.") from None
    except KeyboardInterrupt:
        print(f"The job goes on. To end it: {delete}")
        raise
