"""Mutations of the hot path, each of which a data comparison must catch; a test that no mutant fails proves nothing.

A mutant is a piece of source text and what it becomes. The same run that is clean without it must find wrong data, or
end in an error, with it. The ring's mutants need the stand-in driver's lazy mode: work that runs at once hides them.
"""

import inspect
import textwrap
import weakref

import kit
import numpy as np
import pytest

from numbabuf import InputBufferManager, _cuda, arena, graph, kernels, service, slot, staging

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


def run_ring(stub):
    """Random steps through a ring of two in lazy mode, where there is one: the wrong steps."""
    if stub is not None:
        stub.set_async(1)
        stub.set_seed(1)
    log = None
    try:
        log = kit.Log(STEPS, ring=2)
        random = np.random.default_rng(0)
        for _ in range(STEPS):
            log.step(random)
        return log.wrong()
    finally:
        if stub is not None:
            stub.set_seed(0)
            stub.set_async(kit.lazy_by_environment())
        if log is not None:
            log.manager.close()


def run_operands(stub):
    """A captured kernel whose array the caller drops, and memory of the same size made after it."""
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        weights = kit.to_device(np.array([3, 10]))
        out = kit.to_device(np.zeros(8, np.int64))
        m.capture_buckets(lambda step, w=weights: kit.run(kit.affine, step.stream, step["input_ids"], w, out))
        m._function = None
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
MUTANTS = {
    "retirement check removed": (
        run_ring, staging.StagingRing, "acquire", "if step - self._retired[0] >= self.depth", "if False", STUB,
    ),
    "retirement check one late": (run_ring, staging.StagingRing, "acquire", ">= self.depth", "> self.depth", STUB),
    "wait removed": (run_ring, staging.StagingRing, "_wait", "self.waits += 1", "self.waits += 1; return", STUB),
    "every block the same": (run_ring, staging.StagingRing, "acquire", "step % self.depth", "0", ()),
    "padding skipped": (run_ring, slot.InputSlot, "describe", "= padded * width", "= live * width", ()),
    "pad left as it is": (run_ring, slot.InputSlot, "table_row", "= self.pad_mode", "= kernels.PAD_KEEP", ()),
    "sizes of an earlier bucket": (
        run_ring, arena.Arena, "write", "same = block.padded is padded", "same = True", (),
    ),
    "graph without its fill": (run_ring, graph.Recording, "__enter__", "self._fill(self._stream)", "pass", ()),
    "fill not first": (
        run_ring, graph.Recording, "__exit__",
        "if error is None:", "if error is None:\n        self._fill(self._stream)", (),
    ),
    "count not advanced": (run_ring, kernels, "fill_slots", "store8(table + STEP * WORD, step + 1)", "pass", ()),
    "bucket one too small": (run_ring, service.Service, "covering", "live[0])", "live[0] - 1)", ()),
    "operands dropped": (run_operands, _cuda.Capture, "keep", "self._operands.extend(kept(operand))", "pass", STUB),
    "counts not reset": (run_failed_launch, arena.Arena, "_recount", "self.ring.reset()", "self.ring.advance()", STUB),
    "device count not reset": (run_failed_launch, arena.Arena, "_recount", "self._write_table()", "pass", STUB),
}  # fmt: skip


@pytest.fixture
def controls(request, backend):
    """The stand-in driver's controls, or None."""
    return request.getfixturevalue("stub") if backend == "stand-in" else None


@pytest.mark.parametrize("run", [run_ring, pytest.param(run_operands), pytest.param(run_failed_launch, marks=STUB)])
def test_the_original_is_clean(run, controls):
    assert run(controls) == []


@pytest.mark.parametrize("name", [pytest.param(name, marks=mutant[-1]) for name, mutant in MUTANTS.items()])
def test_a_mutant_is_caught(name, controls, monkeypatch, caplog):
    run, owner, function, old, new, _ = MUTANTS[name]
    mutate(monkeypatch, owner, function, old, new)
    if name == "fill not first":
        mutate_enter = "self._fill(self._stream)"
        mutate(monkeypatch, graph.Recording, "__enter__", mutate_enter, "pass")
    try:
        wrong = run(controls)
    except Exception as error:  # an error is as good as wrong data: the mutant did not pass
        wrong = [repr(error)]
    if controls is not None:
        controls.clear_errors()
    assert wrong, f"nothing noticed the mutant {name!r}"
