"""Runs of Weights & Biases that were kept in a folder, read back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
        if record["type"] == "run":
            config = record["run"].get("config", {}).get("update", {})
            run.config.update({name: value for name, value in config.items() if name != "_wandb"})
        elif record["type"] == "history":
            run.history.append(record["history"]["item"])
        elif record["type"] == "stats":
            stamp = record["stats"]["timestamp"]
            seconds = time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0{stamp[19:-1]}")
            start = start or seconds
            run.system.append((seconds - start, record["stats"]["item"]))
        elif record["type"] == "artifact":
            artifact = record["artifact"]
            paths = [file["path"] for file in artifact["manifest"]["contents"]]
            run.artifacts.append((artifact["name"], artifact["type"], paths))
    return run
