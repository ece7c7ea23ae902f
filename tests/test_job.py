"""The image and the job on a real cluster, which ci/test --cluster brings up; TUTORIAL_CLUSTER names its registry."""
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib
import nbformat
import pytest
import yaml
from conftest import copy_project
from test_image import build as build_image
from test_page import cell, papermill, text
from trainer import make_data

matplotlib.use("agg")
PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import helpers  # noqa: E402
import jobs  # noqa: E402
from digits import get_digits  # noqa: E402

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
REGISTRY = os.environ.get("TUTORIAL_CLUSTER", "")
MNIST_DIR = os.environ.get("MNIST_DIR")
KEPT = PROJECT / "build" / "cluster"  # what CI keeps


def kubectl(*arguments, given=None):
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def namespace(request):
    """A namespace of its own, which is gone afterwards."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:45] + f"-{time.time_ns() % 10**9}"
    kubectl("create", "namespace", name)
    deadline = time.monotonic() + 20
    while subprocess.run(["kubectl", "get", "serviceaccount", "default", "-n", name], capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


def build(name, folder):
    """Build and push the image of the trainer with the four files of a folder; return its reference."""
    files = {PROJECT / "mnist.py": "/app/mnist.py"}
    files |= {path: f"/app/data/{path.name}" for path in folder.glob("*-ubyte.gz")}
    return build_image(f"{REGISTRY}/tutorial/{name}", f"{REGISTRY}/tutorial/mnist:base", files).reference


@pytest.fixture(scope="module")
def small_image(tmp_path_factory):
    """An image of the trainer with little data, for jobs of which only the end matters."""
    return build("mnist:small", make_data(tmp_path_factory.mktemp("data")))


def manifest(image, *flags, epochs=1, **values):
    """The page's manifest with values put in, and with more flags for the trainer."""
    job = helpers.fill_in(yaml.safe_load((PROJECT / "pytorchjob-mnist.yaml").read_text()), image, epochs, 1, **values)
    for spec in job["spec"]["pytorchReplicaSpecs"].values():
        container = spec["template"]["spec"]["containers"][0]
        container["args"] = container["args"] + list(flags)
        container["resources"]["requests"] |= {"cpu": "100m"}  # several jobs fit on the node
    return job


def create(job):
    """Create a job as the page does; return its name."""
    done = subprocess.run(["kubectl", "create", "-f", "-"], input=yaml.safe_dump(job), capture_output=True, text=True)
    return helpers.get_resource(done.stdout + done.stderr)


def follow(job, namespace, **how):
    """Follow a job as the page does; return what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            with at_most(300):
                jobs.follow(job, namespace, **how)
        except TimeoutError as error:
            seen = "".join(f"$ kubectl {words}\n" + subprocess.run(["kubectl", "-n", namespace, *words.split()],
                                                                   capture_output=True, text=True).stdout
                           for words in ("get pods,pytorchjobs,events -o wide", "describe pods",
                                         f"logs -l {jobs.LABEL} --prefix --tail=5"))
            error.add_note(f"It had printed:\n{printed.getvalue()[-2000:]}\n{seen}")
            raise
    return printed.getvalue()


@contextlib.contextmanager
def at_most(seconds):
    """What goes wrong must not hold up the tests for ever."""
    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def failure(job, namespace, **how):
    """Return the message with which the page stops; the job has to be gone then, and its pods told to go."""
    name = create(job)
    with pytest.raises(helpers.PageError) as error:
        follow(name, namespace, **how)
    assert not kubectl("get", "pytorchjobs", "-n", namespace, "-o", "name")
    deadline = time.monotonic() + 10
    while any("deletionTimestamp" not in pod["metadata"] for pod in
              json.loads(kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return str(error.value)


# The page


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The page, run on the cluster in a copy of the project with its job kept; (page, copy of the project)."""
    project = copy_project(tmp_path_factory.mktemp("page") / "project")
    begun = time.monotonic()
    done, page = papermill(project, "-p", "epochs", "1", "-p", "strict", "True", "-p", "keep_job", "True",
                           "-p", "image", f"{REGISTRY}/tutorial/mnist:1", KUBECONFIG=os.environ["KUBECONFIG"])
    seconds = time.monotonic() - begun
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    nbformat.write(page, KEPT / "mnist.ipynb")
    for name in kubectl("get", "pods", "-o", "name").split():
        (KEPT / f"{name.split('/')[1]}.log").write_text(kubectl("logs", name, "--all-containers", "--prefix"))
    (KEPT / "seconds.txt").write_text(f"{seconds:.0f} s for the page with 1 epoch\n")
    assert done.returncode == 0, done.stderr
    yield page, project
    kubectl("delete", "pytorchjobs", "--all", "--cascade=foreground")


def test_page(executed):
    page, _ = executed
    rows = {line[:25].strip(): line for line in text(cell("what-ran", page)).splitlines()}
    assert " skipped " not in str(rows) and {"build the image", "launch the job"} <= rows.keys()
    reference = text(cell("image-step", page)).strip()
    assert re.fullmatch(rf"{REGISTRY}/tutorial/mnist@sha256:[0-9a-f]{{64}}", reference)
    job = text(cell("name", page)).strip().split("/")[1]
    pods = json.loads(kubectl("get", "pods", "-l", f"{jobs.LABEL}={job}", "-o", "json"))["items"]
    assert sorted(pod["metadata"]["name"] for pod in pods) == [f"{job}-master-0", f"{job}-worker-0", f"{job}-worker-1"]
    for pod in pods:
        assert pod["status"]["phase"] == "Succeeded"
        assert pod["status"]["containerStatuses"][0]["imageID"].endswith(reference.split("@")[1])
    log = kubectl("logs", f"{job}-master-0")
    assert "Training on 60000 images with 3 x cpu" in log
    assert set(log.splitlines()) <= set(text(cell("follow", page)).splitlines())
    names = ["notebook", "3 processes here", "3 pods on the cluster"]
    accuracies = [float(re.search(rf"^{name} +([\d.]+)%", text(cell("launched", page)), re.MULTILINE)[1])
                  for name in names]
    assert min(accuracies) > (98.5 if MNIST_DIR else 90) and max(accuracies) - min(accuracies) <= 0.3
    assert "Succeeded" in text(cell("describe", page)) and text(cell("pods", page)).count("Completed") == 3


def test_commands_for_a_terminal(executed):
    """They are pasted as the page has them."""
    _, project = executed
    commands = textwrap.dedent(re.search(r"(?m)(^    .*\n)+", cell("terminal").source)[0])
    assert "kubectl create" in commands and "kubectl delete" in commands
    done = subprocess.run(["bash", "-euc", commands], cwd=project, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "-master-0" in done.stdout and "accuracy=0." in done.stdout and "condition met" in done.stdout
    assert done.stdout.strip().endswith("deleted")


def test_login_for_a_private_registry(namespace):
    """The commands of the page, with values put in."""
    commands = re.search(r"(?m)^    kubectl create secret.*\n(    .*\n)*", cell("image-text").source)[0]
    for word, value in (("NAMESPACE", namespace), ("REGISTRY", "registry.example"), ("USER", "me"),
                        ("$(cat password.txt)", "s3cret")):
        assert word in commands
        commands = commands.replace(word, value)
    subprocess.run(["bash", "-euc", commands], check=True, capture_output=True)
    secret = json.loads(kubectl("get", "secret", "registry-login", "-n", namespace, "-o", "json"))
    login = json.loads(base64.b64decode(secret["data"][".dockerconfigjson"]))
    assert login["auths"]["registry.example"]["password"] == "s3cret"
    account = json.loads(kubectl("get", "serviceaccount", "default", "-n", namespace, "-o", "json"))
    assert account["imagePullSecrets"] == [{"name": "registry-login"}]


def build_by_dockerfile(context, image, *options, **variables):
    """Build an image by buildah on the base image of the first page, and push it."""
    storage = Path(os.environ["KUBECONFIG"]).parent / "buildah"  # goes with the cluster
    buildah = ["buildah", "--root", storage / "root", "--runroot", storage / "run", "--storage-driver", "overlay"]
    done = subprocess.run([*buildah, "build", "--isolation", "chroot", "--tls-verify=false", "--format", "docker",
                           "--build-arg", f"BASE={REGISTRY}/tutorial/mnist:base", *options, "-t", image, context],
                          capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Not compressed: so the layers of the base keep their digests, and are in the registry already.
    subprocess.run([*buildah, "push", "--tls-verify=false", "--disable-compression", image], check=True)


def test_dockerfile_builds_the_same_image(tmp_path, namespace):
    """By buildah: the same files, user and command, and the same lines in the log."""
    digits = get_digits()
    context = tmp_path / "context"
    (context / "data").mkdir(parents=True)
    for name in "Dockerfile", ".dockerignore", "mnist.py":
        shutil.copy(PROJECT / name, context)
    for path in digits.files:
        shutil.copy(path, context / "data")
    (context / "data" / "notes.txt").write_text("not asked for")
    (context / "secret.txt").write_text("not asked for")
    ours, theirs = f"{REGISTRY}/tutorial/mnist:page", f"{REGISTRY}/tutorial/mnist:dockerfile"
    build("mnist:page", digits.folder)
    build_by_dockerfile(context, theirs, "--build-arg", "DATA=data")
    images = []
    for image in ours, theirs:
        skopeo = ["skopeo", "inspect", "--tls-verify=false", f"docker://{image}"]
        config = json.loads(subprocess.run([*skopeo, "--config"], check=True, capture_output=True).stdout)["config"]
        layers = json.loads(subprocess.run(skopeo, check=True, capture_output=True).stdout)["Layers"]
        name = create_pod(image, namespace)
        inside = "exec", "-n", namespace, name, "--"
        files = kubectl(*inside, "find", "/app", "-type", "f", "-exec", "sha256sum", "{}", "+").splitlines()
        modes = kubectl(*inside, "find", "/app", "-printf", "%p %m %u %g\n").splitlines()  # of folders, too
        log = re.sub("Trained in.*", "", kubectl(*inside, *config["Cmd"], "--epochs", "1", "--dry-run"))
        images.append([config["Cmd"], config["User"], sorted(files), sorted(modes), log, layers[:2]])
    assert images[0] == images[1]
    assert images[0][:2] == [["python", "/app/mnist.py"], "1000"] and len(images[0][2]) == 5


def create_pod(image, namespace):
    """Start a pod that waits, under the manifest's security settings; return its name once it runs."""
    pod = manifest(image)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    pod["containers"][0] |= {"command": ["sleep", "600"], "args": []}
    name = image.rpartition(":")[2]
    kubectl("create", "-n", namespace, "-f", "-", given=json.dumps(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod | {"restartPolicy": "Never"}}))
    kubectl("wait", "-n", namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=110s")
    return name


# What goes wrong


def test_image_that_does_not_exist(namespace):
    message = failure(manifest(f"{REGISTRY}/tutorial/nothing:1", namespace=namespace), namespace)
    assert message.startswith("the job cannot succeed\n")
    assert f"{REGISTRY}/tutorial/nothing:1: not found" in message
    assert "-master-0 waits: ImagePullBackOff" in message and "The job was deleted" in message


def test_namespace_that_does_not_exist(small_image):
    with pytest.raises(helpers.PageError, match='kubectl created nothing.*namespaces "nowhere" not found'):
        create(manifest(small_image, namespace="nowhere"))


def test_no_permission(small_image, namespace, tmp_path, monkeypatch):
    kubectl("create", "serviceaccount", "reader", "-n", namespace)
    job = create(manifest(small_image, namespace=namespace))
    log_in(tmp_path / "kubeconfig", "reader", namespace, monkeypatch)
    refused = f'User "system:serviceaccount:{namespace}:reader" cannot'
    with pytest.raises(helpers.PageError, match=f"created nothing.*forbidden: {refused} create"):
        create(manifest(small_image, namespace=namespace))
    with pytest.raises(helpers.PageError, match=f"forbidden: {refused} get"):
        follow(job, namespace)
    assert helpers.prerequisites(namespace, small_image, strict=True).no_cluster == ""  # the list of kinds is for all


def log_in(path, account, namespace, monkeypatch):
    """Act as a service account from now on."""
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"][0]["user"] = {"token": kubectl("create", "token", account, "-n", namespace).strip()}
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))


def test_trainer_with_wrong_arguments(small_image, namespace):
    message = failure(manifest(small_image, "--batch-size", "0", namespace=namespace), namespace)
    assert "failed with exit code 2 (Error); the end of its log:" in message
    assert "    mnist.py: error: batch_size must be at least 1, not 0" in message


def test_trainer_that_fails_and_fails(small_image, namespace):
    message = failure(manifest(small_image, "--data", "/nowhere", namespace=namespace), namespace)
    assert "the job cannot succeed" in message and "failed with exit code 1" in message
    assert "    mnist.py: train-images-idx3-ubyte[.gz] is not in /nowhere" in message


def test_job_that_has_failed(small_image, namespace):
    """Its pods were given up: here after their time was over."""
    job = manifest(small_image, epochs=10_000, namespace=namespace)
    for spec in job["spec"]["pytorchReplicaSpecs"].values():
        spec["template"]["spec"]["activeDeadlineSeconds"] //= 240  # 15 s
    job["spec"]["runPolicy"]["activeDeadlineSeconds"] //= 240
    message = failure(job, namespace)
    assert re.match("the job failed: .* because it was active longer than specified deadline\n", message)


@pytest.mark.parametrize("replica", ["Master", "Worker"])
def test_gpus_where_there_are_none(small_image, namespace, replica):
    job = manifest(small_image, gpus=1, namespace=namespace)
    for name, spec in job["spec"]["pytorchReplicaSpecs"].items():
        if name != replica:
            spec["template"]["spec"]["containers"][0]["resources"] = {}
    message = failure(job, namespace, patience=5)
    assert message.startswith("the job did not start within 5 s\n") and "Insufficient nvidia.com/gpu" in message


def test_name_that_is_taken(small_image, namespace):
    job = manifest(small_image, namespace=namespace)
    job["metadata"] = {"name": "mnist", "namespace": namespace}
    assert create(job) == "pytorchjob.kubeflow.org/mnist"
    with pytest.raises(helpers.PageError, match='created nothing.*pytorchjobs.kubeflow.org "mnist" already exists'):
        create(job)


def test_quota(small_image, namespace):
    """The job is accepted, but there are no pods."""
    kubectl("create", "quota", "small", "-n", namespace, "--hard=pods=0")
    message = failure(manifest(small_image, namespace=namespace), namespace, patience=5)
    assert "exceeded quota: small" in message


def test_log_that_cannot_be_read(small_image, namespace, tmp_path, monkeypatch):
    """The account may do all but that: the page says so instead of blaming the trainer."""
    rules = [{"apiGroups": ["", "kubeflow.org"], "resources": ["pods", "events", "pytorchjobs"], "verbs": ["*"]}]
    account = {"kind": "ServiceAccount", "name": "blind", "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "blind"}
    for item in ({"kind": "ServiceAccount", "apiVersion": "v1"},
                 {"kind": "Role", "apiVersion": "rbac.authorization.k8s.io/v1", "rules": rules},
                 {"kind": "RoleBinding", "apiVersion": "rbac.authorization.k8s.io/v1", "roleRef": role,
                  "subjects": [account]}):
        kubectl("create", "-n", namespace, "-f", "-", given=json.dumps(item | {"metadata": {"name": "blind"}}))
    log_in(tmp_path / "kubeconfig", "blind", namespace, monkeypatch)
    job = create(manifest(small_image, namespace=namespace))
    with pytest.raises(helpers.PageError, match="has succeeded, but its log cannot be read: .*cannot get resource"):
        follow(job, namespace)


def test_keep(small_image, namespace):
    job = create(manifest(small_image, "--batch-size", "0", namespace=namespace))
    with pytest.raises(helpers.PageError, match=f"To see more: kubectl describe -n {namespace} pod/") as error:
        follow(job, namespace, keep=True)
    assert "deleted" not in str(error.value)
    subprocess.run(str(error.value).rpartition("To see more: ")[2], shell=True, check=True, stdout=subprocess.DEVNULL)


def test_api_server_gone_in_the_middle(small_image, namespace, monkeypatch):
    """The page says so and leaves the job alone; it can be taken up again when the server is back."""
    monkeypatch.setattr(jobs, "PATIENCE", 2)
    job = create(manifest(small_image, epochs=150, namespace=namespace))
    server = pid_of("apiserver")

    class Freeze(io.StringIO):
        def write(self, line):
            if line.startswith("Epoch: 2 "):
                os.kill(server, signal.SIGSTOP)
            return super().write(line)

    try:
        with contextlib.redirect_stdout(Freeze()) as printed, at_most(200):
            with pytest.raises(helpers.PageError) as error:
                jobs.follow(job, namespace)
    finally:
        os.kill(server, signal.SIGCONT)
    assert "Epoch: 2 " in printed.getvalue() and "(the API server does not answer: " in printed.getvalue()
    assert "the API server has not answered for" in str(error.value) and "The job goes on" in str(error.value)
    monkeypatch.setattr(jobs, "PATIENCE", 60)
    assert helpers.read_log(follow(job, namespace))["accuracies"][-1][0] == 150


def pid_of(part):
    """The process of a part of the cluster that ci/cluster/up started."""
    nsenter = Path(os.environ["KUBECONFIG"]).with_name("pid").joinpath(part).read_text().split()[0]
    return int(Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text().split()[0])


def test_pods_that_are_lost(namespace):
    """A worker's pod is deleted, and later another's process killed: the job goes on from its checkpoint."""
    digits = get_digits()
    image = build("mnist:1", digits.folder)
    volume = Path(os.environ["KUBECONFIG"]).parent / "volume"
    volume.mkdir(exist_ok=True)
    volume.chmod(0o777)
    size = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]}
    kubectl("apply", "-f", "-", given=json.dumps({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": namespace},
        "spec": size | {"hostPath": {"path": str(volume)}, "claimRef": {"namespace": namespace, "name": "claim"},
                        "storageClassName": "", "persistentVolumeReclaimPolicy": "Retain"}}))
    kubectl("apply", "-n", namespace, "-f", "-", given=json.dumps({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "claim"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}},
                 "storageClassName": "", "volumeName": namespace}}))
    job = create(manifest(image, "--batch-size", "256", "--log-interval", "50", epochs=3, namespace=namespace,
                          checkpoint_claim="claim"))
    name = job.split("/")[1]
    done = []

    class Trouble(io.StringIO):
        def write(self, line):
            if line.startswith("Epoch: 1 ") and not done:
                done.append("deleted")
                kubectl("delete", "pod", f"{name}-worker-1", "-n", namespace, "--wait=false")
            elif line.startswith("Epoch: 3 ") and len(done) == 1:
                done.append("killed")
                os.kill(process_in(f"{name}-worker-0", namespace), signal.SIGKILL)
            return super().write(line)

    with contextlib.redirect_stdout(Trouble()) as printed, at_most(800):
        jobs.follow(job, namespace)
    log = printed.getvalue()
    assert done == ["deleted", "killed"]
    assert re.search(r"Told to stop after 0 epochs and \d+ steps", log), log
    assert re.search(r"Going on from .*: 0 epochs and [1-9]\d* steps are done", log), log
    assert "Going on from" in log and f"/checkpoints/{name}.pt: 2 epochs and 0 steps are done" in log, log
    run = helpers.read_log(log)
    assert [epoch for epoch, _ in run["accuracies"]] == [1, 2, 3]
    assert run["accuracies"][-1][1] > (0.985 if MNIST_DIR else 0.90)


def process_in(pod, namespace):
    """The trainer's process in a pod, seen from outside."""
    uid = json.loads(kubectl("get", "pod", pod, "-n", namespace, "-o", "json"))["metadata"]["uid"]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if uid in (path / "cgroup").read_text() and b"mnist.py" in (path / "cmdline").read_bytes():
                return int(path.name)
    raise AssertionError(f"no process of {pod}")


def test_pod_security_restricted(small_image, namespace):
    """With the operator's template for its init container, the job runs in a namespace of the strictest level."""
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    log = follow(create(manifest(small_image, namespace=namespace)), namespace)
    assert helpers.read_log(log)["accuracies"]


def test_pod_security_needs_the_settings_of_the_manifest(small_image, namespace):
    """Without them the pods are refused, and the page says why."""
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    job = manifest(small_image, namespace=namespace)
    for spec in job["spec"]["pytorchReplicaSpecs"].values():
        del spec["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]
    message = failure(job, namespace, patience=5)
    assert 'violates PodSecurity "restricted' in message


def test_finished_job_is_deleted_when_its_time_is_over(small_image, namespace):
    job = manifest(small_image, namespace=namespace)
    job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] //= 86400 // 5  # 5 s
    name = create(job)
    follow(name, namespace)
    deadline = time.monotonic() + 60
    while kubectl("get", "pytorchjobs,pods", "-n", namespace, "-o", "name"):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_no_secret_in_what_was_kept(executed):
    """Neither the keys of the cluster nor the names of the machine's folders."""
    config = Path(os.environ["KUBECONFIG"]).read_text()
    secrets = re.findall(r"(?:key-data|token): (\S{20,})", config)
    assert secrets
    for path in KEPT.iterdir():
        assert not any(secret[:40] in path.read_text() for secret in secrets), path
