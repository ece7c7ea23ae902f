"""ci/environment.sh, on copies of the project with a small lock and a package index of our own."""

import hashlib
import http.server
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.support.project import clean_environment, run

PACKAGES = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions() if 'tutorial' in d.name))"
MANY = 8_000  # files of a package, so that its installation can be met half-way
NO_PYTHON = "error: no Python 3.10 to 3.13. Install one, or name it: PYTHON=/path/to/python"
SET_UP = ["bash", "-c", 'source "$1/ci/environment.sh"; "$python" -c "$2"', "bash"]


def set_up(project, **variables):
    """Do the set-up; print which tutorial-* packages its Python has."""
    return run(*SET_UP, project, PACKAGES, **variables)


def wheel(folder, name, version, files):
    """Write a wheel into a folder of its own; return its lines for a lock."""
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": about, f"{info}/WHEEL": tags}
    path = folder / name / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            member = zipfile.ZipInfo(place)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{place},,\n" for place in [*files, f"{info}/RECORD"]))
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture(scope="module")
def locks(tmp_path_factory):
    """The address of an index with uv and two packages, and the lines for a lock of one of them and of both."""
    folder = tmp_path_factory.mktemp("index")
    uv = importlib.metadata.distribution("uv")
    program = {f"uv-{uv.version}.data/scripts/uv": next(path for path in uv.files if path.name == "uv").read_binary()}
    small = wheel(folder, "uv", uv.version, program) + wheel(folder, "tutorialsmall", "1", {"small.py": ""})
    many = {f"tutorialmany/{number}.py": "" for number in range(MANY)}
    both = small + wheel(folder, "tutorialmany", "1", many)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", small, both
    server.shutdown()
    server.server_close()


@pytest.fixture
def small(project, locks):
    """A copy of the project with a small lock."""
    (project / "requirements.txt").write_text(locks[1])
    return project


@pytest.fixture
def settings(locks, tmp_path):
    """pip's and uv's variables for the index."""
    return {"PIP_INDEX_URL": locks[0], "UV_CACHE_DIR": tmp_path / "cache", "UV_NO_CONFIG": 1, "PIP_NO_CACHE_DIR": 1}


def test_environment_is_reused(ready, tmp_path):
    """Without an index, under a user's packages that break everything; variables are set as the pages want them."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/pytest.py").write_text("raise SystemExit('the user has his own pytest')")
    show = "import os, pytest, sys; print(os.environ['MNIST_DIR'], 'MPLBACKEND' in os.environ, sys.prefix)"
    for given, absolute in [("~/mnist", "/home/someone/mnist"), ("digits", f"{tmp_path}/digits"), ("/srv/d", "/srv/d")]:
        start = time.monotonic()
        variables = {"PYTHONPATH": "own", "MNIST_DIR": given, "HOME": "/home/someone", "MPLBACKEND": "Agg"}
        done = run(*SET_UP, ready, show, cwd=tmp_path, **variables)
        assert (done.returncode, done.stderr) == (0, "") and time.monotonic() - start < 5
        assert done.stdout == f"{absolute} False {ready}/.venv\n"


@pytest.fixture
def old_python(tmp_path):
    """A folder with a python3 that is too old."""
    python = tmp_path / "old/python3"
    python.parent.mkdir()
    fake = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])"
    python.write_text(f"#!/bin/sh\nexec '{sys._base_executable}' -c '{fake}' \"$2\"\n")
    python.chmod(0o755)
    return python.parent


@pytest.mark.parametrize("change", [None, "moved", "no Python", "another Python", "no uv", "not complete"])
def test_environment_is_reused_only_where_it_fits(ready, old_python, change):
    """A new one is then wanted, for which the Python on PATH is too old here."""
    programs, stamp = ready / ".venv/bin", ready / ".venv/stamp"
    if change in ("no Python", "no uv"):
        source = programs.resolve()
        programs.unlink()  # the link
        programs.mkdir()
        for path in source.iterdir():
            if not path.name.startswith(change.lower().split()[1]):
                (programs / path.name).symlink_to(path)
    elif change == "moved":
        ready = ready.rename(ready.parent / "moved")
    elif change == "another Python":
        stamp.write_text(stamp.read_text().replace("Python 3.", "Python 3.0."))
    elif change == "not complete":
        stamp.unlink()
    done = set_up(ready, PYTHON="", PATH=f"{old_python}:{os.environ['PATH']}")
    assert done.returncode == (change is not None) and done.stderr.endswith(f"{NO_PYTHON}\n" if change else "")


def test_no_python(project, old_python):
    for python in old_python / "python3", old_python / "none":
        done = run(project / "ci/test", PYTHON=python)
        assert done.returncode == 1 and done.stderr.endswith(f"{NO_PYTHON}\n")


@pytest.mark.slow
def test_installs_and_mends(small, locks, settings, tmp_path):
    pip = tmp_path / "pip.conf"  # the index may also stand in pip's configuration
    pip.write_text(f"[global]\nindex-url = {locks[0]}/empty\nextra-index-url = {locks[0]}\n")
    done = set_up(small, **settings | {"PIP_CONFIG_FILE": pip, "PIP_INDEX_URL": ""})
    assert done.stdout == "tutorialsmall\n" and "Making" in done.stderr, done.stderr
    packages = next(small.glob(".venv/lib/python*/site-packages"))
    (packages / "small.py").unlink()
    shutil.rmtree(packages / "tutorialsmall-1.dist-info")
    active = f"{small / '.venv/bin'}:{os.environ['PATH']}"
    done = set_up(small, **settings | {"PYTHON": "", "PATH": active})
    assert done.stdout == "tutorialsmall\n" and "Making" not in done.stderr, done.stderr
    (small / "requirements.txt").write_text(locks[2])
    done = set_up(small, **settings | {"UV_DEFAULT_INDEX": "http://127.0.0.1:9"})
    assert done.returncode == 1 and "Connection refused" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert re.match("error: .* could not be installed", done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_killed_on_the_way(small, locks, settings):
    """Half a package is left; then two runs at once, of which one makes the environment anew."""
    (small / "requirements.txt").write_text(locks[2])
    options = {"env": clean_environment(**settings), "stderr": subprocess.PIPE, "start_new_session": True}
    first = subprocess.Popen([*SET_UP, small, PACKAGES], **options)
    while not any(small.glob(".venv/lib/python*/site-packages/tutorialmany/*.py")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert 0 < len(list(small.glob(".venv/lib/python*/site-packages/tutorialmany/*.py"))) < MANY
    with ThreadPoolExecutor() as threads:
        both = list(threads.map(lambda _: set_up(small, **settings), range(2)))
    assert [done.stdout for done in both] == ["tutorialmany tutorialsmall\n"] * 2, both
    assert sorted("Making" in done.stderr for done in both) == [False, True]
    assert len(list(small.glob(".venv/lib/python*/site-packages/tutorialmany/*.py"))) == MANY
