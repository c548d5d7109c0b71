"""NVTX ranges: nothing of them when they are off, a prebuilt range around each named method when they are on."""

import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from numbabuf.errors import GraphMissingError
from numbabuf.ext import nvtx
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.step.manager import InputBufferManager

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Domain:
    """A stand-in for a domain of the package nvtx that writes down what it is told."""

    def __init__(self):
        self.log, self.built = [], 0

    def get_event_attributes(self, *, message):
        self.built += 1
        return message

    def push_range(self, attributes):
        self.log.append(attributes)

    def pop_range(self):
        self.log.append("end")


@pytest.fixture
def domain(monkeypatch):
    domain = Domain()
    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(get_domain=lambda name: domain))
    yield domain
    nvtx.disable()


def test_ranges_go_round_a_step_and_an_allocation(domain):
    nvtx.enable()
    assert nvtx.enabled()
    built = domain.built
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as manager:
        manager.capture_buckets(lambda step: None)
        domain.log.clear()
        manager.replay({"input_ids": np.arange(3)}, 3)
        manager.synchronize()
        assert domain.log == ["replay", "end", "synchronize", "end"]
    with SimpleBufferPool() as pool:
        domain.log.clear()
        pool.allocate(BufferSpec(4, "float32", Tier.PINNED)).release()
        pool.allocate(BufferSpec(4, "float32", Tier.PINNED)).release()
        assert domain.log == ["allocate from the driver", "end"], "a hit has no range"
    assert domain.built == built == len(nvtx.RANGES), "every range is prebuilt"


def test_an_exception_ends_the_range(domain):
    nvtx.enable()
    with InputBufferManager(max_batch_size=1, max_seq_len=8) as manager:
        manager.stage_inputs({}, 0)
        domain.log.clear()
        with pytest.raises(GraphMissingError):
            manager.replay({}, 3)
        assert domain.log == ["replay", "end"]


def test_off_leaves_no_trace(domain):
    plain = InputBufferManager.replay
    nvtx.enable()
    nvtx.enable()
    assert InputBufferManager.replay is not plain
    assert InputBufferManager.replay.__doc__ == plain.__doc__
    nvtx.disable()
    assert InputBufferManager.replay is plain
    assert not nvtx.enabled()
    nvtx.disable()


def test_the_real_package_takes_the_calls():
    pytest.importorskip("nvtx")
    nvtx.enable()
    try:
        with InputBufferManager(max_batch_size=1, max_seq_len=8) as manager:
            assert manager.stage_inputs({"input_ids": np.arange(3)}, 3)["input_ids"].size >= 3
    finally:
        nvtx.disable()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match=r"pip install numbabuf\[nvtx\]"):
        nvtx.enable()
    with pytest.warns(RuntimeWarning, match=r"pip install numbabuf\[nvtx\]"):
        nvtx.enable(or_warn=True)
    assert not nvtx.enabled()


PROGRAM = """
import json, sys, types, warnings
domain = types.SimpleNamespace(get_event_attributes=lambda message: 0, push_range=int, pop_range=int)
sys.modules["nvtx"] = types.SimpleNamespace(get_domain=lambda name: domain) if sys.argv[1] == "there" else None
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import numbabuf
module = sys.modules.get("numbabuf.ext.nvtx")
print(json.dumps([module is not None and module.enabled(), sum("nvtx" in str(w.message) for w in warned)]))
"""


@pytest.mark.parametrize(
    ("switch", "package", "expected"),
    [("0", "there", [False, 0]), ("1", "there", [True, 0]), ("1", "missing", [False, 1])],
)
def test_the_switch_is_read_at_import(switch, package, expected):
    """In a process of its own; a missing package stops no program."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, package],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NUMBABUF_NVTX": switch},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
