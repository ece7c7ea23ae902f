"""The tarball: what is in it, that it is always the same, and that it is all that a reader needs."""

import functools
import http.server
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from test_environment import environment, run, serving
from trainer import make_data

PROJECT = Path(__file__).resolve().parent.parent
IDENTITY = {f"GIT_{who}_{what}": "someone@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder, *arguments):
    return subprocess.run(["git", "-C", folder, *arguments], env={**os.environ, **IDENTITY}, check=True,
                          capture_output=True, text=True).stdout


@pytest.fixture
def clone(project):
    """The copy of the project as a git checkout, with things lying about in it that git does not track."""
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "all")
    for name in ".venv/pyvenv.cfg", "build/mnist.html", "data/digits.gz", "ci/__pycache__/page.pyc", "notes.txt":
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("not tracked")
    return project


def tarball(clone, folder="."):
    done = subprocess.run([clone / "ci/tarball"], cwd=clone / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return clone / done.stdout.strip()


def test_contents(clone):
    """The tracked files as they are now, without those of git and CI, in one folder, of nobody."""
    (clone / "requirements.in").write_text("# changed since the commit\n")
    path = tarball(clone)
    version = re.search(r'^version = "(.*)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert path == clone / f"dist/mnist-tutorial-{version}.tar.gz"
    assert [name.name for name in path.parent.iterdir()] == [path.name]
    with tarfile.open(path) as tar:
        members = {member.name.removeprefix(f"mnist-tutorial-{version}/"): member for member in tar}
        assert tar.extractfile(members["requirements.in"]).read() == b"# changed since the commit\n"
    tracked = set(git(clone, "ls-files").splitlines())
    assert set(members) == {name for name in tracked if not name.startswith((".ci/", ".git"))}
    assert {"mnist.py", "notebooks/mnist.ipynb", "notebooks/helpers.py", "pytorchjob-mnist.yaml", "README.md",
            "requirements.txt", "ci/tutorial"} <= set(members)
    for member in members.values():
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
    assert members["ci/tutorial"].mode == 0o755 and members["mnist.py"].mode == 0o644


def test_reproducible(clone, tmp_path):
    """The same bytes from another clone, at another time, with another umask."""
    first = tarball(clone).read_bytes()
    git(tmp_path, "clone", "--quiet", clone, "another clone")
    for path in (tmp_path / "another clone").rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    assert tarball(tmp_path / "another clone", "tests").read_bytes() == first


def test_not_a_checkout(project):
    done = run(project / "ci/tarball", GIT_CEILING_DIRECTORIES=project.parent)
    assert done.returncode == 1 and "Run ci/tarball in a clone" in done.stderr and "Traceback" not in done.stderr
    git(project.parent, "init", "--quiet")  # inside of another project
    done = run(project / "ci/tarball")
    assert done.returncode == 1 and "not the top of a git checkout" in done.stderr
    assert not (project / "dist").exists()


def test_tracked_file_is_missing(clone):
    (clone / "mnist.py").unlink()
    done = run(clone / "ci/tarball")
    assert done.returncode == 1 and "mnist.py" in done.stderr and "Traceback" not in done.stderr
    assert not (clone / "dist").exists()


def readme_download():
    """The README's lines for a Jupyter terminal."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "curl" in block]
    return block


@pytest.fixture
def download(clone, tmp_path):
    """Does in an empty folder what the README says, with the tarball on a server of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tarball(clone).parent)
    empty = tmp_path / "an empty folder"
    empty.mkdir()
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        address = f"http://127.0.0.1:{server.server_port}"

        def get(name):
            return subprocess.run(["bash", "-c", f"{readme_download()}pwd"], cwd=empty, capture_output=True, text=True,
                                  env=environment(ADDRESS=f"{address}/{name}", NO_PROXY="127.0.0.1"))

        yield get, empty, tarball(clone).name


def test_download(download):
    get, empty, name = download
    done = get(name)
    assert done.returncode == 0, done.stderr
    [folder] = empty.iterdir()
    assert folder.name == name.removesuffix(".tar.gz")
    assert os.access(folder / "ci/tutorial", os.X_OK)
    assert not any(part in str(path) for path in folder.rglob("*") for part in ("__pycache__", ".git", ".venv"))


def test_download_of_nothing(download):
    get, empty, name = download
    done = get("none.tar.gz")
    assert "404" in done.stderr and list(empty.iterdir()) == []


@pytest.mark.slow
def test_tutorial_of_the_tarball(clone, tmp_path):
    """The whole way of a reader: unpack in an empty folder, set up, run the page; here on small data."""
    data = make_data(tmp_path / "data")
    empty = tmp_path / "an empty folder"
    empty.mkdir()
    subprocess.run(["tar", "xzf", tarball(clone)], cwd=empty, check=True)
    [folder] = empty.iterdir()
    with subprocess.Popen([folder / "ci/tutorial", "-p", "epochs", "1"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={
                              **os.environ, "PYTHON": sys._base_executable, "MNIST_DIR": str(data),
                              "KUBECONFIG": "no/such/kubeconfig"}) as tutorial:
        said = tutorial.communicate()[0]
    assert tutorial.returncode == 0, said
    assert re.search(r"train in the kernel +ran", said) and "Making the environment" in said
    assert (folder / "build/mnist.html").stat().st_size > 100_000
    assert (folder / "build/mnist.ipynb").exists()
