"""Fixtures: Flyte and Weights & Biases with all that they write in one folder, and the package of the tasks."""

import gc
import importlib
import os

import pytest

from tests.support.flyte import make_package, variables
from tests.support.processes import VARIABLES


@pytest.fixture(scope="session")
def flyte_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flyte")


@pytest.fixture(scope="module")
def flow(flyte_folder):
    """The module flyte_mnist, imported once the environment is set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*VARIABLES, *(name for name in os.environ if name.startswith(("WANDB_", "FLYTE_")))]:
            patch.delenv(name, raising=False)
        for name, value in {"WANDB_MODE": "", **variables(flyte_folder)}.items():
            patch.setenv(name, value)
        import flytekit.core.local_cache

        patch.setattr(flytekit.core.local_cache, "CACHE_LOCATION", str(flyte_folder / "cache"))
        yield importlib.import_module("flyte_mnist")
    gc.collect()  # while the tests' filters of warnings hold


@pytest.fixture
def templates(flow, flyte_folder):
    """The task templates of the package, which is made once."""
    from support.flyte_tools import read_package

    path = flyte_folder / "package.tgz"
    return read_package(path if path.exists() else make_package(path))
