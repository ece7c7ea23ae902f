"""The trainer in one process: its command line, the errors that it tells, what it logs, writes and learns."""
import contextlib
import gzip
import os
import re
import resource
import runpy
import shutil
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from trainer import (FILES, LOG, ROOT, TEST, TRAIN, Run, call, equal, free_port, idx, make_data,
                     mnist, powerless, python, weights)

QUICK = ("--epochs", 1, "--batch-size", 64, "--lr", 0.02)  # 5 steps on the small data
SCHEDULED = ("--epochs", 3, "--batch-size", 16, "--lr", 0.02)  # enough to learn it


@pytest.fixture(autouse=True)
def impatience(one_process, monkeypatch):
    """No minutes of waiting for other processes."""
    monkeypatch.setattr(mnist, "TIMEOUT", timedelta(seconds=10))


@pytest.fixture
def trained(data, tmp_path, capsys):
    """Train with the given arguments; return the log and the weights."""
    def trained(*argv, folder=data):
        model = tmp_path / "model.pt"
        status = call("--data", folder, "--save-model", model, *argv)
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out, weights(model)
    return trained


@pytest.fixture
def refused(data, capsys):
    """Run with arguments that end with exit status 1 and one line on standard error; return that line."""
    def refused(*argv, folder=data):
        status = call("--data", folder, *argv)
        out, err = capsys.readouterr()
        assert status == 1, err
        assert "Epoch" not in out, "trained before the error"
        assert err.startswith("mnist.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err
    return refused


# Wrong usage

WRONG = [
    *((flag, value) for flag in ("--epochs", "--batch-size", "--test-batch-size", "--log-interval")
      for value in ("0", "-1", "1.5", "many", "nan", "")),
    *(("--lr", value) for value in ("0", "-0.1", "nan", "inf", "-inf", "fast", "")),
    *(("--momentum", value) for value in ("-0.1", "1", "1.5", "nan", "inf", "heavy", "")),
    *(("--seed", value) for value in ("-1", str(2**63), "0.5", "nan", "lucky", "")),
    ("--backend", "mpi"), ("--backend", ""),
]


@pytest.mark.parametrize("flag, value", WRONG)
def test_wrong_value(flag, value, data, capsys):
    assert call("--data", data, f"{flag}={value}") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert flag.strip("-") in err.replace("_", "-") and value in err


@pytest.mark.parametrize("argv", [["--bogus"], ["--epoch", "1"], ["--no-cud"], ["--dry"], ["--save", "m"], ["extra"]])
def test_unknown_or_abbreviated_flag(argv, data, capsys):
    assert call("--data", data, *argv) == 2
    assert f"unrecognized arguments: {' '.join(argv)}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--epochs", "--data", "--checkpoint", "--save-model"])
def test_missing_value(flag, capsys):
    assert call(flag) == 2
    assert f"argument {flag}: expected one argument" in capsys.readouterr().err


def test_one_path_for_checkpoint_and_model(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("--data", data, "--checkpoint", tmp_path / "file", "--save-model", "file") != 0
    assert "file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Data

@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data to break."""
    return shutil.copytree(data, tmp_path / "data")


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name, broken, refused):
    (broken / f"{name}.gz").unlink()
    assert f"{name}[.gz] is not in {broken}" in refused(folder=broken)


def test_missing_folder(tmp_path, refused):
    assert str(tmp_path / "nowhere") in refused(folder=tmp_path / "nowhere")


def whole(name):
    return idx([[[0] * 28] * 28] * TRAIN) if "images" in name else idx([0] * TRAIN)


DAMAGE = dict(
    truncated=lambda name: gzip.compress(whole(name))[:-20],
    short_by_a_byte=lambda name: gzip.compress(whole(name))[:-1],
    garbage=lambda name: b"<html>404</html>" * 100,
    empty=lambda name: b"",
    unpacked_empty=lambda name: gzip.compress(b""),
    header_only=lambda name: gzip.compress(whole(name)[:8]),
    no_items=lambda name: gzip.compress(idx([[[0] * 28] * 28][:0]) if "labels" in name else idx([[[0] * 28] * 0])),
    magic=lambda name: gzip.compress(b"\0\0\x0d" + whole(name)[3:]),  # floats instead of bytes
    one_byte_less=lambda name: gzip.compress(whole(name)[:-1]),
    one_byte_more=lambda name: gzip.compress(whole(name) + b"\0"),
    other_kind=lambda name: gzip.compress(whole(FILES[1] if "images" in name else FILES[0])),
    other_size=lambda name: gzip.compress(idx([[[0] * 27] * 28] * 28)),
)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES[:2])
def test_damaged_file(damage, name, broken, refused):
    path = broken / f"{name}.gz"
    path.write_bytes(DAMAGE[damage](name))
    assert str(path) in refused(folder=broken)


@pytest.mark.parametrize("name", FILES)
def test_damaged_raw_file(name, broken, refused):
    (broken / name).write_bytes(b"")  # it goes before the gzipped one, so that nobody trains on what they did not mean
    assert str(broken / name) in refused(folder=broken)


@pytest.mark.parametrize("labels, count", [([0] * (TRAIN - 1), f"{TRAIN - 1} labels"), ([0] * TRAIN + [1], "labels"),
                                           ([10] * TRAIN, "10")])
def test_labels_that_do_not_fit(labels, count, broken, refused):
    (broken / f"{FILES[1]}.gz").write_bytes(gzip.compress(idx(labels)))
    err = refused(folder=broken)
    assert str(broken) in err and "train" in err and count in err


def test_every_layout_is_the_same_data(tmp_path, trained):
    folders = [make_data(tmp_path / "gz"), make_data(tmp_path / "raw", gz=False)]
    for name, gz in (("torchvision", False), ("torchvision-gz", True)):
        make_data(tmp_path / name / "MNIST" / "raw", gz=gz)
        folders.append(tmp_path / name)
    logs = {tuple(trained(*QUICK, folder=folder)[0].splitlines()[:-1]) for folder in folders}  # the last: the time
    assert len(logs) == 1


# Output files

@pytest.mark.parametrize("flag", ["--checkpoint", "--save-model"])
def test_output_that_cannot_be(flag, tmp_path, refused):
    for path in (tmp_path, tmp_path / "nowhere" / "file"):
        assert f"{path} cannot be written" in refused(flag, path)


@pytest.mark.parametrize("flag", ["--checkpoint", "--save-model"])
def test_read_only_folder(flag, data, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    run = Run(tmp_path, *QUICK, "--data", data, flag, folder / "file", setup=powerless)  # modes do not bind root
    assert (run.end(), run.out) == (1, "")
    assert run.err.startswith(f"mnist.py: {folder / 'file'} cannot be written") and run.err.count("\n") == 1


@contextlib.contextmanager
def disk_full_at(size):
    """Let no file grow beyond a size, as a full disk does."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


@pytest.mark.parametrize("size", [0, 1000, 700_000])
@pytest.mark.parametrize("flag", ["--checkpoint", "--save-model"])
def test_full_disk(flag, size, data, tmp_path, capsys, monkeypatch):
    path = tmp_path / "file"
    if flag == "--checkpoint":
        with monkeypatch.context() as patch:
            patch.setattr(mnist.Net, "train", lambda net, mode=True: signal.raise_signal(signal.SIGTERM))
            assert call("--data", data, *QUICK, flag, path) == 143  # after no step: there is something to add
    else:
        path.write_bytes(b"an old model")
    before = path.read_bytes()
    with disk_full_at(size):
        status = call("--data", data, *QUICK, flag, path)
    err = capsys.readouterr().err
    assert status == 1 and f"{path} cannot be written" in err and err.count("\n") == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file"], "a half-written file fills the disk"


@pytest.fixture(scope="session")
def outputs(data, tmp_path_factory):
    """The checkpoint and the model file of a finished run with QUICK."""
    folder = tmp_path_factory.mktemp("outputs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call("--data", data, *QUICK, "--checkpoint", folder / "checkpoint", "--save-model", folder / "model")
    torch.set_num_threads(threads)
    return folder


TORN = dict(
    empty=lambda good, model: b"",
    garbage=lambda good, model: b"not a checkpoint\n" * 1000,
    first_half=lambda good, model: good[:len(good) // 2],
    short_by_a_byte=lambda good, model: good[:-1],
    second_half=lambda good, model: good[len(good) // 2:],
    zeros=lambda good, model: bytes(len(good)),
    model_file=lambda good, model: model,
)


@pytest.mark.parametrize("tear", TORN)
def test_torn_checkpoint(tear, outputs, tmp_path, refused):
    path = tmp_path / "checkpoint"
    torn = TORN[tear](*((outputs / name).read_bytes() for name in ("checkpoint", "model")))
    path.write_bytes(torn)
    assert f"{path} is no whole checkpoint" in refused(*QUICK, "--checkpoint", path)
    assert path.read_bytes() == torn and os.listdir(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("flag, made_with, value", [("--seed", 1, 2), ("--batch-size", 64, 63), ("--epochs", 1, 2),
                                                    ("--lr", 0.02, 0.03), ("--momentum", 0.9, 0.8)])
def test_checkpoint_of_another_run(flag, made_with, value, outputs, tmp_path, refused):
    path = shutil.copy(outputs / "checkpoint", tmp_path)
    before = (outputs / "checkpoint").read_bytes()
    err = refused(*QUICK, "--checkpoint", path, flag, value)
    name = flag.strip("-").replace("-", "_")
    assert f"{path} was made with {{'{name}': {made_with}}}, not {{'{name}': {value}}}" in err
    assert (tmp_path / "checkpoint").read_bytes() == before


def test_checkpoint_of_other_data(outputs, tmp_path, refused):
    path = shutil.copy(outputs / "checkpoint", tmp_path)
    err = refused(*QUICK, "--checkpoint", path, folder=make_data(tmp_path / "data", train=TRAIN + 64))
    assert str(path) in err and str(TRAIN) in err


# What a launcher's variables may say

@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_variables(missing, refused, monkeypatch):
    variables = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(missing, "")
    assert f"mnist.py: {missing} not set" in refused(*QUICK)
    monkeypatch.delenv(missing)
    assert f"mnist.py: {missing} not set" in refused(*QUICK)


@pytest.mark.parametrize("name, value", [("RANK", "first"), ("RANK", "-1"), ("RANK", "3"), ("RANK", "1.0"),
                                         ("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "-1"),
                                         ("LOCAL_RANK", "x"), ("LOCAL_RANK", "-1"),
                                         ("MASTER_PORT", "http"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "-1")])
def test_wrong_variable(name, value, refused, monkeypatch):
    variables = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for item in {**variables, name: value}.items():
        monkeypatch.setenv(*item)
    err = refused(*QUICK)
    assert value in err and (f"{name}=" in err or f":{value}" in err)


def test_nccl_without_cuda(refused):
    assert "--backend nccl needs CUDA" in refused("--backend", "nccl", "--no-cuda", *QUICK)


def test_one_process_with_a_launcher_is_the_same(trained, monkeypatch):
    alone = trained(*QUICK)[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    assert equal(trained(*QUICK)[1], alone)
    assert not dist.is_initialized()


# As a user starts it

@pytest.mark.slow
def test_from_anywhere_with_data_beside_it(tmp_path):
    home, away = tmp_path / "with a space", tmp_path / "away"
    away.mkdir()
    make_data(home / "data")
    shutil.copy(ROOT / "mnist.py", home)
    argv = ("-W", "error", home / "mnist.py", *QUICK, "--checkpoint", "c.pt", "--save-model", "m.pt")
    done = python(*argv, cwd=away)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(map(LOG.fullmatch, done.stdout.splitlines()))
    assert sorted(os.listdir(away)) == ["c.pt", "m.pt"]


# Results

def test_net():
    net = mnist.Net()
    assert sum(values.numel() for values in net.parameters()) == 184_586
    assert [len(list(part.parameters())) for part in net] == [2, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 2]
    assert net(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    logits = mnist.predict(net, torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    assert logits.shape == (3, 10) and logits.dtype == torch.float32


def test_log(trained):
    out, _ = trained(*SCHEDULED, "--epochs", 2, "--log-interval", 8)
    lines = out.splitlines()
    assert all(map(LOG.fullmatch, lines))
    assert lines[0].startswith(f"Training on {TRAIN} images with 1 x cpu in ")
    assert [line.split(" -")[0] for line in lines if line.startswith("Epoch")] == [
        f"Epoch: {epoch} ({part}%)" for epoch in (1, 2) for part in (" 40.0", " 80.0", "100.0")]
    for epoch in (0, 1):  # the test's lines follow one another
        counted, loss, accuracy = lines[4 + 6 * epoch:7 + 6 * epoch]
        right = int(re.match(rf"Test accuracy: (\d+)/{TEST} ", counted)[1])
        assert f"({right / TEST:6.1%})" in counted and accuracy == f"accuracy={right / TEST:.4f}"
        assert loss.startswith("loss=")
    assert lines[4] != lines[10], "two epochs that cannot be told apart prove nothing"
    assert lines[-1].startswith("Trained in ")


def losses(out):
    return [float(loss) for loss in re.findall(r"- Loss: (.*)", out)]


def test_logged_loss_is_the_mean_since_the_last_line(trained):
    each = losses(trained(*QUICK, "--log-interval", 1)[0])
    assert len(each) == 5
    by_three = losses(trained(*QUICK, "--log-interval", 3)[0])
    assert by_three == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 2], abs=1e-4)
    assert losses(trained(*QUICK)[0]) == pytest.approx([sum(each) / 5], abs=1e-4)


def test_it_learns(trained):
    out, _ = trained(*SCHEDULED, "--log-interval", 5)
    assert losses(out)[0] > 2 and losses(out)[-1] < 0.3
    assert float(re.findall(r"^accuracy=(.*)", out, re.M)[-1]) > 0.9


@pytest.mark.slow
def test_every_image_is_seen_once_an_epoch_in_another_order(trained, data, monkeypatch):
    seen = []

    class Net(mnist.Net):
        def forward(self, images):
            if self.training:
                seen.extend(map(bytes, ((images * mnist.STD + mnist.MEAN) * 255).round().byte().flatten(1)))
            return super().forward(images)
    monkeypatch.setattr(mnist, "Net", Net)
    trained(*QUICK, "--epochs", 2)
    first, second = seen[:TRAIN], seen[TRAIN:]
    images = list(map(bytes, mnist.load(data, "train")[0].flatten(1)))
    assert sorted(first) == sorted(second) == sorted(images)
    assert images != first != second != images


def test_same_seed_same_weights(trained):
    first = trained(*QUICK)[1]
    assert equal(trained(*QUICK)[1], first)
    assert not equal(trained(*QUICK, "--seed", 2)[1], first)


@pytest.mark.parametrize("flag, value", [("--lr", 0.01), ("--momentum", 0), ("--momentum", 0.5), ("--batch-size", 32),
                                         ("--epochs", 2)])
def test_flag_changes_the_weights(flag, value, trained, outputs):
    assert not equal(trained(*QUICK, flag, value)[1], weights(outputs / "model"))


def test_test_batch_size_changes_nothing(trained, outputs):
    for size in (1, 52, 54, 10**9):
        out, model = trained(*QUICK, "--test-batch-size", size)
        assert equal(model, weights(outputs / "model"))
        results = [float(value) for value in re.findall(r"^(?:loss|accuracy)=(.*)", out, re.M)]
        assert results == pytest.approx([float(value) for value in re.findall(
            r"^(?:loss|accuracy)=(.*)", trained(*QUICK)[0], re.M)], abs=2e-4)


def test_model_file(trained, data):
    out, saved = trained(*SCHEDULED)
    assert type(saved) in (dict, type(mnist.Net().state_dict()))
    assert all(values.dtype == torch.float32 and values.is_contiguous() for values in saved.values())
    net = mnist.Net().eval()
    net.load_state_dict(saved, strict=True)
    images, labels = mnist.load(data, "t10k")
    with torch.inference_mode():
        logits = mnist.predict(net, images)
    assert re.findall(r"Test accuracy: (\d+)/", out)[-1] == str((logits.argmax(1) == labels).sum().item())
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert float(re.findall(r"^loss=(.*)", out, re.M)[-1]) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 6])  # OneCycleLR divides by zero with 4 steps and a quarter rising
def test_few_steps(total, trained):
    size = -(-TRAIN // total)
    _, model = trained("--epochs", 1, "--batch-size", size, "--lr", 0.02)
    assert all(values.isfinite().all() for values in model.values())


def test_batch_larger_than_the_data(trained):
    assert equal(trained(*QUICK, "--batch-size", TRAIN)[1], trained(*QUICK, "--batch-size", 10**30)[1])


def test_dry_run_writes_nothing(data, outputs, tmp_path, capsys):
    argv = ("--data", data, *QUICK, "--dry-run", "--checkpoint", tmp_path / "c", "--save-model", tmp_path / "m")
    assert call(*argv, "--epochs", 5) == 0
    assert os.listdir(tmp_path) == []
    out = capsys.readouterr().out
    assert out.count("Epoch: ") == 1 and "Epoch: 1 (100.0%)" in out
    before = (outputs / "checkpoint").read_bytes()
    assert call("--data", data, *QUICK, "--dry-run", "--checkpoint", outputs / "checkpoint", "--seed", 5) == 0
    assert (outputs / "checkpoint").read_bytes() == before


# From Python

def test_import_has_no_side_effect(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def state():
        return (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), dist.is_initialized(),
                threading.active_count(), torch.get_rng_state().tolist(), dict(os.environ), os.listdir(tmp_path))
    before = state()
    runpy.run_path(str(ROOT / "mnist.py"), run_name="mnist")
    assert state() == before
    assert capfd.readouterr() == ("", "")


def settings():
    return dict(epochs=1, batch_size=64, lr=0.02)


def test_train_returns_model_and_accuracies(data, trained, capsys):
    model, accuracies = mnist.train(data, **settings())
    logged = re.findall(r"^accuracy=(.*)", capsys.readouterr().out, re.M)
    assert [f"{accuracy:.4f}" for accuracy in accuracies] == logged
    assert equal(model.state_dict(), trained(*QUICK)[1])
    assert not model.training


def test_finished_run_returns_the_same(data, outputs, capsys):
    model, accuracies = mnist.train(data, checkpoint=outputs / "checkpoint", **settings())
    assert equal(model.state_dict(), weights(outputs / "model"))
    assert re.findall(r"^accuracy=(.*)", capsys.readouterr().out, re.M) == [f"{accuracies[-1]:.4f}"]
    assert not model.training, "dropout would go on"


def test_train_from_a_thread(data, outputs):
    before = signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(mnist.train(data, **settings())))
    thread.start()
    thread.join()
    assert equal(results[0][0].state_dict(), weights(outputs / "model"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_handler_is_put_back(data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert (call("--data", data, *QUICK, "--dry-run"), call("--data", tmp_path), call("--epochs", 0)) == (0, 1, 2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_process_group_of_the_caller_stays(data):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mnist.train(data, dry_run=True)
        assert dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_errors_from_python(data, tmp_path, monkeypatch):
    for wrong in (dict(epochs=0), dict(batch_size=-1), dict(lr=float("nan")), dict(momentum=1), dict(seed=-1)):
        with pytest.raises(ValueError, match=str(*wrong)):
            mnist.train(data, **wrong)
    with pytest.raises(TypeError):
        mnist.train(data, bogus=1)
    with pytest.raises(mnist.TrainingError, match="is not in"):
        mnist.train(tmp_path)
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(mnist.TrainingError, match="is not in"):
        mnist.train(tmp_path)
    assert not dist.is_initialized()


def test_report(data, tmp_path, capsys):
    """It gets what is logged, unrounded, and an epoch's accuracy only when its checkpoint is there to take along."""
    reported, checkpoint = [], tmp_path / "run.pt"

    def report(values):
        done = torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.exists() else 0
        reported.append((done, values))

    _, accuracies = mnist.train(data, epochs=2, batch_size=64, lr=0.02, log_interval=2, checkpoint=checkpoint,
                                report=report)
    out = capsys.readouterr().out
    losses = [(epoch, values) for epoch, values in reported if "loss" in values]
    tests = [(epoch, values) for epoch, values in reported if "accuracy" in values]
    assert [f"{values['loss']:.4f}" for _, values in losses] == re.findall(r"- Loss: (\S+)", out)
    assert [values["epoch"] for _, values in losses] == pytest.approx([0.4, 0.8, 1, 1.4, 1.8, 2])
    assert [f"{values['test_loss']:.4f}" for _, values in tests] == re.findall(r"^loss=(\S+)", out, re.MULTILINE)
    assert [(epoch, values["epoch"], values["accuracy"]) for epoch, values in tests] == [
        (1, 1, accuracies[0]), (2, 2, accuracies[1])]
    assert len(losses) + len(tests) == len(reported) == 8
