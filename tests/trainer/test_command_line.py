"""The command line: usage, defaults, log; and that mnist.py, imported, does nothing."""

import inspect
import os
import re
import runpy
import signal
import threading

import pytest
import torch

import mnist
from tests.support.data import TRAIN
from tests.support.processes import LOG, PROJECT, SHORT, call

WRONG = """
    --epochs=0 --epochs=1.5 --batch-size=0 --test-batch-size=-1 --log-interval=-1 --validation=-1 --timeout=0 --lr=0
    --lr=nan --lr=fast --momentum=1 --momentum=-0.1 --seed=-1 --seed=9223372036854775808 --backend=mpi --bogus --epoch=1
    extra
"""


@pytest.mark.parametrize("wrong", WRONG.split())
def test_wrong_usage(wrong, capsys):
    assert call("--data", "nowhere", wrong) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and (wrong.partition("=")[0] in last or "counts are at least 1" in last)


def test_same_arguments_and_defaults_from_python(monkeypatch):
    defaults = {name: parameter.default for name, parameter in inspect.signature(mnist.train).parameters.items()}
    given = {}
    monkeypatch.setattr(mnist, "train", given.update)
    assert call() == 0
    assert given | {"report": None} == defaults and given["data"] == PROJECT / "data"


def test_value_error_in_the_training_is_not_wrong_usage(data, monkeypatch):
    monkeypatch.setattr(mnist.Net, "forward", lambda net, images: int("not a number"))
    with pytest.raises(ValueError, match="not a number"):
        call("--data", data)


def test_log(trained, short_run):
    """The mean loss since the last line, if lines within an epoch are wanted; that of the epoch at its end."""
    lines = trained(*SHORT, "--log-interval", 4)[0].splitlines()
    assert len(lines) == 5 and all(map(LOG.fullmatch, lines))
    assert lines[0].startswith(f"Training on {TRAIN} images with 1 x cpu in ") and lines[4].startswith("Trained in ")
    each = [float(loss) for loss in re.findall(r"%\) - train_loss=(.*)", (short_run / "log.out").read_text())]
    for line, moment, since in zip(lines[1:4], ("1 ( 40.0%)", "1 ( 80.0%)", "1"), (each[:4], each[4:8], each)):
        loss = float(re.match(rf"Epoch: {re.escape(moment)} - train_loss=(\S+)", line)[1])
        assert loss == pytest.approx(sum(since) / len(since), abs=1e-4)


def test_import_has_no_side_effect(tmp_path, monkeypatch, capfd):
    def state():
        process = signal.getsignal(signal.SIGTERM), threading.active_count(), dict(os.environ), os.listdir()
        return process, torch.get_rng_state().tolist(), capfd.readouterr()

    monkeypatch.chdir(tmp_path)
    torch.rand(1)  # if the import set a seed, the state would be another one now
    before = state()
    runpy.run_path(str(PROJECT / "mnist.py"), run_name="mnist")
    assert state() == before
