"""The image that fairing_today.py builds, with registries of its own."""
import base64
import gzip
import hashlib
import importlib.metadata
import importlib.util
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
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest

matplotlib.use("agg")
PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import helpers  # noqa: E402
from helpers import PageError  # noqa: E402

DOCKER = "application/vnd.docker."
USER, PASSWORD = "reader", "quite-secret"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
HTPASSWD = USER + ":$2y$05$abcdefghijklmnopqrstuuoG2N6DoqIjBwpOB/KEnEHyCJSaY71dy\n"  # bcrypt of the password


class Registry:
    """Debian's docker-registry on a free port, with its configuration, storage and log in a folder."""

    def __init__(self, folder, **config):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.repository, self.folder = f"localhost:{self.port}/tutorial/mnist", folder
        (folder / "config.yml").write_text(json.dumps({
            "version": "0.1", "http": {"addr": f"127.0.0.1:{self.port}"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}}, **config}))

    def __enter__(self):
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(["docker-registry", "serve", str(self.folder / "config.yml")],
                                            stdout=log, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, "docker-registry does not start"
            time.sleep(0.02)
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def answers(self):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False
        return True

    def requests(self):
        """The (method, path) of each request so far."""
        return re.findall(r'"([A-Z]+) (/v2/\S+)', (self.folder / "log").read_text())

    def tags(self):
        """What each tag refers to."""
        listed = skopeo("list-tags", "--tls-verify=false", f"docker://{self.repository}")
        return {tag: digest(f"{self.repository}:{tag}") for tag in json.loads(listed)["Tags"]}


def skopeo(*arguments):
    done = subprocess.run(["skopeo", "--insecure-policy", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(image):
    return skopeo("inspect", "--tls-verify=false", "--no-tags", "--format={{.Digest}}", f"docker://{image}").strip()


def fetch(image, folder, *options):
    """An image's manifest, configuration and layers, as bytes; skopeo checks all against their digests."""
    skopeo("copy", "--src-tls-verify=false", *options, f"docker://{image}", f"dir:{folder}")
    manifest = json.loads((folder / "manifest.json").read_bytes())

    def blob(entry):
        return (folder / entry["digest"].removeprefix("sha256:")).read_bytes()

    return SimpleNamespace(manifest=manifest, raw=[path.read_bytes() for path in folder.iterdir()],
                           config=json.loads(blob(manifest["config"])), layers=list(map(blob, manifest["layers"])))


@pytest.fixture(scope="module")
def push_base(tmp_path_factory):
    """A function that puts a small image of two layers into a registry."""
    if not (shutil.which("docker-registry") and shutil.which("skopeo")):
        pytest.skip("needs docker-registry and skopeo, which ci/test --cluster installs")
    folder = tmp_path_factory.mktemp("base")
    for layer in "one", "two":
        (folder / layer).mkdir()
        (folder / layer / f"{layer}.txt").write_text(layer)
    (folder / "image").mkdir()
    subprocess.run([sys.executable, PROJECT / "ci/cluster/images/imagedir.py", "image", "one", "two"],
                   cwd=folder, check=True)

    def push(registry, tag="base", *options):
        options = options or ["--preserve-digests"]
        skopeo("copy", "--dest-tls-verify=false", *options, f"dir:{folder}/image",
               f"docker://{registry.repository}:{tag}")

    return push


@pytest.fixture(scope="module")
def registry(push_base, tmp_path_factory):
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        push_base(registry)
        yield registry


@pytest.fixture(scope="module")
def private(push_base, tmp_path_factory):
    """A registry that wants a login."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "htpasswd").write_text(HTPASSWD)
    with Registry(folder, auth={"htpasswd": {"realm": "here", "path": str(folder / "htpasswd")}}) as registry:
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
    """What goes into the image: a file that only its owner may read, a program, and a link."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "mnist.py").write_text("print('hello')\n")
    (folder / "mnist.py").chmod(0o600)
    (folder / "run").write_bytes(os.urandom(100_000))
    (folder / "run").chmod(0o755)
    (folder / "link.gz").symlink_to("run")
    return {folder / "mnist.py": "/app/mnist.py", folder / "run": "/app/run", str(folder / "link.gz"): "/app/data/a.gz"}


def build(image, base, files):
    from fairing_today import Builder, Files  # takes seconds to import

    builder = Builder(image, base, Files(files, command=["python", "/app/mnist.py"]))
    builder.build()
    return builder


@pytest.fixture(scope="module")
def built(registry, tmp_path_factory):
    """An image in the registry, and what was asked for."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.txt").write_text("a")
    builder = build(f"{registry.repository}:built", f"{registry.repository}:base", {folder / "a.txt": "/app/a.txt"})
    return SimpleNamespace(builder=builder, **vars(fetch(builder.reference, folder / "fetched")),
                           base=fetch(f"{registry.repository}:base", folder / "base"))


def test_the_reference_is_the_digest_of_the_tag(built, registry):
    assert built.builder.reference == f"{registry.repository}@{digest(f'{registry.repository}:built')}"


def test_the_image_is_well_formed(built, tmp_path):
    """By the rules that containerd, podman and skopeo insist on."""
    skopeo("copy", "--src-tls-verify=false", f"docker://{built.builder.reference}", f"oci:{tmp_path}/oci:1")
    manifest, config = built.manifest, built.config
    assert manifest["mediaType"] == DOCKER + "distribution.manifest.v2+json"
    assert manifest["config"]["mediaType"] == DOCKER + "container.image.v1+json"
    assert manifest["layers"][:2] == built.base.manifest["layers"]
    assert manifest["layers"][2]["mediaType"] == DOCKER + "image.rootfs.diff.tar.gzip"
    blobs = {sha256(raw): len(raw) for raw in built.raw}
    assert all(blobs[entry["digest"]] == entry["size"] for entry in (manifest["config"], *manifest["layers"]))
    contents = [*built.layers[:2], gzip.decompress(built.layers[2])]
    assert config["rootfs"] == {"type": "layers", "diff_ids": list(map(sha256, contents))}
    made_by = [entry["created_by"] for entry in config["history"] if not entry.get("empty_layer")]
    assert made_by[:2] == ["one", "two"] and "fairing" in made_by[2] and len(made_by) == len(contents)


def sha256(raw):
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def test_the_image_runs_the_command_as_an_ordinary_user(built):
    config = built.config["config"]
    assert config["User"] == "1000" and config["Cmd"] == ["python", "/app/mnist.py"]
    assert set(built.base.config["config"]["Env"]) <= set(config["Env"])


def test_the_layer_holds_the_files_and_nothing_else(registry, files, tmp_path):
    builder = build(f"{registry.repository}:files", f"{registry.repository}:base", files)
    layer = fetch(builder.reference, tmp_path / "fetched").layers[-1]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        held = {"/" + member.name: tar.extractfile(member).read() for member in tar if member.isreg()}
        assert len(tar.getmembers()) == len(held)
        about = {(member.mode, member.uid, member.gid, member.uname, member.gname, member.mtime) for member in tar}
    assert held == {target: Path(source).read_bytes() for source, target in files.items()}
    assert about == {(0o644, 0, 0, "", "", 0)}
    assert layer[3:8] == bytes(5)  # gzip's flags, for a name, and time


def test_the_platform_is_that_of_the_base_image(push_base, registry, files, tmp_path):
    """Fairing says amd64 of every image, and a node with another processor would not run it."""
    fetch(f"{registry.repository}:base", tmp_path / "base")
    manifest = json.loads((tmp_path / "base/manifest.json").read_bytes())
    config = json.loads((tmp_path / "base" / manifest["config"]["digest"][7:]).read_bytes())
    raw = json.dumps(config | {"architecture": "arm64", "variant": "v8"}).encode()
    (tmp_path / "base" / sha256(raw)[7:]).write_bytes(raw)
    manifest["config"] |= {"digest": sha256(raw), "size": len(raw)}
    (tmp_path / "base/manifest.json").write_text(json.dumps(manifest))
    skopeo("copy", "--dest-tls-verify=false", f"dir:{tmp_path}/base", f"docker://{registry.repository}:arm64")
    builder = build(f"{registry.repository}:arm64-built", f"{registry.repository}:arm64", files)
    config = fetch(builder.reference, tmp_path / "fetched").config
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm64", "v8")


def test_the_same_files_give_the_same_image_and_nothing_is_sent(registry, files):
    names = f"{registry.repository}:same", f"{registry.repository}:base"
    first = build(*names, files).reference
    for path in files:
        os.utime(path, (1e9, 1e9))
        Path(path).chmod(0o640)
    before = len(registry.requests())
    assert build(*names, dict(reversed(files.items()))).reference == first
    assert {method for method, _ in registry.requests()[before:]} == {"GET"}


def test_only_the_layer_of_the_files_is_sent(registry, built, files):
    names = f"{registry.repository}:edited", f"{registry.repository}:base"
    first = build(*names, files).reference
    next(iter(files)).write_text("print('hello, world')\n")
    before = len(registry.requests())
    assert build(*names, files).reference != first
    requests = registry.requests()[before:]
    sent = Counter(method for method, path in requests if "/blobs/" in path)
    assert sent["PATCH"] == sent["PUT"] == sent["POST"] == 2  # the layer and the configuration
    layers = [entry["digest"] for entry in built.base.manifest["layers"]]
    assert [method for method, path in requests if path.endswith(tuple(layers))] == ["HEAD", "HEAD"]


def log_in(tmp_path, registry, **entry):
    name = registry.repository.split("/")[0]
    (tmp_path / "docker/config.json").write_text(json.dumps({"auths": {name: entry}}))


@pytest.mark.parametrize("entry", [dict(auth=BASIC), dict(username=USER, password=PASSWORD)])
def test_login(entry, private, files, tmp_path, capfd, caplog):
    log_in(tmp_path, private, **entry)
    builder = build(f"{private.repository}:1", f"{private.repository}:base", files)
    image = fetch(builder.reference, tmp_path / "fetched", f"--src-creds={USER}:{PASSWORD}")
    captured = capfd.readouterr()
    seen = [*image.raw, gzip.decompress(image.layers[-1]), *map(str.encode, (*captured, caplog.text))]
    assert not any(secret.encode() in text for secret in (PASSWORD, BASIC) for text in seen)
    assert not "".join(captured) + caplog.text


def test_a_base_image_of_another_registry_is_copied(registry, private, files, tmp_path):
    names = f"{private.repository}/copy:1", f"{registry.repository}:base"
    with pytest.raises(PageError, match=f"{names[0]} was not pushed: a login is missing or wrong"):
        build(*names, files)
    log_in(tmp_path, private, auth=BASIC)
    builder = build(*names, files)
    image = fetch(builder.reference, tmp_path / "fetched", f"--src-creds={USER}:{PASSWORD}")
    assert len(image.layers) == 3


WRONG = base64.b64encode(f"{USER}:wrong-password".encode()).decode()


@pytest.mark.parametrize("config, reason", [
    (None, "a login is missing or wrong"),
    (dict(auth=WRONG), "a login is missing or wrong"),
    (dict(identitytoken="quite-secret-token"), "cannot use the login in Docker's config.json"),
    (dict(auth="bm8tY29sb24="), "Docker's config.json is damaged"),  # "no-colon"
    ("{", "Docker's config.json is damaged"),
    ('{"credsStore": "that-is-not-there"}', "cannot use the login"),
])
def test_without_a_login_the_page_stops(config, reason, private, files, tmp_path, capfd, caplog):
    if isinstance(config, dict):
        log_in(tmp_path, private, **config)
    elif config:
        (tmp_path / "docker/config.json").write_text(config)
    with pytest.raises(PageError, match=f"{private.repository}:base cannot be read: .*{reason}") as error:
        build(f"{private.repository}:1", f"{private.repository}:base", files)
    shown = str(error.value) + "".join(capfd.readouterr()) + caplog.text
    assert not re.search(f"secret|wrong-password|bm8t|{re.escape(WRONG)}", shown)


def test_a_login_helper_that_has_none(private, files, tmp_path, monkeypatch):
    """Docker Desktop sets one up; Fairing takes its answer for a failure."""
    helper = tmp_path / "docker-credential-none"
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "docker/config.json").write_text('{"credsStore": "none"}')
    with pytest.raises(PageError, match="cannot use the login in Docker's config.json"):
        build(f"{private.repository}:1", f"{private.repository}:base", files)


@pytest.mark.parametrize("base, message", [
    ("none", "base image localhost:.*/tutorial/mnist:none cannot be read: it is not there; see above"),
    ("oci", "base image localhost:.*/tutorial/mnist:oci cannot be read: .*Docker's format v2.2"),
])
def test_a_base_image_that_cannot_be_read(base, message, push_base, registry, files):
    push_base(registry, "oci", "--format=oci")
    with pytest.raises(PageError, match=message):
        build(f"{registry.repository}:unread", f"{registry.repository}:{base}", files)
    assert "unread" not in registry.tags()


@pytest.mark.parametrize("image, base", [("localhost:5000/Tutorial:1", "localhost:5000/tutorial:base"),
                                         ("localhost:5000/tutorial:1", "localhost:5000/tutorial:no tag"),
                                         ("", "localhost:5000/tutorial:base")])
def test_names_that_no_image_can_have(image, base, files):
    with pytest.raises(PageError, match="name images like localhost:5000/tutorial/mnist:1"):
        build(image, base, files)


def test_missing_files(files, tmp_path):
    files[tmp_path / "missing.py"] = "/app/missing.py"
    with pytest.raises(PageError, match="no such file for the image: .*/missing.py$"):
        build("localhost:1/tutorial:1", "localhost:1/tutorial:base", files)


def test_a_file_that_goes_missing(files, monkeypatch):
    """When the layer is written; that is not the registry's fault."""
    from fairing_today import Builder, Files

    builder = Builder("localhost:1/tutorial:1", "localhost:1/tutorial:base", Files(files, command=["python"]))
    next(iter(files)).unlink()
    with pytest.raises(PageError, match="layer .* cannot be written: .*No such file .*/mnist.py") as error:
        builder.build()
    assert "registry" not in str(error.value)


def test_no_open_files_are_left(registry, files):
    names = f"{registry.repository}:open", f"{registry.repository}:base"
    build(*names, files)
    before = os.listdir("/proc/self/fd")
    build(*names, files)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_proxy_is_not_asked_for_a_registry_on_localhost(registry, files, monkeypatch):
    for name in "no_proxy", "NO_PROXY":
        monkeypatch.delenv(name, raising=False)
    for name in "http_proxy", "https_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert build(f"{registry.repository}:proxy", f"{registry.repository}:base", files).reference
    assert helpers.no_registry(registry.repository) == ""


def test_the_program_keeps_its_logging(registry, files, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a notebook
    build(f"{registry.repository}:logging", f"{registry.repository}:base", files)
    assert logging.root.handlers == [] and logging.root.manager.disable == 0 and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("tag", ["1", "2"])
@pytest.mark.parametrize("step", ["_push", "_put_manifest"])
def test_a_registry_that_goes_down(step, tag, push_base, files, tmp_path, monkeypatch):
    """Before anything is sent, and when all but the manifest is sent: the tags stay as they were."""
    import fairing_today
    from containerregistry.client.v2_2 import docker_session

    owner = fairing_today.AppendBuilder if step == "_push" else docker_session.Push
    real = getattr(owner, step)
    with Registry(tmp_path) as registry:
        push_base(registry)
        names = f"{registry.repository}:{tag}", f"{registry.repository}:base"
        build(f"{registry.repository}:1", names[1], files)
        before = registry.tags()
        next(iter(files)).write_text("print('hello, world')\n")

        def down(self, *args, **kwargs):
            registry.process.kill()
            registry.process.wait()
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, step, down)
        with pytest.raises(PageError, match=f"{names[0]} was not pushed: the registry does not answer"):
            build(*names, files)
        monkeypatch.undo()
    with registry:
        assert registry.tags() == before
        builder = build(*names, files)
        assert registry.tags() == before | {tag: builder.reference.split("@")[1]}


def test_a_registry_that_does_not_answer(files, monkeypatch):
    import fairing_today

    monkeypatch.setattr(fairing_today, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system takes the connection
        end = threading.Timer(20, silent.close)  # so that the test fails rather than hangs
        end.daemon = True
        end.start()
        image = f"localhost:{silent.getsockname()[1]}/tutorial/mnist"
        with pytest.raises(PageError, match=f"{image}:base cannot be read: the registry does not answer.*timed out"):
            build(f"{image}:1", f"{image}:base", files)


PING, MANIFEST = "/v2/", "/v2/tutorial/mnist/manifests/base"
LOGIN = {"WWW-Authenticate": 'Bearer realm="http://localhost:PORT/token",service="here"'}
OCI = json.dumps({"schemaVersion": 2, "config": {"digest": sha256(b"{}")}, "layers": []})
ANSWERS = {  # (status, body, headers) of paths; "" is any other
    "token": ({PING: (401, "", LOGIN), "": (401, "no such user")}, "a login is missing or wrong"),
    "web page": ({PING: (200, ""), "": (200, "<html>Welcome</html>")}, "the registry's answer .* is damaged"),
    "index": ({PING: (200, ""), "": (200, '{"schemaVersion": 2, "manifests": []}')}, "Docker's format v2.2"),
    "oci": ({PING: (200, ""), MANIFEST: (200, OCI), "": (200, "{}")}, "Docker's format v2.2"),
    "damaged": ({PING: (200, ""), MANIFEST: (200, OCI), "": (200, "{")}, "does not answer as it should"),
    "error": ({PING: (200, ""), "": (500, "no disk")}, "no disk"),
    "no registry": ({"": (404, "nothing here")}, "does not answer as it should"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_else_a_registry_may_answer(case, files):
    answers, message = ANSWERS[case]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, *headers = answers.get(self.path) or answers[""]
            self.send_response(status)
            for name, value in dict(*headers).items():
                self.send_header(name, value.replace("PORT", str(self.server.server_port)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        image = f"localhost:{server.server_port}/tutorial/mnist"
        with pytest.raises(PageError, match=f"{image}:base cannot be read: .*{message}"):
            build(f"{image}:1", f"{image}:base", files)
        server.shutdown()


def test_another_release_of_fairing_is_refused(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.3" if "fairing" in name else real(name))
    spec = importlib.util.spec_from_file_location("fairing_tomorrow", PROJECT / "notebooks" / "fairing_today.py")
    with pytest.raises(ImportError, match="puts right kubeflow-fairing 1.0.2, but 1.0.3 is installed"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


IMPORT = """
import gzip, json, logging, sys, warnings
import numpy
import helpers
def state():
    return [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable, repr(warnings.filters),
            repr(gzip.time), [name in vars(numpy) for name in ("float", "int")], "notebook.notebookapp" in sys.modules]
before = state()
import fairing_today
print(json.dumps([before, state()]))
"""


def test_importing_changes_nothing_else():
    """In a new Python, as no other import is the first one."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=PROJECT / "notebooks", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    before, after = json.loads(done.stdout)
    assert after == before and before[-2:] == [[False, False], False]
