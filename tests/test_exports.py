"""What the package shows: every listed name is there and described; importing it needs no extra."""

import configparser
import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest

import numbabuf

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONAL = {"ml_dtypes", "tqdm", "matplotlib", "cupy", "torch", "dask", "nvtx", "prometheus_client"}


def modules_after(statement, **environment):
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = statement + "\nimport json, sys; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment or None
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_all_is_sorted_and_complete():
    listed = numbabuf.__all__
    assert sorted(set(listed)) == list(listed)
    public = {
        name for name, value in vars(numbabuf).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public - {"annotations", "Any", "TYPE_CHECKING"} <= set(listed), "public, yet not in __all__"


@pytest.mark.parametrize("name", numbabuf.__all__)
def test_what_is_listed_exists_and_is_described(name):
    value = getattr(numbabuf, name)
    if callable(value):
        assert value.__doc__ and value.__doc__.strip(), f"{name} has no docstring of its own"


def test_version_is_that_of_the_metadata():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert numbabuf.__version__ == metadata["metadata"]["version"]


def test_import_brings_in_no_optional_package():
    # numba-cuda itself imports some of them where they are installed; that is not this package's doing.
    before = modules_after("import numba, numpy; from numba import cuda")
    assert not (modules_after("import numbabuf") - before) & OPTIONAL


def test_import_needs_no_backend():
    """Without a simulator and without a driver the import works; the first use is what complains."""
    bare = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NUMBA_ENABLE_CUDASIM", "LD_LIBRARY_PATH", "LD_PRELOAD")
    }
    assert "numbabuf" in modules_after("import numbabuf", **bare)


@pytest.mark.parametrize("name", ["planning", "buckets", "demand", "traces"])
def test_what_needs_no_gpu_imports_no_numba(name):
    assert not {"numba", "cuda"} & modules_after(f"import numbabuf.{name}")


@pytest.mark.parametrize(
    "name", "buckets info nvtx planning plots policies progress report stats timeline traces".split()
)
def test_a_public_module_lists_what_it_holds(name):
    """Which is what ``import *`` takes, and what the reference describes."""
    module = importlib.import_module(f"numbabuf.{name}")
    assert module.__all__
    for listed in module.__all__:
        getattr(module, listed)
