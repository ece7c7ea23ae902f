"""The data: a folder, a download from mirrors that may fail, the stand-in."""
import gc
import gzip
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision import datasets

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "notebooks")]

import digits  # noqa: E402
from mnist import TrainingError, load  # noqa: E402
from trainer import make_data  # noqa: E402

NAMES = [Path(name).stem for name, _ in datasets.MNIST.resources]
# torchvision does not close the socket of a mirror's error answer.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
real = pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR names no folder with the real MNIST")


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder of stand-in digits, made by digits.py."""
    folder = tmp_path_factory.mktemp("data") / "stand-in"
    digits.make_stand_in(folder)
    return folder


@pytest.fixture
def no_mnist_dir(monkeypatch):
    monkeypatch.delenv("MNIST_DIR", raising=False)


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """A function that serves a folder over HTTP as the only mirror of torchvision; it counts the requests."""
    servers = []

    def serve(folder):
        class Handler(SimpleHTTPRequestHandler):
            requests = []

            def do_GET(self):
                self.requests.append(self.path)
                super().do_GET()

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        server.handle_error = lambda *args: None  # clients that go away in the middle are what we test
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        return Handler.requests

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
    gc.collect()  # torchvision's socket, see pytestmark, while this test is still the one that is blamed


@pytest.fixture
def packed(tmp_path):
    """The four real files as mirrors hold them, gzipped."""
    folder = Path(os.environ["MNIST_DIR"])
    copy = tmp_path / "mirror"
    copy.mkdir()
    for name in NAMES:
        shutil.copy(folder / f"{name}.gz", copy)
    return copy


@pytest.mark.slow
def test_stand_in_looks_like_mnist(stand_in):
    images, labels = load(stand_in, "train")
    scaled = images.float() / 255
    assert f"{scaled.mean():.4f}" == "0.1307"
    assert f"{scaled.std():.4f}" == "0.3081"
    assert images.shape == (60_000, 1, 28, 28)
    assert load(stand_in, "t10k")[0].shape == (10_000, 1, 28, 28)
    assert labels.bincount(minlength=10).min() > 5000
    # Centred by mass: on average the middle of the image, and rarely more than 2 pixels off.
    mass = scaled[:5000, 0] / scaled[:5000, 0].sum((1, 2), keepdim=True)
    centres = torch.stack([(mass.sum(d) * torch.arange(28)).sum(1) for d in (1, 2)])
    assert (centres.mean(1) - 13.5).abs().max() < 0.3
    assert ((centres - 13.5).abs() < 2).float().mean() > 0.95
    assert "not MNIST" in (stand_in / "README.txt").read_text()


@pytest.mark.slow
def test_stand_in_is_made_the_same_each_time(stand_in, tmp_path):
    digits.make_stand_in(tmp_path / "again")
    for name in NAMES:
        assert (tmp_path / "again" / f"{name}.gz").read_bytes() == (stand_in / f"{name}.gz").read_bytes()


@pytest.mark.slow
def test_stand_in_tests_on_digits_that_it_does_not_train_on(stand_in, tmp_path, monkeypatch):
    """With all digits from 1500 on blank, no test image has any ink, and every training image has."""
    source = digits.load_digits()
    source.images[1500:] = 0
    source.images[1500:, 3:5, 3:5] = 1e-3  # not quite: a blank image has no centre of mass
    monkeypatch.setattr(digits, "load_digits", lambda: source)
    digits.make_stand_in(tmp_path / "blank")
    assert load(tmp_path / "blank", "t10k")[0].max() == 0
    assert load(tmp_path / "blank", "train")[0].amax((1, 2, 3)).min() > 100


def test_a_folder_is_used_as_it_is(tmp_path, no_mnist_dir):
    folder = make_data(tmp_path / "own")
    assert digits.get_digits(folder) == (folder, "the digits in own, not MNIST")
    (folder / f"{NAMES[0]}.gz").unlink()
    with pytest.raises(TrainingError, match=NAMES[0]):
        digits.get_digits(folder)


def test_the_environment_names_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MNIST_DIR", str(make_data(tmp_path / "own")))
    assert digits.get_digits() == (tmp_path / "own", "the digits in own, not MNIST")
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "missing"))
    with pytest.raises(TrainingError, match="missing"):
        digits.get_digits()


@real
def test_real_mnist_is_known_gzipped_or_not(packed):
    assert digits.get_digits(packed).name == "MNIST"
    for file in packed.iterdir():
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert digits.get_digits(packed).name == "MNIST"
    labels = packed / NAMES[1]
    labels.write_bytes(labels.read_bytes()[:-1] + b"\0")  # one label changed
    assert digits.get_digits(packed).name == "the digits in mirror, not MNIST"


@real
def test_download_once(tmp_path, packed, mirror, no_mnist_dir):
    requests = mirror(packed)
    data = tmp_path / "data"
    assert digits.get_digits(data=data) == (data, "MNIST")
    assert sorted(os.listdir(data)) == [".lock", "MNIST"]
    requests.clear()
    assert digits.get_digits(data=data).name == "MNIST"
    assert not requests


@real
@pytest.mark.parametrize("damage", [b"", b"not gzip at all"])
def test_damaged_data_are_fetched_again(tmp_path, packed, mirror, no_mnist_dir, damage):
    mirror(packed)
    data = tmp_path / "data"
    digits.get_digits(data=data)
    (data / "MNIST" / "raw" / NAMES[0]).write_bytes(damage)
    assert digits.get_digits(data=data).name == "MNIST"


@real
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_download_that_comes_damaged_leaves_nothing(tmp_path, packed, mirror, no_mnist_dir, damage, capsys):
    file = packed / f"{NAMES[0]}.gz"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-1000] if damage == "truncated" else whole[:-1] + b"?")
    mirror(packed)
    data = tmp_path / "data"
    assert digits.get_digits(data=data) == (data / "stand-in", digits.STAND_IN)
    assert sorted(os.listdir(data)) == [".lock", "stand-in"]
    assert "The download failed" in capsys.readouterr().out
    file.write_bytes(whole)
    assert digits.get_digits(data=data).name == "MNIST"


@pytest.mark.slow
def test_mirrors_that_do_not_answer_cost_10_seconds_at_most(tmp_path, no_mnist_dir, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as other:
        mirrors = [f"http://127.0.0.1:{server.getsockname()[1]}/" for server in (silent, other)]
        monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
        started = time.monotonic()
        assert not digits.download(tmp_path)
        assert 7 < time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())


def test_refused_connections_cost_nothing(tmp_path, no_mnist_dir, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    started = time.monotonic()
    assert not digits.download(tmp_path)
    assert time.monotonic() - started < 2
    assert "http://127.0.0.1:9/ does not answer" in capsys.readouterr().out


SCRIPT = """
import sys
sys.path[:0] = [{project!r}, {notebooks!r}]
from pathlib import Path
from torchvision import datasets
import digits
datasets.MNIST.mirrors = {mirrors!r}
print(digits.get_digits(data=Path(sys.argv[1])).name)
"""


def start(data):
    script = SCRIPT.format(project=str(PROJECT), notebooks=str(PROJECT / "notebooks"), mirrors=datasets.MNIST.mirrors)
    return subprocess.Popen([sys.executable, "-c", script, str(data)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


@real
@pytest.mark.slow
def test_two_downloads_at_once(tmp_path, packed, mirror, no_mnist_dir):
    requests = mirror(packed)
    both = [start(tmp_path / "data") for _ in range(2)]
    assert [process.communicate(timeout=120)[0].splitlines()[-1] for process in both] == ["MNIST", "MNIST"]
    asked = [path for path in requests if NAMES[0] in path]
    assert len(asked) == 2  # by one of them alone: torchvision asks for a redirect first, then for the file


@real
@pytest.mark.slow
def test_a_killed_download_leaves_nothing_in_the_way(tmp_path, packed, mirror, no_mnist_dir):
    data = tmp_path / "data"
    requests = mirror(packed)
    process = start(data)
    while len(requests) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (data / "MNIST").exists() or digits.is_mnist(data)
    assert digits.get_digits(data=data).name == "MNIST"
    assert sorted(os.listdir(data)) == [".lock", "MNIST"]


def test_a_data_folder_that_cannot_be_made(tmp_path, no_mnist_dir):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot hold the digits.*MNIST_DIR"):
        digits.get_digits(data=tmp_path / "file" / "data")
