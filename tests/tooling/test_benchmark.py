"""The benchmarks tell what is wrong with their arguments, fit mnist.py as it is, and print their tables."""

import csv
import importlib
import re

import pytest

from tests.support.data import make_data
from tests.support.processes import python
from tests.support.project import PROJECT

BENCHMARKS = PROJECT / "benchmarks"


def test_wrong_arguments(tmp_path):
    done = python(BENCHMARKS / "benchmark.py", "--data", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert "--data: train-images-idx3-ubyte[.gz] is not in nowhere" in done.stderr


def test_variants_fit_the_trainer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    recipe = importlib.import_module("recipe")
    for replacements, _ in (recipe.STEPS | recipe.OTHERS).values():
        compile(recipe.variant(tmp_path, "variant.py", replacements).read_text(), "variant.py", "exec")
    with open(BENCHMARKS / "recipe.csv", newline="") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == [*recipe.STEPS, *recipe.OTHERS]


@pytest.mark.slow
@pytest.mark.parametrize("command, row, names", [
    ("benchmark.py --until 0", r"\| (\S+)\.py, \w+ \| 1 \| ", {"baseline", "mnist"}),
    ("recipe.py --only final SGD --csv recipe.csv", r"\| (final|SGD).* \| \d+\.\d\d% \(", {"final", "SGD"}),
    ("soak.py --strikes 1 --validation 8000", r"\| (SIGKILL) +\| 1 .*\| 1 +\|$", {"SIGKILL"}),
    ("processes.py --processes 1 2", r"\| (\d) \| \d+\.\d \| \d+\.\d\d \|", {"1", "2"})])  # fmt: skip
def test_tables(command, row, names, tmp_path):
    script, *argv = command.split()
    data = make_data(tmp_path, train=10_500, gz=False)  # recipe.py holds out 10,000
    done = python(BENCHMARKS / script, "--data", data, *argv, timeout=300, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and set(re.findall(rf"^{row}", done.stdout, re.M)) == names
