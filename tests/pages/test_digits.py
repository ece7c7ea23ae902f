"""The data: a folder, a download from mirrors that may fail, the stand-in."""

import gc
import gzip
import os
import shutil
import socket
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import digits
from torchvision import datasets

import mnist
from mnist import TrainingError
from tests.support.data import FILES, make_data
from tests.support.processes import Run

# torchvision does not close the socket of a mirror's error answer.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
real = pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with the real MNIST")


@pytest.fixture
def no_mnist_dir(monkeypatch):
    monkeypatch.delenv("MNIST_DIR", raising=False)


@pytest.fixture
def mirror(monkeypatch):
    """A function that serves a folder over HTTP as the only mirror of torchvision; it returns what was asked for."""
    servers = []

    def serve(folder):
        asked = []

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        server.handle_error = lambda *args: None  # clients that go away in the middle are what we test
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
    gc.collect()  # torchvision's socket, see pytestmark, while this test is still the one that is blamed


@pytest.fixture
def packed(tmp_path):
    """The four real files as mirrors hold them, gzipped."""
    (tmp_path / "mirror").mkdir()
    for name in FILES:
        shutil.copy(Path(os.environ["MNIST_DIR"], f"{name}.gz"), tmp_path / "mirror")
    return tmp_path / "mirror"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "stand-in"
    digits.make_stand_in(folder)
    return folder


@pytest.mark.slow
def test_the_trainer_learns_from_the_stand_in(stand_in, capsys):
    images, labels = mnist.load(stand_in, "train")
    assert images.shape == (60_000, 1, 28, 28) and labels.bincount(minlength=10).min() > 5000
    assert mnist.load(stand_in, "t10k")[0].shape == (10_000, 1, 28, 28)
    assert mnist.train(stand_in, epochs=1)[1][0] > 0.9


def test_a_folder_is_used_as_it_is(tmp_path, monkeypatch):
    """That of the parameter or that of MNIST_DIR; it is never replaced by something else."""
    folder = make_data(tmp_path / "own")
    assert digits.get_digits(folder) == (folder, "the digits in own, not MNIST")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MNIST_DIR", "~/own")
    assert digits.get_digits() == (folder, "the digits in own, not MNIST")
    (folder / f"{FILES[0]}.gz").unlink()
    for wrong in "~/own", "~nobody-of-this-name/own", "no/such/folder", "o" * 5000, "o/" * 5000:
        monkeypatch.setenv("MNIST_DIR", wrong)
        with pytest.raises(TrainingError, match=FILES[0]):
            digits.get_digits()


@real
def test_real_mnist_is_known(packed):
    assert digits.get_digits(packed).name == "MNIST"
    assert [path.name for path in digits.get_digits(packed).files] == [f"{name}.gz" for name in FILES]
    labels = packed / f"{FILES[3]}.gz"
    labels.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:-1] + b"\0"))  # the last is another
    assert digits.get_digits(packed).name == "the digits in mirror, not MNIST"


@real
@pytest.mark.slow
def test_download(tmp_path, packed, mirror, no_mnist_dir):
    """Once; and anew where the files were damaged."""
    asked, data = mirror(packed), tmp_path / "data"
    assert digits.get_digits(data=data) == (data, "MNIST")
    assert sorted(os.listdir(data)) == [".lock", "MNIST"]
    asked.clear()
    assert digits.get_digits(data=data).name == "MNIST" and not asked
    (data / "MNIST" / "raw" / FILES[0]).write_bytes(b"")
    assert digits.get_digits(data=data).name == "MNIST" and asked


def test_mirrors_that_do_not_answer(tmp_path, no_mnist_dir, monkeypatch, capsys):
    """One is silent, one refuses connections."""
    monkeypatch.setattr(digits, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirrors = [f"http://127.0.0.1:{port}/" for port in (silent.getsockname()[1], 9)]
        monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
        started = time.monotonic()
        assert not digits.download(tmp_path)
        assert time.monotonic() - started < 5
    said = capsys.readouterr().out
    assert f"No MNIST from {mirrors[0]}: timed out" in said and f"No MNIST from {mirrors[1]}: <urlopen error" in said
    assert not list(tmp_path.iterdir()) and socket.getdefaulttimeout() is None


def fetch(data, mirrors):
    """What a page does, in a process of its own."""
    datasets.MNIST.mirrors = mirrors
    print(digits.get_digits(data=data).name)


@real
@pytest.mark.slow
def test_a_killed_download_leaves_nothing_in_the_way_of_two_others(tmp_path, packed, mirror, no_mnist_dir):
    asked, data = mirror(packed), tmp_path / "data"
    target = partial(fetch, data, datasets.MNIST.mirrors)
    killed = Run(tmp_path / "killed", target=target, MNIST_DIR="")
    while len(asked) < 3 and killed.process.is_alive():
        time.sleep(0.01)
    killed.process.kill()
    killed.process.join()
    assert not (data / "MNIST").exists()
    asked.clear()
    both = [Run(tmp_path / name, target=target, MNIST_DIR="") for name in ("one", "other")]
    assert [(run.end(), run.out.splitlines()[-1]) for run in both] == [(0, "MNIST")] * 2
    # By one of them alone: torchvision asks for a redirect first, then for the file.
    assert sum(FILES[0] in path for path in asked) == 2
    assert sorted(os.listdir(data)) == [".lock", "MNIST"]


def test_a_data_folder_that_cannot_be_used(tmp_path, no_mnist_dir):
    (tmp_path / "file").write_text("")
    for data in tmp_path / "file" / "data", tmp_path / ("d" * 300):
        with pytest.raises(TrainingError, match="cannot hold the digits.*MNIST_DIR"):
            digits.get_digits(data=data)
