"""The data: found as the sites ship it; what is missing or damaged ends in one line that says what to do."""

import gzip
import shutil

import pytest
import torch

import mnist
from tests.support.data import FILES, TRAIN, idx, make_data
from tests.support.processes import Run, drop_capabilities


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data to break."""
    return shutil.copytree(data, tmp_path / "data")


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("layout, separator", [("", "-"), ("MNIST/raw", "-"), ("", ".")])
def test_layouts(layout, separator, gz, data, tmp_path):
    """Files in the folder, where torchvision puts them, and named train-images.idx3-ubyte."""
    for path in make_data(tmp_path / layout, gz=gz).iterdir():
        path.rename(path.with_name(path.name.replace("-idx", f"{separator}idx")))
    for split in ("train", "t10k"):
        images, labels = mnist.load(tmp_path, split)
        assert (images.dtype, images.shape[1:], labels.dtype) == (torch.uint8, (1, 28, 28), torch.int64)
        assert all(map(torch.equal, (images, labels), mnist.load(data, split)))


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name, broken, refused):
    (broken / f"{name}.gz").unlink()
    assert f"{name}[.gz] is not in {broken}, or may not be read: give --data" in refused(folder=broken)


IMAGES, LARGER = idx([[[0] * 28] * 28] * TRAIN), idx([[[0] * 32] * 32] * TRAIN)
DAMAGED = dict(truncated=gzip.compress(IMAGES)[:-20], web_page=b"<html>404", empty=b"", larger=gzip.compress(LARGER))


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file(damage, broken, refused):
    (broken / f"{FILES[0]}.gz").write_bytes(DAMAGED[damage])
    err = refused(folder=broken)
    assert f"{FILES[0]}.gz is not a readable MNIST file (" in err and err.endswith("): download it again\n")


@pytest.mark.parametrize("labels", [[0] * (TRAIN - 1), [0] * TRAIN + [1], [10] * TRAIN])
def test_labels_of_other_images(labels, broken, refused):
    (broken / f"{FILES[1]}.gz").write_bytes(gzip.compress(idx(labels)))
    assert f"the images and labels of train in {broken} do not belong together" in refused(folder=broken)


@pytest.mark.parametrize("forbidden, message", [("", "may not be read"), (f"{FILES[0]}.gz", "Permission denied")])
def test_forbidden_folder_or_file(forbidden, message, broken, tmp_path):
    (broken / forbidden).chmod(0)
    run = Run(tmp_path / "run", "--data", broken, setup=drop_capabilities)  # modes do not bind root
    assert (run.end(), run.out) == (1, "")
    assert run.err.startswith("mnist.py: ") and run.err.count("\n") == 1 and message in run.err
