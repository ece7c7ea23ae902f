"""Flyte on this machine: its variables, the package of the tasks, and tasks in pods that are processes."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def variables(folder):
    """Return the variables of the environment that keep what Flyte and W&B write in a folder."""
    directories = {f"WANDB_{kind}_DIR": str(folder / "wandb") for kind in ("DATA", "CACHE", "CONFIG")}
    quiet = {"DO_NOT_TRACK": "1", "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1"}
    return {"FLYTE_SDK_LOCAL_SANDBOX": str(folder / "sandbox"), "PYTHONPATH": str(PROJECT), **directories, **quiet}


def pyflyte(*arguments, **variables):
    """Run Flyte's command line in the project; return the process."""
    command = [Path(sys.executable).parent / "pyflyte", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, env=environment)


def make_package(path, **variables):
    """Make the package of the tasks as the page does; return its path."""
    image = "localhost:5000/tutorial/mnist:flyte"
    done = pyflyte("--pkgs", "flyte_mnist", "package", "--image", image, "--force", "--output", path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return path
