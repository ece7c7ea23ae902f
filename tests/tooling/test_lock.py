"""requirements.txt and the locks of what runs elsewhere: what ci/lock makes of pyproject.toml."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.project import PROJECT, run

LOCKS = "requirements.txt", "jobs/requirements-flyte.txt", "jobs/requirements-dstack.txt"
LOCKS += ("ci/cluster/images/requirements-katib.txt",)


def pins(lock):
    """Return a lock's pins, name==version; each must have hashes."""
    entries = re.findall(r"^(\S+==[^*\s]+)(?: ;.*)? \\\n    --hash=sha256:", (PROJECT / lock).read_text(), re.MULTILINE)
    assert entries and len(entries) == len(re.findall("^[a-z0-9]", (PROJECT / lock).read_text(), re.MULTILINE))
    return entries


@pytest.mark.parametrize("lock, has, lacks", [(LOCKS[1], "flytekit", "torch"), (LOCKS[2], "lightning", "dstack")])
def test_locks_for_elsewhere_have_the_same_versions(lock, has, lacks):
    """What runs in an image, whose base has PyTorch, or on a machine of dstack is what was tried on the page."""
    names = {pin.split("==")[0] for pin in pins(lock)}
    assert set(pins(lock)) <= set(pins("requirements.txt")) and has in names and lacks not in names


def test_lock_names_no_index():
    for name in [*LOCKS, "pyproject.toml"]:
        assert not re.search(r"https?://|index-url|find-links", (PROJECT / name).read_text()), name


@pytest.mark.slow
def test_lock_is_what_uv_makes_of_its_inputs(ready):
    """The package index is asked; pins that fit stay."""
    variables = os.environ | {"PYTHON": sys._base_executable}
    done = subprocess.run([ready / "ci/lock"], env=variables, capture_output=True, text=True)
    if "ailed to fetch" in done.stderr:
        pytest.skip("no package index answers")
    assert done.returncode == 0, done.stderr
    assert [(ready / lock).read_bytes() for lock in LOCKS] == [(PROJECT / lock).read_bytes() for lock in LOCKS]


def test_failed_lock_leaves_the_old_ones(ready):
    text = (ready / "pyproject.toml").read_text()
    (ready / "pyproject.toml").write_text(text.replace('dstack-task = ["', 'dstack-task = ["no such requirement", "'))
    done = run(ready / "ci/lock")
    assert done.returncode != 0 and "no such requirement" in done.stderr
    assert [(ready / lock).read_bytes() for lock in LOCKS] == [(PROJECT / lock).read_bytes() for lock in LOCKS]
