"""The digits that the pages train on: MNIST, from a folder or downloaded, or else a stand-in of the same format."""
import gzip
import hashlib
import os
import shutil
import socket
import struct
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from scipy.optimize import brentq
from sklearn.datasets import load_digits

from mnist import MEAN, STD, TrainingError, find, load

DATA = Path(__file__).resolve().parents[1] / "data"
PATIENCE = 8  # seconds for a mirror to send its next bytes
STAND_IN = "stand-in digits, not MNIST"
# MD5 of the values of the training images and labels and the test images and labels. (torchvision's checksums are of
# the gzip files, which differ from copy to copy of the same data.)
MNIST_MD5 = ["6510e85a72c3e9475c492d559d3770d2", "e86ee40d66677c011a9abda399ec8c4d",
             "240610fa99e73bfa49df8e7fc24d3206", "073c3904dfbd3e141ff8aa01cfde6b15"]


class Digits(NamedTuple):
    """The folder of the four files, and what to call them: "MNIST" only if they are."""

    folder: Path
    name: str

    @property
    def files(self):
        """The paths of the four files."""
        return [find(self.folder, f"{split}-{what}-ubyte")
                for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def get_digits(folder="", data=DATA):
    """Return the Digits of a folder, or of MNIST_DIR, or else MNIST below data, downloaded there at the first call.

    Where no mirror answers within 10 s it is the stand-in, made below data. Raises TrainingError if a folder that was
    asked for lacks a file or holds a torn one: it is never replaced by something else.
    """
    folder = folder or os.environ.get("MNIST_DIR")
    if folder:
        folder = Path(folder).expanduser().absolute()
        return Digits(folder, "MNIST" if is_mnist(folder) else f"the digits in {folder.name}, not MNIST")
    try:
        data.mkdir(parents=True, exist_ok=True)
        with FileLock(data / ".lock"):  # several pages may start at once
            if found(data) or download(data):
                return Digits(data, "MNIST")
            if found(data / "stand-in") is None:
                make_stand_in(data / "stand-in")
            return Digits(data / "stand-in", STAND_IN)
    except OSError as error:
        raise TrainingError(f"{data} cannot hold the digits: {error}; set MNIST_DIR to a folder that does") from error


def is_mnist(folder):
    """Tell whether the four files hold MNIST, value for value; raise TrainingError if one is missing or torn."""
    values = load(folder, "train") + load(folder, "t10k")
    return [hashlib.md5(value.byte().numpy()).hexdigest() for value in values] == MNIST_MD5


def found(folder):
    """Tell what is_mnist tells, or None if a file is missing or torn."""
    try:
        return is_mnist(folder)
    except TrainingError:
        return None


def download(data):
    """Fetch MNIST to data/MNIST/raw by torchvision and return True, or False, with nothing changed, if that fails."""
    from torchvision import datasets  # takes seconds to import, and is needed only here

    name = datasets.MNIST.resources[3][0]
    answering = []

    def ask(mirror):
        try:
            with urllib.request.urlopen(mirror + name, timeout=PATIENCE) as answer:
                answer.read(1)
            answering.append(mirror)
        except (OSError, ValueError) as error:
            print(f"{mirror} does not answer: {getattr(error, 'reason', error)}")

    # Threads, because looking a name up has no time limit of its own; daemons, so that none is waited for at the end.
    threads = [threading.Thread(target=ask, args=[mirror], daemon=True) for mirror in datasets.MNIST.mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    mirrors = [mirror for mirror in datasets.MNIST.mirrors if mirror in answering]
    if not mirrors:
        return False

    class MNIST(datasets.MNIST):  # only the mirrors that answered
        pass

    MNIST.mirrors = mirrors
    partial, before = data / "MNIST.partial", socket.getdefaulttimeout()
    shutil.rmtree(partial, ignore_errors=True)
    socket.setdefaulttimeout(PATIENCE)
    try:
        MNIST(partial, download=True)
        if not is_mnist(partial):
            raise TrainingError("what came is not MNIST")
        shutil.rmtree(data / "MNIST", ignore_errors=True)
        os.rename(partial / "MNIST", data / "MNIST")
    except (OSError, RuntimeError, TrainingError) as error:
        print(f"The download failed: {error}")
        return False
    finally:
        socket.setdefaulttimeout(before)
        shutil.rmtree(partial, ignore_errors=True)
    return True


def make_stand_in(folder, seed=1):
    """Make the four files of a data set that looks like MNIST, from the 1,797 digits of 8x8 of scikit-learn.

    As in MNIST there are 60,000 and 10,000 images of 28x28 with the digit in the middle 20x20, centred by mass, and
    the training images have the mean 0.1307 and the standard deviation 0.3081. The test images come from digits (the
    last 297, by other writers for the most part) that no training image comes from.
    """
    generator = torch.Generator().manual_seed(seed)
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32) / 16
    labels = torch.tensor(source.target, dtype=torch.uint8)
    sets = {}
    for split, digits, count in (("train", range(1500), 60_000), ("t10k", range(1500, 1797), 10_000)):
        chosen = torch.randint(digits.start, digits.stop, (count,), generator=generator)
        sets[split] = torch.cat([bend(images[part], generator) for part in chosen.split(5000)]), labels[chosen]
    stretch = contrast(torch.bincount(sets["train"][0].flatten(), minlength=LEVELS))

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for split, (pixels, labels) in sets.items():
        for name, values in ("images-idx3", stretch[pixels]), ("labels-idx1", labels):
            header = struct.pack(f">{1 + values.dim()}i", 0x800 + values.dim(), *values.shape)
            packed = gzip.compress(header + values.numpy().tobytes(), compresslevel=1, mtime=0)
            (partial / f"{split}-{name}-ubyte.gz").write_bytes(packed)
    (partial / "README.txt").write_text(f"These are {STAND_IN}, made by notebooks/digits.py.\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)


LEVELS = 4096  # shades of grey before the contrast is stretched


def bend(images, generator):
    """Return images (N, 8, 8) as shades 0..LEVELS - 1 (N, 28, 28), each turned, slanted, scaled, moved and bent."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    # Where each of the 28x28 pixels lies in the 8x8 image, in grid_sample's units: -1 and 1 are the image's edges. The
    # 20 pixels in the middle span the image.
    turn, slant, width, height = uniform(-.25, .25), uniform(-.3, .3), uniform(.85, 1.2), uniform(.9, 1.1)
    turned = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    slanted = torch.stack([width, slant, torch.zeros_like(slant), height], 1).view(-1, 2, 2)
    pixels = (torch.arange(28) - 13.5) / 10
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), 2).view(1, -1, 2) @ (turned @ slanted).mT
    smooth = F.interpolate(torch.eye(5)[None, None], (28, 5), mode="bicubic", align_corners=True)
    waves = smooth @ uniform(-.16, .16, 2, 5, 5) @ smooth.mT
    # The centre of mass of the digit comes to the centre of the image, give or take a pixel.
    axis = (torch.arange(8) - 3.5) / 4
    mass = images / images.sum((1, 2), keepdim=True)
    centre = torch.stack([(mass.sum(1) * axis).sum(1), (mass.sum(2) * axis).sum(1)], 1) + uniform(-.05, .05, 2)
    grid = (grid + centre[:, None] + waves.flatten(2).mT).view(-1, 28, 28, 2)
    bent = F.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)
    return (bent.clamp(0, 1) * (LEVELS - 1)).round().int().squeeze(1)


def contrast(counts):
    """Return the grey value 0..255 for each of LEVELS shades that gives the pixels the mean and deviation of MNIST.

    counts: how many pixels have each shade (LEVELS,). The shades from low to low + width are stretched over 0..255.
    """
    shades = torch.arange(LEVELS) / (LEVELS - 1)
    share = counts / counts.sum(dtype=torch.float64)

    def stretched(low, width):
        return (255 * ((shades - low) / width).clamp(0, 1)).round().to(torch.uint8)

    def mean(low, width):
        return (share * stretched(low, width)).sum().item() / 255

    def deviation(low, width):
        return ((share * (stretched(low, width) / 255.) ** 2).sum().item() - mean(low, width) ** 2) ** .5

    def low_for(width):
        return brentq(lambda low: mean(low, width) - MEAN, 0, 1)

    width = brentq(lambda width: deviation(low_for(width), width) - STD, .02, .9)
    return stretched(low_for(width), width)
