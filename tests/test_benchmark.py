"""The benchmark tells what is wrong with its arguments, and prints its table."""
import re

import pytest
from trainer import ROOT, environment, make_data, python

BENCHMARK, AUTOENCODER = (ROOT / "benchmarks" / name for name in ("benchmark.py", "benchmark_autoencoder.py"))


@pytest.mark.parametrize("script", [BENCHMARK, AUTOENCODER], ids=lambda path: path.name)
@pytest.mark.parametrize("argv, message", [
    ([], "--data DIR or the variable MNIST_DIR must give the folder"),
    (["--data", "nowhere"], "--data: train-images-idx3-ubyte[.gz] is not in nowhere"),
    (["--data", ".", "--epochs", "0"], "argument --epochs: invalid positive value: '0'"),
    (["--data", ".", "--epoch", "1"], "unrecognized arguments: --epoch 1"),
])
def test_wrong_arguments(script, argv, message, tmp_path):
    refuses(script, argv, message, tmp_path)


@pytest.mark.parametrize("script, argv, message", [
    (BENCHMARK, ["--seeds"], "argument --seeds: expected at least one argument"),
    (BENCHMARK, ["--threads", "2", "--processes", "3"], "--processes 3 cannot share --threads 2 evenly"),
    (AUTOENCODER, ["--runs", "0"], "argument --runs: invalid positive value: '0'"),
])
def test_wrong_arguments_of_one(script, argv, message, tmp_path):
    refuses(script, ["--data", ".", *argv], message, tmp_path)


def refuses(script, argv, message, folder):
    env = environment()
    env.pop("MNIST_DIR", None)
    done = python(script, *argv, cwd=folder, env=env)
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


@pytest.mark.slow
def test_table_of_the_autoencoder(tmp_path):
    done = python(AUTOENCODER, "--data", make_data(tmp_path / "data"), "--runs", 2, "--epochs", 2, timeout=500,
                  env=environment(PYTHONWARNINGS=""))  # Lightning warns
    assert (done.returncode, done.stderr) == (0, "")
    programs = [("naive_autoencoder.py", "32"), ("naive_autoencoder.py", "64"), ("autoencoder.py", "64")]
    lines = re.findall(r"^(.*), batches of (\d+): seed (\d), \d+\.\d s an epoch, \d+ images/s, error 0\.\d{4}, \d+ MB$",
                       done.stdout, re.M)
    assert lines == [(*program, seed) for seed in "12" for program in programs]
    rows = re.findall(r"^\| (\S+\.py) \| (\d+) \| \d+\.\d \| (\d+) \| (\d+\.\d) \| 0\.\d{4} \| 2 \| \d+ \|$",
                      done.stdout, re.M)
    assert [row[:2] for row in rows] == programs
    assert [float(row[3]) for row in rows] == pytest.approx([int(row[2]) / int(rows[0][2]) for row in rows], abs=0.1)
