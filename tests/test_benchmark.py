"""The benchmark tells what is wrong with its arguments, and prints its table."""
import re

import pytest
from trainer import ROOT, environment, make_data, python

BENCHMARK = ROOT / "benchmarks" / "benchmark.py"


@pytest.mark.parametrize("argv, message", [
    ([], "--data DIR or the variable MNIST_DIR must give the folder"),
    (["--data", "nowhere"], "--data: train-images-idx3-ubyte[.gz] is not in nowhere"),
    (["--data", ".", "--epochs", "0"], "argument --epochs: invalid positive value: '0'"),
    (["--data", ".", "--seeds"], "argument --seeds: expected at least one argument"),
    (["--data", ".", "--threads", "2", "--processes", "3"], "--processes 3 cannot share --threads 2 evenly"),
    (["--data", ".", "--epoch", "1"], "unrecognized arguments: --epoch 1"),
])
def test_wrong_arguments(argv, message, tmp_path):
    env = environment()
    env.pop("MNIST_DIR", None)
    done = python(BENCHMARK, *argv, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_table(tmp_path):
    done = python(BENCHMARK, "--data", make_data(tmp_path / "data"), "--seeds", 1, 2, "--threads", 2, "--processes", 2,
                  timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^(.*): seed (\d), \d+\.\d s an epoch, accuracy \d+\.\d\d%, \d+ MB$", done.stdout, re.M) == [
        ("baseline.py", "1"), ("mnist.py", "1"), ("mnist.py, torchrun", "1"), ("mnist.py", "2"),
        ("mnist.py, torchrun", "2")]
    rows = re.findall(r"^\| (\S.*\.py.*?) \| (\d x \d) \| \d+\.\d \| \d+\.\d \| \d+\.\d\d% \| (\d) \| \d+ \|$",
                      done.stdout, re.M)
    assert rows == [("baseline.py", "2 x 1", "1"), ("mnist.py", "2 x 1", "2"), ("mnist.py, torchrun", "2 x 1", "2")] \
        or rows == [("baseline.py", "1 x 2", "1"), ("mnist.py", "1 x 2", "2"), ("mnist.py, torchrun", "2 x 1", "2")]
