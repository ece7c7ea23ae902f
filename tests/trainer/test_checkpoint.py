"""Checkpoints: resumed to the last bit after any end, refused when they are another run's, never half a file."""

import os
import random
import shutil
import signal
import socket
import sys
import time
from functools import partial

import pytest
import torch

import mnist
from tests.support.data import FILES, equal, idx, weights
from tests.support.processes import LONG, OUTPUTS, SHORT, Run, drop_capabilities, files, pytorchjob


def test_killed_at_random_moments(data, undisturbed, tmp_path):
    argv = ("--data", data, *LONG, *OUTPUTS)
    run = Run(tmp_path, *argv).until("Epoch: 2")
    for _ in range(3):
        time.sleep(random.uniform(0, 0.3))
        run.process.kill()
        assert run.end() in (-signal.SIGKILL, 0)
        run = Run(tmp_path, *argv).until("Resuming from checkpoint: ")
    run.succeed()
    assert equal(weights(tmp_path / "model"), undisturbed[1])


@pytest.mark.parametrize("moment", ["Epoch: 2 ( 12", "accuracy="])  # inside an epoch, and after one
def test_stopped(moment, data, undisturbed, tmp_path):
    argv = ("--data", data, *LONG, *OUTPUTS)
    run = Run(tmp_path, *argv).until(moment)
    run.process.terminate()
    assert (run.end(), run.err, files(tmp_path)) == (143, "", ["checkpoint"])
    state = weights(tmp_path / "checkpoint")
    done = f"{state['epoch']} epochs and {state['step']} steps"
    assert run.out.endswith(f"Interrupted by SIGTERM after {done}; checkpoint: checkpoint\n")
    assert Run(tmp_path, *argv).succeed().out.startswith(f"Resuming from checkpoint: {done} are done\n")
    assert equal(weights(tmp_path / "model"), undisturbed[1])


def test_one_of_two_processes_stopped(data, undisturbed, tmp_path):
    argv = ("--data", data, *LONG, *OUTPUTS)
    runs = pytorchjob(tmp_path, 2, *argv)
    runs[0].until("Epoch: 2 ( 12")
    runs[1].process.terminate()
    assert [(run.end(), run.err, files(run.folder)) for run in runs] == [(143, "", ["checkpoint"]), (143, "", [])]
    assert "Resuming" in [run.succeed().out for run in pytorchjob(tmp_path, 2, *argv)][0]
    # To the last bit: two processes add in one order only, a + b, and each draws the same random numbers again.
    assert equal(weights(tmp_path / "0" / "model"), undisturbed[2])


def test_started_again_after_the_end(data, short_run, capsys):
    before = (short_run / "checkpoint").read_bytes()
    model, accuracies = mnist.train(data, 1, 32, lr=0.02, checkpoint=short_run / "checkpoint")
    out = capsys.readouterr().out
    assert "1 epochs and 0 steps are done" in out and "Epoch: " not in out and not model.training
    assert equal(model.state_dict(), weights(short_run / "model"))
    assert f"accuracy={accuracies[0]:.4f}\n" in (short_run / "log.out").read_text()
    assert (short_run / "checkpoint").read_bytes() == before


@pytest.mark.parametrize("changed", "seed=2 batch-size=64 epochs=2 lr=0.03 momentum=0.8 validation=9".split())
def test_checkpoint_of_other_values(changed, short_run, refused):
    made_with, asked = refused(*SHORT, "--checkpoint", short_run / "checkpoint", f"--{changed}").split(", not ")
    name, value = changed.replace("-", "_").split("=")
    assert " was made with {" in made_with and f"'{name}': {value}" in asked


@pytest.mark.parametrize("name", [FILES[0], FILES[1], FILES[3]])
def test_checkpoint_of_other_data(name, data, short_run, tmp_path, refused):
    """Of as many images: the stand-in digits, MNIST and Fashion-MNIST all have 60,000."""
    folder = shutil.copytree(data, tmp_path / "data")
    images, labels = mnist.load(data, name.split("-")[0])
    (folder / name).write_bytes(idx(255 - images[:, 0].numpy() if "images" in name else labels.flip(0)))
    assert " was made with {" in refused(*SHORT, "--checkpoint", short_run / "checkpoint", folder=folder)


@pytest.mark.parametrize("name, value", [("Net", partial(mnist.Net, dropout=(0, 0))), ("MEAN", 0.13), ("STD", 0.31)])
def test_checkpoint_of_another_network(name, value, short_run, refused, monkeypatch):
    monkeypatch.setattr(mnist, name, value)
    assert " was made with {" in refused(*SHORT, "--checkpoint", short_run / "checkpoint")


@pytest.mark.parametrize("name, size", [("checkpoint", 200_000), ("checkpoint", 0), ("model", None)])
def test_damaged_checkpoint_or_model_file(name, size, short_run, tmp_path, refused):
    path = tmp_path / "checkpoint"
    path.write_bytes(before := (short_run / name).read_bytes()[:size])
    err = refused(*SHORT, "--checkpoint", path)
    assert err.startswith(f"mnist.py: {path} is not a valid checkpoint (")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("flag", ["--checkpoint", "--save-model"])
def test_output_that_cannot_be_written(flag, refused, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder", mode=0o555)
    with socket.socket(socket.AF_UNIX) as special:  # for /dev/null, which a fault here would replace
        special.bind("special")
        for path in ("folder", "new/", "new/file", "special"):
            assert refused(flag, path).startswith(f"mnist.py: {path} cannot be written: ")
    assert sorted(os.listdir()) == ["folder", "special"] and not os.path.isfile("special")
    run = Run(tmp_path, "--data", data, flag, "folder/file", setup=drop_capabilities)  # modes do not bind root
    assert (run.end(), run.out) == (1, "") and run.err.startswith("mnist.py: folder/file cannot be written: ")


def test_symbolic_link_stays(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    mnist.save_atomically({"new": 1}, link)
    assert link.readlink() == target and weights(target) == {"new": 1} and len(os.listdir(tmp_path)) == 2


def test_full_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.with_name("file.tmp").symlink_to("/dev/full")
    with pytest.raises(mnist.TrainingError, match=f"^{path} cannot be written: .+$"):
        mnist.save_atomically(mnist.Net().state_dict(), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], "a half-written file fills the disk"


def save_again_and_again():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as autoencoder.py does, at any moment
    for number in range(10**9):
        mnist.save_atomically({"number": number, "values": torch.full((300_000,), number)}, "file")
        print(number, flush=True)


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_killed_while_writing(number, status, tmp_path):
    for attempt in range(4):
        run = Run(tmp_path / str(attempt), target=save_again_and_again).until("\n")
        time.sleep(random.uniform(0, 0.05))
        os.kill(run.process.pid, number)
        assert run.end() == status, run.err
        state = weights(run.folder / "file")
        assert (state["values"] == state["number"]).all()
