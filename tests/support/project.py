"""Copies of the project, for tests that run its scripts or change its files."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
MADE = {".git", ".venv", "build", "data", "dist"}  # by git and by the scripts
IDENTITY = {f"GIT_{who}_{what}": "someone@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def copy_project(target):
    """Copy the project without anything that was made in it; return the copy's path."""

    def left_out(folder, names):
        return (MADE if Path(folder) == PROJECT else set()) | {"__pycache__", ".ipynb_checkpoints", ".pytest_cache"}

    return Path(shutil.copytree(PROJECT, target, ignore=left_out))


NETWORK = re.compile(r"PIP_|UV_|SSL_CERT_|(REQUESTS_CA|CURL_CA)_BUNDLE$|(.*_)?PROXY$|.*_proxy$")


def clean_environment(**variables):
    """Return the caller's variables with a Python for the scripts, and no package index unless one is given."""
    ours = {name: value for name, value in os.environ.items() if not NETWORK.match(name)}
    given = {name: str(value) for name, value in variables.items()}
    return ours | {"PYTHON": sys._base_executable, "PIP_INDEX_URL": "http://127.0.0.1:9"} | given


def run(*command, cwd=None, **variables):
    """Run a command to its end in such an environment."""
    return subprocess.run(
        command, cwd=cwd, env=clean_environment(**variables), capture_output=True, text=True, timeout=280
    )


def link_environment(project):
    """Give a copy of the project an environment that its scripts take for complete: that of this Python, by links."""
    (project / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "stamp":
            (project / ".venv" / path.name).symlink_to(path)
    (project / ".venv/stamp").write_text(f"{project.resolve()}, Python {sys.version}\n")


def git(folder, *arguments):
    """Run git in a folder; return what it printed."""
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, env=os.environ | IDENTITY, check=True, capture_output=True, text=True).stdout


def commit_all(folder):
    """Make a git repository of a folder, with all that git does not ignore in one commit."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")


def unpack_tarball(target):
    """Make the tarball of the files as they are in the working tree, unpack it below `target`, return its folder."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(Path(folder, "copy"))
        commit_all(copy)
        made = subprocess.run([copy / "ci/tarball"], check=True, capture_output=True, text=True).stdout.strip()
        Path(target).mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "xzf", copy / made, "-C", target], check=True)
        return Path(target, Path(made).name.removesuffix(".tar.gz"))
