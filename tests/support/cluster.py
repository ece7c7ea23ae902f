"""Images and jobs on the cluster that ci/test --cluster brings up; TUTORIAL_CLUSTER names its registry."""

import contextlib
import io
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support.pages import papermill
from tests.support.project import PROJECT, unpack_tarball

REGISTRY = os.environ.get("TUTORIAL_CLUSTER", "")


def kubectl(*arguments, given=None):
    """Run kubectl with a text as its standard input; return what it printed."""
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def namespace(request):
    """A namespace of the test's own, which is gone afterwards."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:45] + f"-{time.time_ns() % 10**9}"
    kubectl("create", "namespace", name)
    deadline = time.monotonic() + 20
    while subprocess.run(["kubectl", "get", "serviceaccount", "default", "-n", name], capture_output=True).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


def run_page(name, folder, **values):
    """Run a page of the tarball, unpacked into a folder, with `strict` on the cluster; return it, with its project."""
    project = unpack_tarball(folder)
    values |= {"strict": True, "image": f"{REGISTRY}/tutorial/mnist:{name}"}
    values["base_image"] = f"{REGISTRY}/tutorial/mnist:base"
    arguments = [word for key, value in values.items() for word in ("-p", key, str(value))]
    begun = time.monotonic()
    done, page = papermill(project, *arguments, name=name, KUBECONFIG=os.environ["KUBECONFIG"])
    print(f"the page took {time.monotonic() - begun:.0f} s")
    assert done.returncode == 0, done.stderr
    page.project = project
    return page


def wait_until_gone(kinds, *options, besides=""):
    """Wait until there is nothing of some kinds, besides one by name: what is deleted goes in the background."""
    deadline = time.monotonic() + 60
    while left := set(kubectl("get", kinds, *options, "-o", "name").split()) - {besides}:
        assert time.monotonic() < deadline, left
        time.sleep(1)


def build_image(image, base, files):
    """Build and push an image of the trainer by Fairing; return its reference."""
    from support.fairing_compat import Builder, Files  # takes seconds to import

    builder = Builder(image, base, Files(files, command=["python", "/app/mnist.py"]))
    builder.build()
    return builder.reference


def build(name, folder):
    """Build and push the image of the trainer with the four files of a folder; return its reference."""
    files = {PROJECT / "mnist.py": "/app/mnist.py"}
    files |= {path: f"/app/data/{path.name}" for path in folder.glob("*-ubyte.gz")}
    return build_image(f"{REGISTRY}/tutorial/{name}", f"{REGISTRY}/tutorial/mnist:base", files)


def build_by_dockerfile(context, image, *options, **variables):
    """Build an image by buildah on the base image of the first page, and push it."""
    storage = Path(os.environ["KUBECONFIG"]).parent / "buildah"  # goes with the cluster
    buildah = ["buildah", "--root", storage / "root", "--runroot", storage / "run", "--storage-driver", "overlay"]
    base = f"BASE={REGISTRY}/tutorial/mnist:base"
    command = [*buildah, "build", "--isolation", "chroot", "--tls-verify=false", "--format", "docker"]
    command += ["--build-arg", base, *options, "-t", image, context]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Not compressed: so the layers of the base keep their digests, and are in the registry already.
    subprocess.run([*buildah, "push", "--tls-verify=false", "--disable-compression", image], check=True)


def create(job):
    """Create a job; return its name."""
    return kubectl("create", "-f", "-", "-o", "name", given=yaml.safe_dump(job)).strip()


def follow(job, namespace, output=None, seconds=300, **options):
    """Follow a job as the page does; return what was printed, which an output of the test's own may react to."""
    from support import pytorchjob

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)  # what goes wrong must not hold up the tests for ever
    with contextlib.redirect_stdout(output or io.StringIO()) as printed:
        try:
            pytorchjob.follow(job, namespace, **options)
        except TimeoutError as error:
            seen = [kubectl("-n", namespace, *words.split()) for words in ("get pods,events -o wide", "describe pods")]
            raise AssertionError("\n".join([str(error), printed.getvalue()[-2000:], *seen])) from error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
    return printed.getvalue()
