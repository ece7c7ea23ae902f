"""The tarball: what is in it, and that it is always the same."""

import re
import tarfile

from tests.support.project import PROJECT, commit_all, git, run


def test_contents(project):
    """The tracked files of the last commit, without those of git and CI, in one folder, with their modes."""
    commit_all(project)
    for name in ".venv/pyvenv.cfg", "build/mnist.html", "data/digits.gz", "ci/__pycache__/page.pyc", "notes.txt":
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("not tracked")
    assert run(project / "ci/tarball").stderr == ""
    (project / "mnist.py").write_text("# changed since the commit\n")
    done = run(project / "ci/tarball", cwd=project / "tests")
    assert done.returncode == 0 and "Changes that are not committed are left out" in done.stderr
    path = project / done.stdout.strip()
    version = re.search(r'^version = "(.*)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert path == project / f"dist/mnist-tutorial-{version}.tar.gz"
    assert [name.name for name in path.parent.iterdir()] == [path.name]
    with tarfile.open(path) as tar:
        files = (member for member in tar if member.isfile())
        members = {member.name.removeprefix(f"mnist-tutorial-{version}/"): member for member in files}
        assert tar.extractfile(members["mnist.py"]).read() == (PROJECT / "mnist.py").read_bytes()
    tracked = git(project, "ls-files").splitlines()
    assert set(members) == {name for name in tracked if not name.startswith((".ci/", ".git"))}
    assert {"notebooks/mnist.ipynb", "notebooks/support/page.py", "requirements.txt", "LICENSE"} <= set(members)
    assert members["ci/tutorial"].mode == 0o755 and members["mnist.py"].mode == 0o644


def test_not_a_checkout(project):
    git(project.parent, "init", "--quiet")  # inside of another project
    done = run(project / "ci/tarball")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Run ci/tarball in a clone" in done.stderr
    assert not (project / "dist").exists()
