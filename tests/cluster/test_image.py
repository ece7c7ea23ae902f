"""The image that Fairing builds with fairing_compat.py, in registries of the tests' own; no cluster is needed."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from support.page import PageError

from tests.support.cluster import build_image
from tests.support.processes import PROJECT, free_port

DOCKER = "application/vnd.docker."
USER, PASSWORD = "reader", "quite-secret"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
WRONG = base64.b64encode(f"{USER}:wrong-password".encode()).decode()


class Registry:
    """What the tests ask of a registry at a port of this machine, which writes its log to a file."""

    def __init__(self, port, log):
        self.repository, self.log = f"localhost:{port}/tutorial/mnist", log

    def requests(self):
        """Return (method, path) of each request so far."""
        return re.findall(r'"([A-Z]+) (/v2/\S+)', self.log.read_text())

    def build(self, tag, files, base="base"):
        """Build an image on a base image of this registry; return its reference."""
        return build_image(f"{self.repository}:{tag}", f"{self.repository}:{base}", files)


@contextlib.contextmanager
def serve(folder, **config):
    """Run Debian's docker-registry on a free port, with its configuration, storage and log in a folder."""
    port = free_port()
    storage = {"filesystem": {"rootdirectory": str(folder / "storage")}}
    config |= {"version": "0.1", "http": {"addr": f"127.0.0.1:{port}"}, "storage": storage}
    (folder / "config.yml").write_text(json.dumps(config))
    with open(folder / "log", "w") as log:
        command = ["docker-registry", "serve", folder / "config.yml"]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)
    try:
        with socket.socket() as connection:
            while connection.connect_ex(("127.0.0.1", port)):
                assert process.poll() is None, "docker-registry does not start"
                time.sleep(0.02)
        yield Registry(port, folder / "log")
    finally:
        process.kill()
        process.wait()


def skopeo(*arguments):
    subprocess.run(["skopeo", "--insecure-policy", *arguments], check=True)


def fetch(image, folder, *options):
    """Return an image's manifest, configuration and layers, as bytes; skopeo checks all against their digests."""
    skopeo("copy", "--src-tls-verify=false", *options, f"docker://{image}", f"dir:{folder}")
    raw = (folder / "manifest.json").read_bytes()
    blobs = [json.loads(raw)["config"], *json.loads(raw)["layers"]]
    config, *layers = [(folder / blob["digest"].removeprefix("sha256:")).read_bytes() for blob in blobs]
    return raw, config, layers


def sha256(raw):
    return "sha256:" + hashlib.sha256(raw).hexdigest()


@pytest.fixture(scope="module")
def push_base(tmp_path_factory):
    """Return a function that puts a small image of two layers, for ARM processors, into a registry."""
    if not (shutil.which("docker-registry") and shutil.which("skopeo")):
        pytest.skip("needs docker-registry and skopeo, which ci/test --cluster installs")
    folder = tmp_path_factory.mktemp("base")
    image = folder / "image"
    for name in "one", "two", "image":
        (folder / name).mkdir()
        (folder / name / f"{name}.txt").write_text(name)
    command = [sys.executable, PROJECT / "ci/cluster/images/imagedir.py", "image", "one", "two"]
    subprocess.run(command, cwd=folder, check=True)
    manifest = json.loads((image / "manifest.json").read_bytes())
    config = json.loads((image / manifest["config"]["digest"][7:]).read_bytes())
    raw = json.dumps(config | {"architecture": "arm64", "variant": "v8"}).encode()
    manifest["config"] |= {"digest": sha256(raw), "size": len(raw)}
    (image / sha256(raw)[7:]).write_bytes(raw)
    (image / "manifest.json").write_text(json.dumps(manifest))

    def push(registry, tag, *options):
        skopeo("copy", "--dest-tls-verify=false", *options, f"dir:{image}", f"docker://{registry.repository}:{tag}")

    return push


@pytest.fixture(scope="module")
def registry(push_base, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("registry")) as registry:
        push_base(registry, "base", "--preserve-digests")
        push_base(registry, "oci", "--format=oci")
        yield registry


@pytest.fixture(scope="module")
def private(push_base, tmp_path_factory):
    """A registry that wants a login."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "htpasswd").write_text(f"{USER}:$2y$05$abcdefghijklmnopqrstuuoG2N6DoqIjBwpOB/KEnEHyCJSaY71dy\n")  # bcrypt
    with serve(folder, auth={"htpasswd": {"realm": "here", "path": str(folder / "htpasswd")}}) as registry:
        push_base(registry, "base", f"--dest-creds={USER}:{PASSWORD}")
        yield registry


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No login but the test's own; and in each test, no temporary file may be left."""
    for name in "docker", "temporary":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    yield
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture
def files(tmp_path):
    """What goes into the image: a program that only its owner may read or run, data, and a link to it."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "mnist.py").write_text("print('hello')\n")
    (folder / "mnist.py").chmod(0o700)
    (folder / "data").write_bytes(os.urandom(100_000))
    (folder / "link").symlink_to("data")
    return {folder / "mnist.py": "/app/mnist.py", folder / "data": "/app/data/a", str(folder / "link"): "/app/data/b"}


def log_in(tmp_path, registry, **entry):
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {registry.repository.split("/")[0]: entry}}))


def test_image(registry, files, tmp_path):
    """By the rules that containerd, podman and skopeo insist on."""
    reference = registry.build("image", files)
    raw_manifest, raw_config, layers = fetch(f"{registry.repository}:image", tmp_path / "image")
    base_manifest, base_config, _ = fetch(f"{registry.repository}:base", tmp_path / "base")
    assert reference == f"{registry.repository}@{sha256(raw_manifest)}"
    skopeo("copy", "--src-tls-verify=false", f"docker://{reference}", f"oci:{tmp_path}/oci:1")
    manifest, config = json.loads(raw_manifest), json.loads(raw_config)
    assert manifest["mediaType"] == DOCKER + "distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == DOCKER + "container.image.v1+json"
    assert manifest["layers"][:2] == json.loads(base_manifest)["layers"]
    assert manifest["layers"][2]["mediaType"] == DOCKER + "image.rootfs.diff.tar.gzip"
    assert manifest["config"]["size"] == len(raw_config) and manifest["layers"][2]["size"] == len(layers[2])
    assert config["rootfs"]["diff_ids"] == [*map(sha256, layers[:2]), sha256(gzip.decompress(layers[2]))]
    made_by = [entry["created_by"] for entry in config["history"] if not entry.get("empty_layer")]
    assert made_by[:2] == ["one", "two"] and "fairing" in made_by[2] and len(made_by) == 3
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm64", "v8")
    assert config["config"]["User"] == "1000" and config["config"]["Cmd"] == ["python", "/app/mnist.py"]
    assert set(json.loads(base_config)["config"]["Env"]) <= set(config["config"]["Env"])
    with tarfile.open(fileobj=io.BytesIO(layers[2])) as tar:
        content = {"/" + member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        owners = {(member.mode, member.uid, member.gid, member.uname, member.gname, member.mtime) for member in tar}
    assert content == {target: Path(source).read_bytes() for source, target in files.items()}
    assert owners == {(0o644, 0, 0, "", "", 0)}


def test_only_what_has_changed_is_sent(registry, files):
    first = registry.build("edited", files)
    for path in files:
        os.utime(path, (1e9, 1e9))
        Path(path).chmod(0o640)
    before = len(registry.requests())
    assert registry.build("edited", dict(reversed(files.items()))) == first
    assert {method for method, _ in registry.requests()[before:]} == {"GET"}
    next(iter(files)).write_text("print('hello, world')\n")
    before = len(registry.requests())
    assert registry.build("edited", files) != first
    requests = [method for method, path in registry.requests()[before:] if "/blobs/" in path]
    assert requests.count("POST") == requests.count("PUT") == 2  # the layer and the configuration
    assert requests.count("HEAD") == 4  # these and the two layers of the base image


def test_login(private, files, tmp_path, capfd, caplog):
    log_in(tmp_path, private, auth=BASIC)
    reference = private.build("1", files)
    assert not "".join(capfd.readouterr()) + caplog.text and not logging.root.manager.disable
    manifest, config, layers = fetch(reference, tmp_path / "image", f"--src-creds={USER}:{PASSWORD}")
    content = manifest + config + gzip.decompress(layers[-1])
    assert PASSWORD.encode() not in content and BASIC.encode() not in content


REFUSED, UNUSABLE = "the login is missing, wrong or may not do that", "cannot use the login in Docker's config.json"


@pytest.mark.parametrize(
    "entry, reason", [({}, REFUSED), ({"auth": WRONG}, REFUSED), ({"identitytoken": "quite-secret-token"}, UNUSABLE)]
)
def test_login_missing_or_wrong(entry, reason, private, files, tmp_path, capfd, caplog):
    if entry:
        log_in(tmp_path, private, **entry)
    with pytest.raises(PageError, match=f"base image {private.repository}:base cannot be read: .*{reason}") as error:
        private.build("1", files)
    shown = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert not re.search(f"secret|wrong-password|{re.escape(WRONG)}", shown)


def test_a_login_helper_without_a_login(private, files, tmp_path, monkeypatch):
    """Docker Desktop sets one up for all registries, those that need no login too."""
    helper = tmp_path / "docker-credential-none"
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "docker/config.json").write_text('{"credsStore": "none"}')
    with pytest.raises(PageError, match="the login is missing"):
        private.build("1", files)


@pytest.mark.parametrize("base, reason", [("none", "it is not there; see above"), ("oci", ".*Docker's format v2.2")])
def test_a_base_image_that_cannot_be_read(base, reason, registry, files):
    with pytest.raises(PageError, match=f"base image {registry.repository}:{base} cannot be read: {reason}"):
        registry.build("unread", files, base)
    assert not [path for method, path in registry.requests() if path.endswith("/manifests/unread")]


def test_a_registry_that_is_down(files):
    image = f"localhost:{free_port()}/tutorial/mnist"
    with pytest.raises(PageError, match=f"{image}:base cannot be read: the registry does not answer.*refused"):
        build_image(f"{image}:1", f"{image}:base", files)
