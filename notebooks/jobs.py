"""PyTorchJobs on a cluster, by kubectl: what they wait for, their log as it comes, why they failed."""
import contextlib
import json
import os
import re
import subprocess
import tempfile
import time

from helpers import PageError, replicas

LABEL = "training.kubeflow.org/job-name"
PATIENCE = 30  # seconds that the API server may be away before the page gives up
CONTAINER = "pytorch"  # the name that the operator looks for, too
# What a container waits for in vain. (An image may come yet, unless there is none or it is not for us.)
HOPELESS = (r"InvalidImageName|ErrImageNeverPull|CreateContainer(Config)?Error|"
            r"ImagePullBackOff.*(not found|denied|[Uu]nauthorized|[Ff]orbidden)")
FAILURES = 3  # of one container, after which the page gives up
USAGE = 2  # the trainer's exit code for wrong arguments


class NoAnswer(PageError):
    """The API server did not answer, so that nothing is known."""


def kubectl(*arguments, namespace, timeout=10):
    """Return what kubectl prints; raise PageError with its words if the API server refuses, NoAnswer if it is away."""
    command = ["kubectl", f"--namespace={namespace}", f"--request-timeout={timeout}s", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=2 * timeout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"kubectl {arguments[0]} did not end within {2 * timeout} s") from None
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        refused = re.search(r"^Error from server \((?!Timeout|ServiceUnavailable|InternalError|TooManyRequests)|"
                            r"Unauthorized|You must be logged in", said, re.MULTILINE)
        raise (PageError if refused else NoAnswer)(said)
    return done.stdout


def look(job, namespace):
    """Return the job and its pods, by name, as Kubernetes describes them."""
    found = json.loads(kubectl("get", job, "--output=json", namespace=namespace))
    name = found["metadata"]["name"]
    pods = json.loads(kubectl("get", "pods", f"--selector={LABEL}={name}", "--output=json", namespace=namespace))
    return found, {pod["metadata"]["name"]: pod for pod in pods["items"]}


def statuses(pod):
    """Return the statuses of a pod's containers, init containers first."""
    status = pod["status"]
    return status.get("initContainerStatuses", []) + status.get("containerStatuses", [])


def waits_for(pod):
    """Return (reason, text) of what a pod waits for; two empty texts if it runs or has ended."""
    if pod["status"].get("phase") in ("Succeeded", "Failed"):
        return "", ""
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", ""), condition.get("message", "")
    for status in statuses(pod):
        if waiting := status["state"].get("waiting"):
            reason = waiting.get("reason", "")
            if reason == "PodInitializing" and "running" in pod["status"]["initContainerStatuses"][0]["state"]:
                return reason, "for the name of the master to be known"
            return reason, f"{reason} {waiting.get('message', '')}".strip()
    return "", "" if statuses(pod) else "for a node"


def warnings(name, namespace):
    """Return the texts of the warnings about a job or a pod, the newest last."""
    try:
        events = json.loads(kubectl("get", "events", f"--field-selector=involvedObject.name={name},type=Warning",
                                    "--sort-by=.lastTimestamp", "--output=json", namespace=namespace))["items"]
    except PageError as error:  # what else is known must not be lost for that
        return [f"(no events: {error})"]
    return list(dict.fromkeys(f"{event.get('reason')}: {event.get('message')}" for event in events))


def first_failure(pods):
    """Return (pod's name, container's status, how it ended) of the container that failed first, or None."""
    ends = [(state["terminated"].get("finishedAt") or "", name, status, state["terminated"])
            for name, pod in pods.items() for status in statuses(pod)
            for state in (status["state"], status.get("lastState", {}))
            if state.get("terminated", {}).get("exitCode")]
    return min(ends, key=lambda end: end[:2])[1:] if ends else None


def hopeless(pods):
    """Tell whether a container waits in vain, was called with wrong arguments, or has failed too often."""
    for pod in pods.values():
        for status in statuses(pod):
            ended = status["state"].get("terminated", {}).get("exitCode", 0)
            waiting = status["state"].get("waiting", {})
            if (re.match(HOPELESS, f"{waiting.get('reason')} {waiting.get('message')}", re.DOTALL)
                    or status["restartCount"] + (ended != 0) >= FAILURES):
                return True
    failure = first_failure(pods)
    return failure is not None and failure[2]["exitCode"] == USAGE


def last_lines(pod, status, namespace):
    """Return the end of the log of a container that failed, which may have been started again at any moment."""
    which = [[], ["--previous"]] if "terminated" in status["state"] else [["--previous"], []]
    for previous in which:
        try:
            log = kubectl("logs", pod, f"--container={status['name']}", "--tail=8", *previous, namespace=namespace)
        except PageError as error:
            log, problem = "", error
        else:
            problem = "it is empty"
        if log:
            return log
    return f"(no log: {problem})"


def report(job, pods, namespace):
    """Return what a person needs to know about a job that does not work: the pod, its last lines, its events."""
    lines, failure = [], first_failure(pods)
    if failure:
        name, status, end = failure
        lines.append(f"{name} failed with exit code {end['exitCode']} ({end.get('reason', 'no reason given')}); "
                     "the end of its log:")
        lines += [f"    {line}" for line in last_lines(name, status, namespace).splitlines()]
    else:
        name = next((name for name, pod in pods.items() if waits_for(pod)[0]), None)
        if name:
            lines.append(f"{name} waits: {waits_for(pods[name])[1]}")
    lines += [f"    {text}" for text in warnings(name or job.split("/")[-1], namespace)[-3:]]
    return "\n".join([*lines, f"To see more: kubectl describe -n {namespace} {f'pod/{name}' if name else job}"])


class JobError(PageError):
    """The job failed, or will never succeed."""


class Log:
    """The log of a pod's trainer, shown as it comes."""

    def __init__(self, pod, namespace, skip=0):
        """skip: the number of lines that were shown already"""
        self.lines, self.skip, self.rest, self.errors = 0, skip, b"", tempfile.TemporaryFile()
        command = ["kubectl", "logs", f"--namespace={namespace}", f"--container={CONTAINER}", "--follow", pod]
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=self.errors)
        os.set_blocking(self.process.stdout.fileno(), False)

    def show(self, seconds):
        """Print what comes within some seconds; return whether that was the end."""
        end = time.monotonic() + seconds
        while (part := self.process.stdout.read()) != b"":  # None: nothing yet
            *lines, self.rest = (self.rest + (part or b"")).split(b"\n")
            self.print(lines)
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        self.print([self.rest] if self.rest else [])
        return True

    def print(self, lines):
        for line in lines:
            self.lines += 1
            if self.lines > self.skip:
                print(line.decode(errors="replace"), flush=True)

    def close(self):
        """End it; return why it could not be read, or an empty text."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # it may be about to end
        self.process.kill()
        self.process.stdout.close()
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip()
        self.errors.close()
        return said if code > 0 else ""


def follow(job, namespace, patience=300, keep=False):
    """Show what a PyTorchJob's pods wait for, then its master's log as it comes, until the job has succeeded.

    job: its kind and name, as get_resource returns them. Raises PageError if the job fails or cannot succeed, if its
    pods do not start within `patience` seconds (then the job is deleted, unless `keep`), and if the API server stays
    away for PATIENCE seconds or the log cannot be read (then the job goes on).
    """
    try:
        with contextlib.closing(Follower(job, namespace, patience)) as follower:
            while not follower.step():
                pass
    except JobError as error:
        if keep:
            raise
        try:
            kubectl("delete", job, namespace=namespace)
            fate = "The job was deleted. With keep_job = True it stays, to be looked at."
        except PageError as problem:
            fate = f"The job could not be deleted ({problem}): kubectl delete -n {namespace} {job}"
        raise PageError(f"{error}\n{fate}") from None
    except KeyboardInterrupt:
        print(f"The job goes on. To end it: kubectl delete -n {namespace} {job}")
        raise


class Follower:
    """What is known of a job that is followed, and what was shown of it."""

    def __init__(self, job, namespace, patience):
        self.job, self.namespace, self.patience = job, namespace, patience
        self.begun = self.answered = time.monotonic()
        self.said = self.log = self.container = None
        self.started, self.unread = False, ""  # whether all pods did; why the log cannot be read
        self.shown = 0  # lines of the container's log

    def step(self):
        """Look at the job and show what is new; return whether it has succeeded."""
        try:
            job, pods = look(self.job, self.namespace)
        except NoAnswer as error:
            self.away(error)
            return False
        self.answered = time.monotonic()
        ended = {condition["type"]: condition.get("message", "")
                 for condition in job.get("status", {}).get("conditions", [])
                 if condition["status"] == "True" and condition["type"] in ("Succeeded", "Failed")}
        self.show_log(pods, ended)
        if "Succeeded" in ended:
            if self.unread:
                raise PageError(f"the job has succeeded, but its log cannot be read: {self.unread}")
            return True
        if "Failed" in ended or hopeless(pods):
            why = f"the job failed: {ended['Failed']}" if ended else "the job cannot succeed"
            raise JobError(f"{why}\n{self.report(pods)}")
        waiting = [f"({name} waits: {text})" for name, pod in pods.items() if (text := waits_for(pod)[1])]
        if not pods:  # refused by a quota or a policy?
            waiting = [f"({text})" for text in warnings(job["metadata"]["name"], self.namespace)[-1:]]
        self.say("\n".join(waiting))
        phases = [pod["status"].get("phase") for pod in pods.values()]
        self.started = self.started or len(phases) >= replicas(job) and "Pending" not in phases
        if not self.started and time.monotonic() - self.begun > self.patience:
            raise JobError(f"the job did not start within {self.patience} s\n{self.report(pods)}")
        if not self.log:
            time.sleep(1)
        return False

    def show_log(self, pods, ended):
        """Show what the master's container printed since the last look; after a restart it is another container."""
        master = next((name for name in pods if name.endswith("-master-0")), None)
        found = statuses(pods[master]) if master else []
        status = next((status for status in found if status["name"] == CONTAINER), {})
        container = status.get("containerID")
        # The stream may have been cut: then it is taken up again.
        if container and not self.log and (container != self.container or "running" in status["state"] or ended):
            self.shown = self.shown if container == self.container else 0
            self.container, self.log = container, Log(master, self.namespace, self.shown)
        if self.log and self.log.show(30 if ended else 2):
            self.shown = max(self.shown, self.log.lines)
            self.close()
            self.say(f"(the log cannot be read: {self.unread})" if self.unread else "")

    def away(self, error):
        """Wait for an API server that does not answer, but not for ever."""
        seconds, reason = time.monotonic() - self.answered, str(error).splitlines()[-1]
        self.say(f"(the API server does not answer: {reason})")
        if seconds > PATIENCE:
            raise PageError(f"the API server has not answered for {seconds:.0f} s ({reason}). The job goes on without "
                            f"this page; when the server is back: kubectl get -n {self.namespace} {self.job}") from None
        time.sleep(1)

    def say(self, text):
        if text and text != self.said:
            print(text, flush=True)
        self.said = text or self.said

    def report(self, pods):
        return report(self.job, pods, self.namespace)

    def close(self):
        if self.log:
            self.unread = self.log.close()
        self.log = None
