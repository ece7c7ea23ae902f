"""The digits that the pages train on: MNIST, from a folder or downloaded, or else a stand-in of the same format."""

import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from mnist import DATA, TrainingError, find_file, load
from support.page import lock

TIMEOUT = 8  # seconds for a mirror to send its next bytes
MNIST_MD5 = "bd3808b2414328cf71cc2764408ae4c5"  # of the values, not of the gzip files, which differ from copy to copy


class Digits(NamedTuple):
    """The folder of the four files, and what to call them: "MNIST" only if they are."""

    folder: Path
    name: str

    @property
    def files(self):
        """The paths of the four files."""
        kinds = "images-idx3", "labels-idx1"
        return [find_file(self.folder, f"{split}-{kind}-ubyte") for split in ("train", "t10k") for kind in kinds]


def get_digits(folder: str | Path = "", data: Path = DATA) -> Digits:
    """Return the Digits of a folder, or of MNIST_DIR, or else MNIST below data, downloaded there at the first call.

    Where no mirror answers it is the stand-in, made below data. Raises TrainingError if a folder that was asked for
    lacks a file or holds a damaged one: it is never replaced by something else.
    """
    if folder := folder or os.environ.get("MNIST_DIR"):
        folder = Path(os.path.expanduser(folder)).absolute()
        return Digits(folder, "MNIST" if is_mnist(folder) else f"the digits in {folder.name}, not MNIST")
    try:
        data.mkdir(parents=True, exist_ok=True)
        with lock(data / ".lock"):  # several pages may start at once
            with contextlib.suppress(TrainingError):  # a file is missing or damaged
                if is_mnist(data):
                    return Digits(data, "MNIST")
            if download(data):
                return Digits(data, "MNIST")
            if not (data / "stand-in").exists():
                make_stand_in(data / "stand-in")
            return Digits(data / "stand-in", "stand-in digits, not MNIST")
    except OSError as error:
        raise TrainingError(f"{data} cannot hold the digits: {error}; set MNIST_DIR to a folder that does") from error


def is_mnist(folder: Path) -> bool:
    """Tell whether the four files hold MNIST, value for value; raise TrainingError if one is missing or damaged."""
    values = load(folder, "train") + load(folder, "t10k")
    return hashlib.md5(b"".join(value.byte().numpy().tobytes() for value in values)).hexdigest() == MNIST_MD5


def download(data: Path) -> bool:
    """Fetch MNIST to data/MNIST/raw by torchvision and return True, or False, with nothing changed, if that fails."""
    from torchvision import datasets  # takes seconds to import, and is needed only here

    partial, timeout = data / "MNIST.partial", socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        for mirror in datasets.MNIST.mirrors:  # torchvision's own loop ends at the first that is silent
            try:
                shutil.rmtree(partial, ignore_errors=True)
                type("MNIST", (datasets.MNIST,), {"mirrors": [mirror]})(partial, download=True)
                shutil.rmtree(data / "MNIST", ignore_errors=True)
                (partial / "MNIST").rename(data / "MNIST")
                return True
            except Exception as error:  # of sockets, HTTP, gzip, torchvision
                print(f"No MNIST from {mirror}: {(str(error).splitlines() or [type(error).__name__])[-1]}")
        return False
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(partial, ignore_errors=True)


def make_stand_in(folder: Path, seed: int = 1) -> None:
    """Make the four files of a data set like MNIST, 60,000 and 10,000 images, from scikit-learn's 1,797 digits of 8x8.

    The test images come from the last 297, by other writers for the most part, and the training images from the others.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for split, first, end, count in ("train", 0, 1500, 60_000), ("t10k", 1500, 1797, 10_000):
        chosen = torch.randint(first, end, (count,), generator=generator)
        varied = torch.cat([vary(images[part], generator) for part in chosen.split(5000)])
        write_idx(partial / f"{split}-images-idx3-ubyte.gz", varied)
        write_idx(partial / f"{split}-labels-idx1-ubyte.gz", labels[chosen])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def vary(images, generator):
    """Return images (N, 8, 8) of values 0..1 enlarged to (N, 28, 28) of 0..255, each turned, scaled and moved."""
    turn, size, right, down = 2 * torch.rand(4, len(images), generator=generator) - 1  # each from -1 to 1
    angle, scale = 0.3 * turn, 1.4 + 0.2 * size  # 1.4: the digit spans 20 of the 28 pixels, as in MNIST
    cos, sin = scale * angle.cos(), scale * angle.sin()
    moves = torch.stack([cos, -sin, 0.15 * right, sin, cos, 0.15 * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(moves, (len(images), 1, 28, 28), align_corners=False)
    varied = F.grid_sample(images.unsqueeze(1), grid, mode="bicubic", align_corners=False)
    return (255 * varied.squeeze(1).clamp(0, 1)).round()


def write_idx(path, values):
    """Write a tensor of values 0..255 as a gzipped IDX file, the same bytes each time."""
    header = struct.pack(f">{1 + values.dim()}i", 0x800 + values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + values.byte().numpy().tobytes(), compresslevel=1, mtime=0))
