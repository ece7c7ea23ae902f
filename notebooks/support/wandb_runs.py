"""Runs of Weights & Biases that were kept in a folder, read back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy

from support.page import PageError


class Run(NamedTuple):
    """A run: hyperparameters, what was logged, and what W&B measured by itself."""

    config: dict
    history: list  # of {name: value}, in the order in which it was logged
    system: list  # (seconds since the first, {name of the metric: value})
    artifacts: list  # (name, type, files)

    def curve(self, name: str, x: str = "epoch") -> list[tuple[float, float]]:
        """Return what was logged under a name, as (value of x, value)."""
        return [(item[x], item[name]) for item in self.history if name in item]


def read_run(folder: str | Path) -> Run:
    """Return the last Run in a folder, by W&B's own reader; raise PageError if there is none to read."""
    paths = sorted(Path(folder).glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.split("run-")[1])
    if not paths:
        raise PageError(f"{folder} holds no run of Weights & Biases: the log of the training says why")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", paths[-1].parent]
    own = {name: value for name, value in os.environ.items() if name not in ("WANDB_API_KEY", "WANDB_MODE")}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    if done.returncode:
        raise PageError(f"{paths[-1]} cannot be read: {done.stderr.strip()}")
    run, start = Run({}, [], [], []), None
    for record in map(json.loads, done.stdout.splitlines()):
        match record:
            case {"run": {"config": {"update": config}}}:
                run.config.update({name: value for name, value in config.items() if name != "_wandb"})
            case {"history": {"item": values}}:
                run.history.append(values)
            case {"stats": {"timestamp": stamp, "item": values}}:
                moment = numpy.datetime64(stamp.removesuffix("Z"))
                start = start or moment
                run.system.append(((moment - start) / numpy.timedelta64(1, "s"), values))
            case {"artifact": {"name": name, "type": kind, "manifest": {"contents": files}}}:
                run.artifacts.append((name, kind, [file["path"] for file in files]))
    return run
