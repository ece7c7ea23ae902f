"""Runs of Weights & Biases that were kept in a folder, read back."""
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from helpers import PageError


class Records(NamedTuple):
    """A run: hyperparameters, what was logged, and what W&B saw by itself."""

    config: dict
    history: list  # of {name: value}, in the order in which it was logged
    system: list  # (seconds since the first, {name of the metric: value})
    artifacts: list  # (name, type, files)
    online: bool

    def curve(self, name, x="epoch"):
        """Return what was logged under a name, as (value of x, value)."""
        return [(item[x], item[name]) for item in self.history if name in item]


def read_records(folder):
    """Return the Records of the last run in a folder, by W&B's own reader; raise PageError if there is none to read."""
    runs = sorted(Path(folder).glob("wandb/*run-*/run-*.wandb"), key=lambda run: run.parent.name.split("run-")[1])
    if not runs:
        raise PageError(f"{folder} holds no run of Weights & Biases: the lines of the training say why")
    done = subprocess.run([Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", runs[-1].parent],
                          capture_output=True, text=True)
    if done.returncode:
        raise PageError(f"{runs[-1]} cannot be read: {done.stderr.strip()}")
    records = Records({}, [], [], [], not runs[-1].parent.name.startswith("offline"))
    start = None
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "run":
            config = record["run"].get("config", {}).get("update", {})
            records.config.update({name: value for name, value in config.items() if name != "_wandb"})
        elif record["type"] == "history":
            records.history.append(record["history"]["item"])
        elif record["type"] == "stats":
            stamp = record["stats"]["timestamp"]
            seconds = time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0{stamp[19:-1]}")
            start = start or seconds
            records.system.append((seconds - start, record["stats"]["item"]))
        elif record["type"] == "artifact":
            artifact = record["artifact"]
            files = [file["path"] for file in artifact["manifest"]["contents"]]
            records.artifacts.append((artifact["name"], artifact["type"], files))
    return records
