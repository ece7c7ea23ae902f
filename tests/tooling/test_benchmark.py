"""The benchmark tells what is wrong with its arguments, and prints its table."""

import re

import pytest

from tests.support.data import make_data
from tests.support.processes import python
from tests.support.project import PROJECT

BENCHMARK = PROJECT / "benchmarks/benchmark.py"


def test_wrong_arguments(tmp_path):
    done = python(BENCHMARK, "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert "--data: train-images-idx3-ubyte[.gz] is not in nowhere" in done.stderr


@pytest.mark.slow
def test_table(tmp_path):
    done = python(BENCHMARK, "--data", make_data(tmp_path / "data"), "--threads", 2, "--processes", 2, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    line = r"^(.*): seed 1, \d+\.\d s an epoch, accuracy \d+\.\d\d%, \d+ MB$"
    assert re.findall(line, done.stdout, re.M) == ["baseline.py", "mnist.py", "mnist.py, torchrun"]
    row = r"^\| (\S.*\.py.*?) \| (\d x \d) \| \d+\.\d \| \d+\.\d \| \d+\.\d\d% \| 1 \| \d+ \|$"
    rows = [("baseline.py", "1 x 2"), ("mnist.py", "1 x 2"), ("mnist.py, torchrun", "2 x 1")]
    assert re.findall(row, done.stdout, re.M) == rows
