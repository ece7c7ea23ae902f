"""The set-up: the scripts in ci/ are run on copies of the project, some with a package index of our own."""

import contextlib
import datetime
import functools
import hashlib
import http.server
import importlib.metadata
import ipaddress
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parent.parent
BASE_PYTHON = sys._base_executable
NETWORK = re.compile(r"PIP_|UV_|SSL_CERT_|(REQUESTS_CA|CURL_CA)_BUNDLE$|(.*_)?PROXY$|.*_proxy$")


def environment(**more):
    """The caller's variables with a Python for the scripts, and without a package index unless one is given."""
    kept = {name: value for name, value in os.environ.items() if not NETWORK.match(name)}
    given = {name: str(value) for name, value in more.items()}
    return {**kept, "PYTHON": BASE_PYTHON, "PIP_INDEX_URL": "http://127.0.0.1:1", **given}


def run(*command, **variables):
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=280)


def set_up(project, **variables):
    """Does the set-up and lets its Python tell which tutorial-* packages it has."""
    packages = ("import importlib.metadata as m; "
                "print(*sorted(d.name for d in m.distributions() if d.name.startswith('tutorial')))")
    return run("bash", "-c", 'source "$1/ci/environment.sh"; "$python" -c "$2"', "bash", project, packages, **variables)


def assert_stopped(done, *words):
    """It stopped with one clear message, and without a traceback."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# Which Python


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH with what the scripts need besides Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in "bash", "dirname", "tail":
        (folder / name).symlink_to(shutil.which(name))
    return folder


def old_python(path):
    path.write_text(f"""#!/bin/sh
case $1 in
--version) echo Python 3.9.18 ;;
-c) exec '{BASE_PYTHON}' -c 'import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])' "$2" ;;
esac
""")
    path.chmod(0o755)


def test_no_python(project, tools):
    assert_stopped(run(project / "ci/test", PATH=tools, PYTHON=""), "no Python 3.10 or newer on PATH", "PYTHON=")


def test_old_python(project, tools):
    old_python(tools / "python3")
    assert_stopped(run(project / "ci/test", PATH=tools, PYTHON=""), "no Python 3.10 or newer", "Python 3.9.18")
    assert_stopped(run(project / "ci/test", PYTHON=tools / "python3"), "PYTHON=", "Python 3.9.18")
    assert_stopped(run(project / "ci/test", PYTHON=tools / "none"), "PYTHON=", "No such file")


def test_newer_python_beside_an_old_one(ready, tools):
    old_python(tools / "python3")
    (tools / "python3.10").symlink_to(BASE_PYTHON)
    done = run(ready / "ci/test", "--version", PATH=tools, PYTHON="")
    assert done.returncode == 0 and "pytest" in done.stdout, done.stderr


def test_python_without_ensurepip(project, tmp_path):
    """As Debian has it without the package python3-venv."""
    (tmp_path / "bin").mkdir()
    python = shutil.copy2(os.path.realpath(BASE_PYTHON), tmp_path / "bin/python3")
    library = Path(sysconfig.get_path("stdlib"))
    for entry in library.iterdir():
        if entry.name not in ("ensurepip", "site-packages"):
            (tmp_path / "lib" / library.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "lib" / library.name / entry.name).symlink_to(entry)
    assert_stopped(run(project / "ci/test", PYTHON=python), "module ensurepip is missing", "apt install python3-venv")
    assert not (project / ".venv").exists()


# An environment that is there


def test_environment_is_reused(ready):
    """From another folder, with no index, and under a user's own packages that break everything."""
    packages = ready.parent / "packages"
    packages.mkdir()
    (packages / "pytest.py").write_text("raise SystemExit('the user has his own pytest')")
    start = time.monotonic()
    done = run(ready / "ci/test", "--version", PYTHONPATH=packages)
    assert done.returncode == 0 and done.stdout.startswith("pytest "), done.stderr
    assert done.stderr == "" and time.monotonic() - start < 10


@pytest.mark.parametrize("change", [None, "lock", "python", "folder", "removed python", "no stamp"])
def test_environment_fits(ready, change):
    stamp = ready / ".venv/made-from.txt"
    if change == "lock":
        (ready / "requirements.txt").write_text("# another\n")
    elif change == "python":
        stamp.write_text(re.sub("Python 3.*", "Python 3.10.0", stamp.read_text()))
    elif change == "folder":
        ready = ready.rename(ready.parent / "moved")
    elif change == "removed python":
        (ready / ".venv/bin").unlink()
    elif change == "no stamp":
        stamp.unlink()
    done = run(BASE_PYTHON, "-c", f"import sys; sys.path.insert(0, {str(ready / 'ci')!r}); import environment; "
                                  "print(environment.is_made())")
    assert done.stdout == f"{change is None}\n", done.stderr


@pytest.mark.slow
def test_ci_run(ready):
    """CI's entry: MNIST from the folder beside the clone, few threads, pytest's summary as the last line."""
    (ready / "ci/cluster/with").write_text('#!/bin/sh\necho with a cluster: "$@"\nexec "$@"\n')
    (ready.parent / "shared/mnist").mkdir(parents=True)
    shutil.rmtree(ready / "tests")
    (ready / "tests").mkdir()
    (ready / "tests/test_variables.py").write_text(f"""
import os
def test_variables():
    assert os.environ["MNIST_DIR"] == {str(ready.parent / "shared/mnist")!r}
    assert os.environ["OMP_NUM_THREADS"] == "2"
""")
    done = run(ready / ".ci/run", PYTEST_ADDOPTS="")
    assert done.returncode == 0 and "1 passed" in done.stdout.splitlines()[-1], done.stdout
    assert done.stdout.startswith("with a cluster: ")


# A package index of our own, so that an environment is small and made in seconds


def wheel(folder, name, version, files, tag="py3-none-any"):
    """Writes a wheel and returns its lines for a lock."""
    info = f"{name}-{version}.dist-info"
    files = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
             f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"}
    path = folder / name / f"{name}-{version}-{tag}.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            member = zipfile.ZipInfo(place)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{place},,\n" for place in [*files, f"{info}/RECORD"]))
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


class Index(http.server.ThreadingHTTPServer):
    """Serves folders of wheels, as a package index or as a proxy; holds back tutorialsmall while `gate` is closed."""

    def __init__(self, folder, cache):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Nothing else is asked, and no cache of the user's is read or filled.
        self.settings = {"PIP_INDEX_URL": self.url, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": 1,
                         "UV_CACHE_DIR": cache, "UV_NO_CONFIG": 1, "TMPDIR": cache.parent}

    def handle_error(self, request, client_address):
        pass  # clients that are killed, or that do not trust the certificate


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def translate_path(self, path):
        return super().translate_path(re.sub("^http://[^/]+", "", path))  # as a proxy is asked

    def do_GET(self):
        if "tutorialsmall-" in self.path:
            self.server.waiting.set()
            self.server.gate.wait(60)
        super().do_GET()


@contextlib.contextmanager
def serving(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with the real uv and two small packages, and their lines for a lock."""
    folder = tmp_path_factory.mktemp("wheels")
    uv = importlib.metadata.distribution("uv")
    files = {}
    for path in uv.files:
        if path.name == "uv":
            files[f"uv-{uv.version}.data/scripts/uv"] = path.locate().read_bytes()
        elif path.parts[0] == "uv" and path.suffix == ".py":
            files[str(path)] = path.locate().read_bytes()
    return folder, {
        "uv": wheel(folder, "uv", uv.version, files, re.search(r"^Tag: (.*)", uv.read_text("WHEEL"), re.MULTILINE)[1]),
        "small": wheel(folder, "tutorialsmall", "1", {"tutorialsmall.py": ""}),
        "many": wheel(folder, "tutorialmany", "1", {f"tutorialmany/{n}.py": "" for n in range(3000)}),
    }


@pytest.fixture
def index(wheels, tmp_path):
    with serving(Index(wheels[0], tmp_path / "cache")) as server:
        yield server


@pytest.fixture
def small(project, wheels):
    """A copy of the project with a small lock."""
    (project / "requirements.txt").write_text(wheels[1]["uv"] + wheels[1]["small"])
    return project


@pytest.mark.slow
def test_made_anew(small, wheels, index):
    """After a change of the lock, with the old .venv active so that python3 is the one in it; after a move."""
    assert set_up(small, **index.settings).stdout == "tutorialsmall\n"
    (small / "requirements.txt").write_text(wheels[1]["uv"] + wheels[1]["many"])
    path = f"{small / '.venv/bin'}:{os.environ['PATH']}"
    done = set_up(small, **index.settings, PYTHON="", PATH=path)
    assert done.stdout == "tutorialmany\n" and "was made from another" in done.stderr, done.stderr
    moved = small.rename(small.parent / "moved to another place")
    done = set_up(moved, **index.settings)
    assert done.stdout == "tutorialmany\n" and "was made from another" in done.stderr, done.stderr
    start = time.monotonic()
    done = set_up(moved)
    assert done.stdout == "tutorialmany\n" and done.stderr == "" and time.monotonic() - start < 5


@pytest.fixture
def half_way(small, index):
    """A set-up that waits for a package."""
    index.gate.clear()
    with subprocess.Popen(["bash", "-c", 'source "$1/ci/environment.sh"', "bash", small], text=True,
                          env=environment(**index.settings), stderr=subprocess.PIPE, start_new_session=True) as script:
        assert index.waiting.wait(60)
        yield script
        index.gate.set()


@pytest.mark.slow
def test_interrupted(half_way, small):
    os.killpg(half_way.pid, signal.SIGINT)  # as Ctrl-C does
    assert half_way.wait(30) != 0 and "Traceback" not in half_way.stderr.read()
    assert not (small / ".venv").exists()


@pytest.mark.slow
def test_killed(half_way, small, index):
    """Nothing can clean up, and uv goes on alone; the next run waits for it and makes the environment anew."""
    children = Path(f"/proc/{half_way.pid}/task/{half_way.pid}/children")
    if not children.exists():
        pytest.skip("no /proc here to find the process in")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    assert half_way.wait(30) != 0
    threading.Timer(3, index.gate.set).start()
    done = set_up(small, **index.settings)
    assert done.stdout == "tutorialsmall\n", done.stderr
    assert "Waiting" in done.stderr and "not to its end" in done.stderr


@pytest.mark.slow
def test_two_at_once(half_way, small, index):
    threading.Timer(3, index.gate.set).start()
    second = set_up(small, **index.settings)
    assert half_way.wait(60) == 0 and second.stdout == "tutorialsmall\n"
    assert "Making" in half_way.stderr.read() and "Waiting" in second.stderr and "Making" not in second.stderr


@pytest.mark.slow
def test_no_uv_for_this_machine(small, wheels, index):
    lines = re.sub("uv==.*", r"uv==0.0.1 \\", wheels[1]["uv"])
    (small / "requirements.txt").write_text(lines + wheels[1]["small"])
    assert_stopped(set_up(small, **index.settings), "There is no uv", "the package index has no such package")
    (small / "requirements.txt").write_text(wheels[1]["small"])
    done = set_up(small, **index.settings)
    assert done.stdout == "tutorialsmall\n" and "pip takes several minutes" in done.stderr


# What goes wrong with the index


@pytest.mark.slow
@pytest.mark.parametrize("where", ["refused", "silent"])
def test_no_index(small, index, where):
    """To pip and to uv, at once because it takes its time. The caller's long timeout does not prolong the wait."""
    copies = [shutil.copytree(small, small.with_name(f"for {name}")) for name in ("pip", "uv")]
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as threads:
        dead = "http://127.0.0.1:" + ("1" if where == "refused" else str(silent.getsockname()[1]))
        start = time.monotonic()
        both = [threads.submit(set_up, copy, **{**index.settings, name: dead, "PIP_DEFAULT_TIMEOUT": 180})
                for copy, name in zip(copies, ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"))]
        for copy, done in zip(copies, both):
            assert_stopped(done.result(), "the package index does not answer", "PIP_INDEX_URL=")
            assert not (copy / ".venv").exists()
        assert time.monotonic() - start < 100


@pytest.mark.slow
@pytest.mark.parametrize("package", ["uv", "small"])
def test_wrong_hash(small, wheels, index, package):
    lock = small / "requirements.txt"
    lock.write_text(lock.read_text().replace(wheels[1][package], wheels[1][package][:-7] + "000000\n"))
    done = set_up(small, **index.settings)
    assert_stopped(done, "requirements.txt names by its hash", "not installed")
    assert "There is no uv" not in done.stderr
    assert not (small / ".venv").exists()


@pytest.mark.slow
def test_settings_of_pip(small, wheels, index, tmp_path):
    """An index and a second one from pip's configuration file; an index behind a proxy; uv is told all of it."""
    second = shutil.copytree(wheels[0] / "tutorialsmall", tmp_path / "second/tutorialsmall").parent
    first = tmp_path / "first"
    shutil.copytree(wheels[0] / "uv", first / "uv")
    with serving(Index(first, tmp_path / "cache1")) as one, serving(Index(second, tmp_path / "cache2")) as two:
        (tmp_path / "pip.conf").write_text(f"""
[global]
index-url = {one.url}
[install]
extra-index-url =
    {two.url}
""")
        settings = {**one.settings, "PIP_CONFIG_FILE": tmp_path / "pip.conf"}
        settings["PIP_INDEX_URL"] = ""
        done = set_up(small, **settings)
        assert done.stdout == "tutorialsmall\n", done.stderr
    (small / ".venv/made-from.txt").unlink()
    done = set_up(small, **{**index.settings, "UV_CACHE_DIR": tmp_path / "cache3", "PIP_PROXY": index.url,
                            "PIP_INDEX_URL": "http://index.invalid", "PIP_TRUSTED_HOST": "index.invalid"})
    assert done.stdout == "tutorialsmall\n", done.stderr


@pytest.fixture
def certificates(tmp_path):
    """A certificate for 127.0.0.1, and the one that it is signed with."""
    def certificate(name, key, issuer, issuer_key, extension):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().serial_number(x509.random_serial_number()).public_key(key.public_key())
        builder = builder.subject_name(name).issuer_name(issuer).add_extension(extension, critical=False)
        builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority of the tests")])
    server = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (tmp_path / "authority.pem").write_bytes(
        certificate(authority, root, authority, root, x509.BasicConstraints(ca=True, path_length=None)))
    (tmp_path / "server.pem").write_bytes(
        leaf.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate(server, leaf, authority, root, address))
    return tmp_path / "server.pem", tmp_path / "authority.pem"


@pytest.mark.slow
def test_certificates_of_pip(small, index, certificates):
    """An index whose certificate only the caller's network knows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates[0])
    index.socket = context.wrap_socket(index.socket, server_side=True)
    settings = {**index.settings, "PIP_INDEX_URL": index.url.replace("http:", "https:")}
    assert_stopped(set_up(small, **settings), "certificate of the package index is not trusted", "PIP_CERT=")
    done = set_up(small, **settings, PIP_CERT=certificates[1])
    assert done.stdout == "tutorialsmall\n", done.stderr


# A full disk


def set_up_on(options, project, **variables):
    """Does the set-up on a file system of its own, which only this process sees."""
    there = project.parent / "disk"
    there.mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "bash", "-c",
             'mount -t tmpfs -o "$1" tmpfs "$2" && cp -R "$3/." "$2" && source "$2/ci/environment.sh"', "bash"]
    try:
        can = run(*mount[:4], '-c', 'mount -t tmpfs tmpfs "$1"', "bash", there).returncode == 0
    except FileNotFoundError:
        can = False
    if not can:
        pytest.skip("only root, or whoever may use user namespaces, can mount a small disk for this")
    return run(*mount, options, there, project, **variables)


def test_little_space(project):
    assert_stopped(set_up_on("size=80m", project), "needs", "GB", "0.1 GB left")


@pytest.mark.slow
def test_disk_full_on_the_way(small, wheels, index):
    (small / "requirements.txt").write_text(wheels[1]["uv"] + wheels[1]["many"])
    done = set_up_on("size=20g,nr_inodes=3500", small, **index.settings)  # full of files, since no test writes 7 GB
    assert_stopped(done, "could not install", "a disk is full", "No space left on device")


# The lock

INPUTS = ("requirements.in", "requirements-flyte.in", "requirements-dstack.in")
LOCKS = [name.replace(".in", ".txt") for name in INPUTS]


def pins(lock="requirements.txt"):
    """The lock's requirements and the number of their hashes."""
    lines = (PROJECT / lock).read_text().replace("\\\n", "").splitlines()
    for line in lines:
        if line and not line.lstrip().startswith("#"):
            requirement, *found = line.split("--hash=sha256:")
            yield Requirement(requirement), len(found)


def inputs():
    requirements = {}
    for name in *INPUTS, "overrides.txt":  # the overrides win
        for line in (PROJECT / name).read_text().splitlines():
            if line.split("#")[0].strip() and not line.startswith("-r "):
                requirement = Requirement(line.split("#")[0])
                requirements[canonicalize_name(requirement.name)] = requirement
    return requirements


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_lock_answers_to_its_inputs(python, system):
    marker = {**default_environment(), "python_version": python, "python_full_version": f"{python}.7",
              "sys_platform": system, "platform_system": system.capitalize()}
    locked = {}
    for pin, number_of_hashes in pins():
        assert number_of_hashes and re.fullmatch(r"==[^*]+", str(pin.specifier)), pin
        if not pin.marker or pin.marker.evaluate(marker):
            assert canonicalize_name(pin.name) not in locked, pin
            locked[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    for name, requirement in inputs().items():
        if requirement.marker and not requirement.marker.evaluate(marker):
            assert name not in locked
            continue
        assert name in locked and requirement.specifier.contains(locked[name]), f"{requirement}: {locked.get(name)}"


@pytest.mark.parametrize("part, has, lacks", [
    ("requirements-flyte.txt",
     {"flytekit", "flytekitplugins-kfpytorch", "matplotlib", "pydantic", "wandb", "kubernetes"},
     {"torch", "triton", "jupyterlab"}),  # PyTorch is the base image's
    ("requirements-dstack.txt", {"torch", "torchvision", "lightning", "wandb"}, {"dstack", "flytekit", "jupyterlab"}),
])
def test_locks_for_elsewhere_are_parts_of_the_other(part, has, lacks):
    """The same versions, so that what runs in an image or on a machine of dstack is what was tried on the page."""
    whole, part = ({(pin.name, str(pin.specifier), str(pin.marker)): hashes for pin, hashes in pins(lock)}
                   for lock in ("requirements.txt", part))
    versions = {}
    for name, specifier, _ in whole:
        versions.setdefault(name, set()).add(specifier)
    assert len(part) > 50 and all(part.values())
    assert not [pin for pin in part if pin[1] not in versions.get(pin[0], ())]
    names = {pin[0] for pin in part}
    assert has <= names and not lacks & names


def test_lock_tells_how_it_is_made_and_installed():
    header = (PROJECT / "requirements.txt").read_text().split("\nadal==")[0]
    assert "ci/lock" in header
    assert "pip install --no-deps --require-hashes -r requirements.txt" in header


def test_lock_names_no_index():
    for name in *INPUTS, *LOCKS, "overrides.txt":
        assert not re.search(r"https?://|index-url|find-links", (PROJECT / name).read_text()), name


@pytest.mark.slow
def test_lock_is_what_uv_makes_of_its_inputs(ready):
    """The package index is asked; the pins of the lock stay where they answer to the inputs."""
    locks = [ready / lock for lock in LOCKS]
    before = [lock.read_bytes() for lock in locks]
    variables = {**os.environ, "PYTHON": BASE_PYTHON}  # the network's settings, too
    done = subprocess.run([ready / "ci/lock"], env=variables, capture_output=True, text=True)
    if "ailed to fetch" in done.stderr:
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    assert [lock.read_bytes() for lock in locks] == before


def test_failed_lock_leaves_the_old_ones(ready):
    before = [(ready / lock).read_bytes() for lock in LOCKS]
    for name in reversed(INPUTS):
        (ready / name).write_text("no such requirement\n")
        assert run(ready / "ci/lock").returncode != 0
        assert [(ready / lock).read_bytes() for lock in LOCKS] == before
    assert [path.name for path in (ready / "build").iterdir()] == []
