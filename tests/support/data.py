"""Small data in MNIST's file formats, and comparisons of weights."""

import gzip
import struct

import numpy as np
import torch

TRAIN, TEST = 317, 53  # images; primes, so that no batch size and no number of processes divides them
FILES = [f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def idx(values):
    """Return the bytes of an IDX file: magic number, shape, values."""
    values = np.asarray(values, np.uint8)
    return struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write_split(folder, split, images, labels, gz=True):
    """Write the two files of a split, gzipped or not."""
    for what, values in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{split}-{what}-ubyte"
        if gz:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(values), 1))
        else:
            path.write_bytes(idx(values))


def make_data(folder, train=TRAIN, test=TEST, gz=True):
    """Write the four files of a small data set into a folder and return it: ten 4x4 patterns, enlarged, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    patterns = random.integers(0, 160, (10, 4, 4))
    for split, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count)
        images = np.kron(patterns[labels], np.ones((7, 7))) + random.integers(0, 96, (count, 28, 28))
        images = np.pad(images[:, 1:-1, 1:-1], ((0, 0), (1, 1), (1, 1)))  # a border of background, as MNIST has
        write_split(folder, split, images, labels, gz)
    return folder


def weights(path):
    """Return the weights of a model file."""
    return torch.load(path, weights_only=True)


def equal(one, other):
    """Tell whether two sets of weights are the same to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    """Return the largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
