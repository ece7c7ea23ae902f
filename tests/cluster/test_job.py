"""Jobs on a real cluster, which ci/test --cluster brings up, followed as the page does."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from support import page, pytorchjob
from support.digits import get_digits

from tests.support.cluster import PROJECT, REGISTRY, build, build_by_dockerfile, create, follow, kubectl
from tests.support.cluster import namespace as namespace
from tests.support.data import make_data
from tests.support.pages import cell, read

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def small_image(tmp_path_factory):
    """An image of the trainer with little data, for jobs of which only the end matters."""
    return build("mnist:small", make_data(tmp_path_factory.mktemp("data")))


def manifest(image, *flags, epochs=1, **values):
    """The page's manifest with values put in, and with more flags for the trainer."""
    text = (PROJECT / "pytorchjob-mnist.yaml").read_text()
    job = pytorchjob.fill_in(yaml.safe_load(text), image, epochs, 1, **values)
    for pod in pods(job):
        pod["containers"][0]["args"] += flags
        pod["containers"][0]["resources"]["requests"]["cpu"] = "100m"  # several jobs fit on the node
    return job


def pods(job):
    """Return the specifications of the pods of a manifest."""
    return [spec["template"]["spec"] for spec in job["spec"]["pytorchReplicaSpecs"].values()]


def failure(job, namespace, **how):
    """Return the message with which the page stops; the job has to be gone then, and its pods told to go."""
    name = create(job)
    with pytest.raises(page.PageError) as error:
        follow(name, namespace, **how)
    assert "The job was deleted" in str(error.value)
    assert not kubectl("get", "pytorchjobs", "-n", namespace, "-o", "name")
    deadline = time.monotonic() + 10
    listing = "get", "pods", "-n", namespace, "-o", "json"
    while not all("deletionTimestamp" in pod["metadata"] for pod in json.loads(kubectl(*listing))["items"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return str(error.value)


def test_a_job_to_its_end(small_image, namespace):
    """In a namespace of the strictest Pod Security; when its time is over, it is gone."""
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    job = manifest(small_image, epochs=2, namespace=namespace)
    job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] //= 86400 // 10  # 10 s
    name = create(job)
    shown = follow(name, namespace)
    lines = [line for line in shown.splitlines() if not line.startswith("(")]
    assert kubectl("logs", f"{name.split('/')[1]}-master-0", "-n", namespace).splitlines() == lines
    assert "with 3 x cpu" in lines[0] and page.read_log(shown).epochs == [1, 2]
    deadline = time.monotonic() + 60
    while kubectl("get", "pytorchjobs,pods", "-n", namespace, "-o", "name"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_pods_that_are_refused(small_image, namespace):
    """The job is accepted, but there are no pods: here for want of a setting of the manifest."""
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    job = manifest(small_image, namespace=namespace)
    for pod in pods(job):
        del pod["containers"][0]["securityContext"]["capabilities"]
    message = failure(job, namespace, patience=5)
    assert message.startswith("the job did not start within 5 s\n") and 'violates PodSecurity "restricted' in message


def test_image_that_does_not_exist(namespace):
    message = failure(manifest(f"{REGISTRY}/tutorial/nothing:1", namespace=namespace), namespace)
    assert message.startswith("the job cannot succeed\n")
    assert f"{REGISTRY}/tutorial/nothing:1: not found" in message
    assert re.search("-0 waits: (ErrImagePull|ImagePullBackOff)", message)


def test_gpus_where_there_are_none(small_image, namespace):
    """For the worker alone: the master runs, and waits for it."""
    job = manifest(small_image, gpus=1, namespace=namespace)
    pods(job)[0]["containers"][0]["resources"] = {}
    message = failure(job, namespace, patience=5)
    assert message.startswith("the job did not start within 5 s\n") and "Insufficient nvidia.com/gpu" in message


def test_sandbox_that_cannot_be_made(small_image, namespace):
    """Nothing but an event tells of that: here for want of a container runtime, as elsewhere for want of an image."""
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": namespace}}
    kubectl("create", "-f", "-", given=json.dumps(runtime | {"handler": "nothing"}))
    job = manifest(small_image, namespace=namespace)
    for pod in pods(job):
        pod["runtimeClassName"] = namespace
    message = failure(job, namespace, patience=8)
    kubectl("delete", "runtimeclass", namespace)
    assert "-master-0 waits: ContainerCreating FailedCreatePodSandBox: " in message


def test_trainer_that_fails(small_image, namespace):
    """With keep, the job stays to be looked at."""
    name = create(manifest(small_image, "--batch-size", "0", namespace=namespace))
    with pytest.raises(page.PageError, match=f"To see more: kubectl describe -n {namespace} pod/") as error:
        follow(name, namespace, keep=True)
    message = str(error.value)
    assert "failed with exit code 2 (Error); the end of its log:" in message and "deleted" not in message
    assert "    mnist.py: error: counts are at least 1 " in message
    subprocess.run(message.rpartition("To see more: ")[2].split(), check=True, stdout=subprocess.DEVNULL)


def test_no_permission(small_image, namespace, tmp_path, monkeypatch):
    """The page says so, and blames neither the trainer nor the cluster."""
    kubectl("create", "serviceaccount", "reader", "-n", namespace)
    job = create(manifest(small_image, namespace=namespace))
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"][0]["user"] = {"token": kubectl("create", "token", "reader", "-n", namespace).strip()}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    refused = f'forbidden: User "system:serviceaccount:{namespace}:reader" cannot'
    with pytest.raises(page.PageError, match=f"{refused} list resource .*The job goes on"):
        follow(job, namespace)
    # The list of kinds is open to all.
    assert pytorchjob.prerequisites(namespace, small_image, strict=True).no_cluster == ""


def test_pod_that_is_lost(namespace, tmp_path):
    """A worker's pod is deleted; the job resumes from its checkpoint, and the page follows it to the end."""
    image = build("mnist:lost", make_data(tmp_path / "data", train=6007, test=1009))
    volume = Path(os.environ["KUBECONFIG"]).parent / "volume"
    volume.mkdir(exist_ok=True)
    volume.chmod(0o777)
    size, modes = {"storage": "1Gi"}, ["ReadWriteOnce"]
    reserved = {"claimRef": {"namespace": namespace, "name": "claim"}, "storageClassName": ""}
    spec = {"capacity": size, "accessModes": modes, "hostPath": {"path": str(volume)}, **reserved}
    name = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace}}
    kubectl("apply", "-f", "-", given=json.dumps(name | {"spec": spec}))
    spec = {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": namespace}
    name = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "claim"}}
    kubectl("apply", "-n", namespace, "-f", "-", given=json.dumps(name | {"spec": spec}))
    job = create(manifest(image, "--batch-size", "64", epochs=12, namespace=namespace, checkpoint_claim="claim"))
    name = job.split("/")[1]

    class Disturbance(io.StringIO):
        deleted = False

        def write(self, line):
            if line.startswith("Epoch: 2 ") and not self.deleted:
                self.deleted = True
                kubectl("delete", "pod", f"{name}-worker-1", "-n", namespace, "--wait=false")
            return super().write(line)

    log = follow(job, namespace, output=Disturbance())
    checkpoint = f"/checkpoints/{name}.pt"
    assert re.search(rf"Interrupted by SIGTERM after \d+ epochs and \d+ steps; checkpoint: {checkpoint}", log), log
    assert re.search(rf"Resuming from {checkpoint}: [1-9]\d* epochs and \d+ steps are done", log), log
    assert page.read_log(log).epochs == list(range(1, 13))


def test_log_of_a_container_that_is_restarted(small_image, namespace, capsys):
    """No line is left out or shown twice."""
    code = "[ -e /state/begun ] && echo second && exit; touch /state/begun; echo first; sleep 5; exit 1"
    container = {"name": "pytorch", "image": small_image, "command": ["sh", "-c", code]}
    container["volumeMounts"] = [{"name": "state", "mountPath": "/state"}]
    spec = {"restartPolicy": "OnFailure", "containers": [container], "volumes": [{"name": "state", "emptyDir": {}}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "job-master-0"}, "spec": spec}
    kubectl("create", "-n", namespace, "-f", "-", given=json.dumps(pod))
    kubectl("wait", "-n", namespace, "pod/job-master-0", "--for=condition=Ready", "--timeout=60s")
    follower = pytorchjob.Follower("pytorchjob/job", namespace)
    follower.show_log()
    kubectl("wait", "-n", namespace, "pod/job-master-0", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    follower.show_log()
    assert capsys.readouterr().out == "first\nsecond\n"


def test_login_for_a_private_registry(namespace):
    """The commands of the page, with values put in."""
    prose = cell("image-after", read("mnist")).source
    commands = re.search(r"(?m)^    kubectl create secret.*\n(    .*\n)*", prose)[0]
    values = {"NAMESPACE": namespace, "REGISTRY": "registry.example", "USER": "me", "$(cat password.txt)": "s3cret"}
    for word, value in values.items():
        assert word in commands
        commands = commands.replace(word, value)
    subprocess.run(["bash", "-euc", commands], check=True, capture_output=True)
    secret = json.loads(kubectl("get", "secret", "registry-login", "-n", namespace, "-o", "json"))
    login = json.loads(base64.b64decode(secret["data"][".dockerconfigjson"]))
    assert login["auths"]["registry.example"]["password"] == "s3cret"
    account = json.loads(kubectl("get", "serviceaccount", "default", "-n", namespace, "-o", "json"))
    assert account["imagePullSecrets"] == [{"name": "registry-login"}]


def test_dockerfile_builds_the_same_image(tmp_path, namespace):
    """By buildah: the same files, user and command, and the same lines in the log."""
    digits, context = get_digits(), tmp_path / "context"
    (context / "data").mkdir(parents=True)
    for path in PROJECT / "Dockerfile", PROJECT / ".dockerignore", PROJECT / "mnist.py":
        shutil.copy(path, context)
    for path in digits.files:
        shutil.copy(path, context / "data")
    for name in "data/notes.txt", "secret.txt":
        (context / name).write_text("not asked for")
    names = f"{REGISTRY}/tutorial/mnist:fairing", f"{REGISTRY}/tutorial/mnist:dockerfile"
    build("mnist:fairing", digits.folder)
    build_by_dockerfile(context, names[1], "--build-arg", "DATA=data")
    ours, theirs = (describe_image(image, namespace) for image in names)
    assert ours == theirs
    assert (ours["command"], ours["user"], len(ours["files"])) == (["python", "/app/mnist.py"], "1000", 5)


def describe_image(image, namespace):
    """Return what an image is made of and what its trainer prints, as seen from a pod that runs it."""
    pod = pods(manifest(image))[0] | {"restartPolicy": "Never"}
    pod["containers"][0] |= {"command": ["sleep", "600"], "args": []}
    name = image.rpartition(":")[2]
    kind = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}
    kubectl("create", "-n", namespace, "-f", "-", given=json.dumps(kind))
    kubectl("wait", "-n", namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=110s")
    skopeo = ["skopeo", "inspect", "--tls-verify=false", f"docker://{image}"]
    config = json.loads(subprocess.run([*skopeo, "--config"], check=True, capture_output=True).stdout)["config"]
    inside = "exec", "-n", namespace, name, "--"
    return {
        "command": config["Cmd"],
        "user": config["User"],
        "files": sorted(kubectl(*inside, "find", "/app", "-type", "f", "-exec", "sha256sum", "{}", "+").splitlines()),
        "modes": sorted(kubectl(*inside, "find", "/app", "-printf", "%p %m %u %g\n").splitlines()),  # of folders, too
        "log": re.sub("Trained in.*", "", kubectl(*inside, *config["Cmd"], "--epochs", "1", "--dry-run")),
        "base": json.loads(subprocess.run(skopeo, check=True, capture_output=True).stdout)["Layers"][:2],
    }
