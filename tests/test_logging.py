"""Logging: one logger, named for the package, that importing leaves alone and that no step writes to."""

import ast
import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import numbabuf
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.predict.manager import PredictiveBufferManager
from numbabuf.step.manager import InputBufferManager

FILES = sorted(pathlib.Path(numbabuf.__file__).parent.rglob("*.py"))


def wrong_uses(source):
    """Lines on which a module uses `logging` other than by a logger named for the package."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "logging":
            wrong.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logging."):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if ast.unparse(node.func) != "logging.getLogger" or str(name).split(".")[0] != "numbabuf":
                wrong.append(node.lineno)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_logger_is_the_packages(path):
    assert wrong_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["logging.warning('x')", "logging.getLogger()", "logging.getLogger(__name__)", "logging.getLogger('numba')",
     "logging.basicConfig()", "from logging import getLogger"],
)  # fmt: skip
def test_a_wrong_use_is_found(source):
    assert wrong_uses(source) == [1]


def test_the_package_logs_at_all():
    assert any("getLogger" in path.read_text() for path in FILES)


def test_import_sets_nothing_up():
    program = (
        "import json, logging, numba, numpy\n"
        "from numba import cuda\n"
        "state = lambda: [[len(l.handlers), l.level, l.propagate, l.disabled] for l in "
        "(logging.getLogger(), logging.getLogger('numbabuf'))]\n"
        "before = state()\nimport numbabuf\nprint(json.dumps([before, state()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after == before


@pytest.mark.parametrize("kind", [InputBufferManager, PredictiveBufferManager])
def test_steps_and_leases_log_nothing(kind, caplog):
    caplog.set_level(logging.DEBUG, logger="numbabuf")
    spec = BufferSpec(16, "float32", Tier.PINNED)
    with SimpleBufferPool() as pool, kind(pool, 1, 16, buckets=[4, 16]) as manager:
        manager.capture_buckets(lambda step: None)
        caplog.clear()  # a capture has a line
        for size in range(1, 17):
            manager.replay({"input_ids": np.arange(size)}, size)
            manager.stage_inputs({"input_ids": np.arange(size)}, size)
            with manager.stage(size) as lease:
                lease["input_ids"][:] = 1
            pool.allocate(spec).release()
        manager.synchronize()
    assert [record for record in caplog.records if record.name.startswith("numbabuf")] == []


def test_what_is_worth_a_line_gets_one(caplog):
    pool = SimpleBufferPool()
    pool.allocate(BufferSpec(16, "float32", Tier.PINNED))
    pool.stats()
    pool.close()
    assert [(record.name, record.levelname) for record in caplog.records] == [("numbabuf", "WARNING")]
