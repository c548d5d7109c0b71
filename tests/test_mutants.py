"""Mutations of the hot path, each of which a data comparison must catch; a test that no mutant fails proves nothing.

A mutant is a run and edits, pieces of source text and what they become. The same run that is clean without them must
find wrong data, or end in an error, with them. Those of the ring's and the pool's order need the stand-in driver's lazy
mode: work that runs at once hides them.
"""

import contextlib
import inspect
import textwrap
import weakref

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager, SimpleBufferPool, _cuda
from numbabuf._cuda import kernels
from numbabuf._cuda.open_captures import OpenCapture
from numbabuf.pool import ordering, store
from numbabuf.step import arena, graphs, slot
from numbabuf.step import ring as staging

STEPS = 60


def mutate(monkeypatch, owner, name, old, new):
    """Replace `old` by `new` in the source of `owner.name`."""
    function = inspect.unwrap(getattr(owner, name))
    plain = getattr(function, "py_func", function)
    source = textwrap.dedent(inspect.getsource(plain))
    assert source.count(old) >= 1, f"{name} no longer holds {old!r}: bring the mutant up to date"
    place = {}
    code = compile("from __future__ import annotations\n" + source.replace(old, new), f"<mutant of {name}>", "exec")
    exec(code, plain.__globals__, place)
    monkeypatch.setattr(owner, name, place[name])


@contextlib.contextmanager
def lazy(stub, seed=1):
    """The stand-in driver's lazy mode, where that driver is. Seed 0 runs nothing that nobody waits for."""
    if stub is None:
        yield
        return
    stub.set_async(1)
    stub.set_seed(seed)
    try:
        yield
    finally:
        stub.set_seed(0)
        stub.set_async(kit.lazy_by_environment())


def run_ring(stub):
    """Random steps through a ring of two: the wrong steps."""
    with lazy(stub):
        log = kit.Log(STEPS, ring=2)
        try:
            random = np.random.default_rng(0)
            for _ in range(STEPS):
                log.step(random)
            return log.wrong()
        finally:
            log.manager.close()


def run_pool(stub):
    """A buffer that is released while queued work reads it, and leased on another stream, where it is written."""
    first, second = _cuda.as_stream(None), _cuda.as_stream(None)
    one, two, out = (kit.to_device(np.full(8, value)) for value in (1, 2, 0))
    with lazy(stub, seed=0), SimpleBufferPool() as pool:
        with pool.allocate(BufferSpec(8, "int64"), stream=first) as entry:
            kit.run(kit.widen, first.numba, one, entry.array)
            first.synchronize()
            kit.run(kit.widen, first.numba, entry.array, out)
        with pool.allocate(BufferSpec(8, "int64"), stream=second) as entry:
            kit.run(kit.widen, second.numba, two, entry.array)
        assert pool.stats().misses == 1, "not used again: the run shows nothing"
        second.synchronize()
        return np.flatnonzero(kit.to_host(out, first.numba) != 1).tolist()


def run_withdrawal(stub):
    """A graph that is replaced while its replay is queued, and what it reads, given back to the pool."""
    with lazy(stub, seed=0), SimpleBufferPool() as pool:
        options = {"max_batch_size": 1, "max_seq_len": 8, "buckets": [8], "ring": 8}
        with InputBufferManager(**options) as m:
            stream = _cuda.as_stream(None)
            two, five, nine = (kit.to_device(np.array([n, n])) for n in (2, 5, 9))
            out = kit.to_device(np.zeros(8, np.int64))
            entry = pool.allocate(BufferSpec(2, "int64"))
            _cuda.copy(entry.array, two, stream)
            stream.synchronize()
            m.capture_buckets(lambda step: kit.run(kit.affine, step.stream, step["input_ids"], entry.array, out))
            m.synchronize()
            m.replay({"input_ids": np.arange(8)}, 8)
            with m.capture(8) as step:
                kit.run(kit.affine, step.stream, step["input_ids"], five, out)
            entry.release()
            with pool.allocate(BufferSpec(2, "int64"), stream=stream) as entry:
                _cuda.copy(entry.array, nine, stream)
                stream.synchronize()
            return np.flatnonzero(kit.to_host(out, m.stream) != np.arange(8) * 2 + 2).tolist()


def run_operands(stub):
    """A captured kernel whose array the caller drops, and memory of the same size made after it."""
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        weights = kit.to_device(np.array([3, 10]))
        out = kit.to_device(np.zeros(8, np.int64))
        kit.run(kit.affine, m.stream, out, weights, out)  # compiled before the capture
        with m.capture(8) as step:
            kit.run(kit.affine, step.stream, step["input_ids"], weights, out)
        watched = weakref.ref(weights)
        del weights
        kit.collect()
        if watched() is None:
            return [0]  # a replay would read freed memory, which ends the context of the whole process
        _cuda.flush_pending_frees()
        noise = [kit.to_device(np.full(2, 99)) for _ in range(20)]
        m.replay({"input_ids": np.arange(8)}, 8)
        found = kit.to_host(out, m.stream)
        del noise
        return np.flatnonzero(found != np.arange(8) * 3 + 10).tolist()


def run_failed_launch(stub):
    """A replay whose launch the driver refuses, then more of them."""
    log = kit.Log(STEPS, ring=3)
    random = np.random.default_rng(0)
    for number in range(20):
        if number in (4, 5, 11):
            stub.fail("cuGraphLaunch:1")
            with pytest.raises(Exception):  # noqa: B017 - the driver's error, whatever its type
                log.manager.replay({"ids": np.arange(3), "other": np.arange(3)}, 3)
            stub.fail("")
        log.step(random)
    wrong = log.wrong()
    log.manager.close()
    return wrong


STUB = pytest.mark.stub
ARENA, RING, ORDER, GRAPHS = arena.Arena, staging.StagingRing, ordering.StreamOrder, graphs.Graphs
MUTANTS = {
    # The five by which a staging ring, its fill and its graphs usually go wrong.
    "retirement check removed": (
        run_ring, STUB, (RING, "acquire", "if step - self._retired[0] >= self.depth", "if False"),
    ),
    "wait removed": (run_ring, STUB, (RING, "_wait", "self.waits += 1", "self.waits += 1; return")),
    "event recorded too early": (
        run_pool, STUB,
        (store.Store, "lease", "block.users = (stream,)",
         "block.users = (stream,)\n        self.order._early = self.order._mark(stream)"),
        (ORDER, "mark_users", "self._mark(user)", "self._early"),
    ),
    "padding skipped": (run_ring, (), (slot.InputSlot, "describe", "= padded * width", "= live * width")),
    "graph operand dropped": (
        run_operands, STUB, (OpenCapture, "keep", "self.operands += [operand,", "_ = [operand,"),
    ),
    # And more of their kinds.
    "retirement check one late": (run_ring, STUB, (RING, "acquire", ">= self.depth", "> self.depth")),
    "every block the same": (run_ring, (), (RING, "acquire", "step % self.depth", "0")),
    "wait between streams removed": (run_pool, STUB, (ORDER, "put_behind", "event.wait(stream)", "pass")),
    "event on the wrong stream": (
        run_pool, STUB, (ORDER, "_mark", "event.record(stream)", "event.record(self.default)"),
    ),
    "withdrawn graph closed too early": (
        run_withdrawal, STUB, (GRAPHS, "exchange", "event.record(self._stream)", "pass"),
    ),
    "pad left as it is": (run_ring, (), (slot.InputSlot, "table_row", "= self.pad_mode", "= kernels.PAD_KEEP")),
    "sizes of an earlier bucket": (run_ring, (), (ARENA, "write", "same = block.padded is padded", "same = True")),
    "graph without its fill": (run_ring, (), (arena, "recorded", "fill(stream)", "pass")),
    "fill not first": (
        run_ring, (),
        (arena, "recorded", "fill(stream)\n        yield captured\n        if not dry:",
         "yield captured\n        if not dry:\n            fill(stream)"),
    ),
    "count not advanced": (run_ring, (), (kernels, "fill_slots", "store8(table + STEP * WORD, step + 1)", "pass")),
    "bucket one too small": (run_ring, (), (GRAPHS, "covering", "live[0])", "live[0] - 1)")),
    "counts not reset": (run_failed_launch, STUB, (ARENA, "_recount", "self.ring.reset()", "self.ring.advance()")),
    "device count not reset": (run_failed_launch, STUB, (ARENA, "_recount", "self._write_table()", "pass")),
}  # fmt: skip


@pytest.fixture
def controls(request, backend):
    """The stand-in driver's controls, or None."""
    return request.getfixturevalue("stub") if backend == "stand-in" else None


RUNS = {run: pytest.param(run, marks=marks) for run, marks, *_ in reversed(MUTANTS.values())}


@pytest.mark.parametrize("run", RUNS.values())
def test_the_original_is_clean(run, controls):
    assert run(controls) == []


@pytest.mark.parametrize("name", [pytest.param(name, marks=mutant[1]) for name, mutant in MUTANTS.items()])
def test_a_mutant_is_caught(name, controls, monkeypatch, caplog):
    run, _, *edits = MUTANTS[name]
    for edit in edits:
        mutate(monkeypatch, *edit)
    try:
        wrong = run(controls)
    except Exception as error:  # an error is as good as wrong data: the mutant did not pass
        wrong = [repr(error)]
    if controls is not None:
        controls.clear_errors()
    assert wrong, f"nothing noticed the mutant {name!r}"
