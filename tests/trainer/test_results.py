"""What a training results in: each image used once, weights that follow from the flags, accuracies, from Python too."""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

import mnist
from tests.support.data import FILES, TEST, TRAIN, equal, weights
from tests.support.processes import LOG, PROJECT, SHORT, call, python


def pixels(images):
    """Return what an image is known by, wherever the training moves it: the values of its pixels, sorted."""
    return list(map(bytes, images.flatten(1).sort().values))


@pytest.fixture
def seen(monkeypatch):
    """The pixels of the images that the network is given: under True those to train on, under False those to test."""
    seen = {True: [], False: [], "as given": []}

    class Recorder(mnist.Net):
        def forward(self, images):
            seen[self.training] += pixels(images)
            seen["as given"] += images.flatten(1).tolist()
            return super().forward(images)

    monkeypatch.setattr(mnist, "Net", Recorder)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns(dtype, trained, monkeypatch):
    computed_in, forward = set(), mnist.Net.forward
    monkeypatch.setattr(mnist, "precision", lambda device: dtype)
    monkeypatch.setattr(mnist.Net, "forward", lambda *args: (out := forward(*args), computed_in.add(out.dtype))[0])
    out, _ = trained("--epochs", 3, "--batch-size", 16, "--lr", 0.02)
    assert f" with 1 x cpu in {dtype}\n" in out and computed_in == {dtype}
    assert float(re.findall("accuracy=(.*)", out)[-1]) > 0.9


def test_every_image_is_seen_once_an_epoch_in_another_order_and_place(trained, seen, data):
    trained(*SHORT, "--epochs", 2)
    first, second = seen[True][:TRAIN], seen[True][TRAIN:]
    images = mnist.load(data, "train")[0]
    assert sorted(first) == sorted(second) == sorted(pixels(images))
    assert pixels(images) != first != second != pixels(images)
    moved = {way: images.roll(way, (2, 3)).flatten(1).tolist() for way in product((-1, 0, 1), repeat=2)}
    numbers = map(pixels(images).index, first)
    ways = Counter(
        way for number, given in zip(numbers, seen["as given"]) for way in moved if moved[way][number] == given
    )
    assert ways.total() == TRAIN and len(ways) == 9 and min(ways.values()) > TRAIN / 20


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_image_is_tested_once(world, seen, data):
    images, labels = mnist.load(data, "t10k")
    net = mnist.Net()
    results = [mnist.test(net, images, labels, 10, rank, world) for rank in range(world)]
    assert sorted(seen[False]) == sorted(pixels(images))
    one = mnist.test(net, images, labels, 1000)
    assert [sum(parts) for parts in zip(*results)] == pytest.approx(one, abs=1e-3)


def test_validation(data, trained, refused, seen, tmp_path):
    """It trains on all images but N, chosen by the seed, reports on those, and opens no file of the test set."""
    for name in FILES[:2]:
        (tmp_path / f"{name}.gz").symlink_to(data / f"{name}.gz")
    images, held_out = pixels(mnist.load(data, "train")[0]), []
    for seed in (1, 1, 2):
        out, _ = trained(*SHORT, "--seed", seed, "--validation", 50, folder=tmp_path)
        assert f"Training on {TRAIN - 50} images" in out and " val_loss=" in out and "test" not in out
        assert sorted(seen[True] + seen[False]) == sorted(images)
        held_out.append(seen[False])
        seen.update({True: [], False: []})
    assert held_out[0] == held_out[1] and set(held_out[1]) != set(held_out[2])
    assert f"--validation {TRAIN} leaves nothing to train on" in refused(*SHORT, "--validation", TRAIN)


@pytest.mark.parametrize("flag", "--seed=2 --lr=0.01 --momentum=0.5 --batch-size=80 --epochs=2".split())  # 80: 4 steps
def test_flag_changes_the_weights(flag, trained, short_run):
    assert not equal(trained(*SHORT, flag)[1], weights(short_run / "model"))


def test_model_file(short_run, data):
    """It has the mean and the deviation, so that whoever loads it scales images as the training did."""
    saved, net = weights(short_run / "model"), mnist.Net(mean=0.0, std=1.0).eval()
    assert all(values.dtype == torch.float32 and values.is_contiguous() for values in saved.values())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mean", "std"\.'):
        net.load_state_dict({name: saved[name] for name in saved.keys() - {"mean", "std"}})
    net.load_state_dict(saved)
    assert sum(values.numel() for values in net.parameters()) == 80_202
    images, labels = mnist.load(data, "t10k")
    logits = mnist.predict(net, images)
    assert logits.shape == (TEST, 10) and logits.dtype == torch.float32
    net.load_state_dict(saved | {"mean": torch.tensor(0.5)})
    assert not torch.equal(mnist.predict(net, images), logits)
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)  # as that of the training
    accuracy = (logits.argmax(1) == labels).double().mean()
    assert f" test_loss={loss:.4f} accuracy={accuracy:.4f}\n" in (short_run / "log.out").read_text()


def test_dry_run_writes_nothing(data, tmp_path, capsys):
    argv = ("--dry-run", "--checkpoint", tmp_path / "checkpoint", "--save-model", tmp_path / "model")
    assert call("--data", data, *argv) == 0
    out = capsys.readouterr().out
    assert out.count("Epoch: ") == out.count("Epoch: 1 - train_loss=") == 1
    assert os.listdir(tmp_path) == []


def test_train_from_a_thread(data, short_run):
    """No thread but the main one may handle signals."""
    with ThreadPoolExecutor() as threads:
        model, accuracies = threads.submit(mnist.train, data, epochs=1, batch_size=32, lr=0.02).result()
    assert equal(model.state_dict(), weights(short_run / "model")) and not model.training
    assert f"accuracy={accuracies[0]:.4f}\n" in (short_run / "log.out").read_text()


def test_report(data, tmp_path, capsys):
    """It gets what is logged, unrounded, and an epoch's accuracy only when its checkpoint is there to take along."""
    reported, checkpoint = {}, tmp_path / "checkpoint"

    def report(values):
        reported[values.pop("epoch")] = values, checkpoint.exists() and weights(checkpoint)["epoch"]

    settings = dict(epochs=2, batch_size=64, lr=0.02, log_interval=2, checkpoint=checkpoint)
    accuracies = mnist.train(data, **settings, report=report)[1]
    lines = [" ".join(f"{name}={value:.4f}" for name, value in values.items()) for values, _ in reported.values()]
    assert lines == re.findall("^Epoch: .* - (.*)", capsys.readouterr().out, re.M)
    assert [*reported] == [0.4, 0.8, 1, 1.4, 1.8, 2]
    assert [(values["accuracy"], saved) for values, saved in (reported[1], reported[2])] == [*zip(accuracies, (1, 2))]


@pytest.mark.slow
@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR, the folder of the real MNIST files, is not set")
def test_accuracy_on_real_mnist(tmp_path):
    argv = (PROJECT / "mnist.py", "--data", os.environ["MNIST_DIR"], "--epochs", 1)
    done = python(*argv, timeout=600, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(map(LOG.fullmatch, done.stdout.splitlines()))
    assert float(re.search("accuracy=(.*)", done.stdout)[1]) >= 0.99  # the mean of ten seeds is 99.3 %
