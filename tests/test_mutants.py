"""Mutations of the hot path, each of which a data comparison must catch; a test that no mutant fails proves nothing.

A mutant is a run, the name of a function, and what is put in its place. The same run that is clean without it must find
wrong data, or end in an error, with it. Those of the ring's and the pool's order need the stand-in driver's lazy mode:
work that runs at once hides them.
"""

import contextlib
import importlib
import types
import weakref

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, InputBufferManager, SimpleBufferPool, _cuda
from numbabuf._cuda import kernels

STEPS = 60


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


def run_outputs(stub):
    """Steps whose outputs are read at once, or three steps late, from a return ring of two: the wrong steps."""
    with lazy(stub, seed=0), InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], returns=2) as m:
        m.register_output("sent", BufferSpec(8, "int64"))
        m.capture_buckets(lambda step: kit.run(kit.widen, step.stream, step["input_ids"], step["sent"]))
        random, wrong, waiting = np.random.default_rng(0), [], []
        for number in range(STEPS):
            ids = random.integers(0, 99, random.integers(1, 9))
            waiting.append((ids, m.replay({"input_ids": ids}, len(ids))))
            late = number % 20 > 9
            if late:
                m.synchronize()
            if len(waiting) > 3 * late:
                ids, outputs = waiting.pop(0)
                wrong += [number] * (outputs["sent"].tolist() != ids.tolist())
        return wrong


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


# ------------------------------------------------------------------------------------------------------------ mutations
# Each is given a function and returns what is put in its place.


def nothing(original):
    """Does nothing."""
    return lambda *args, **options: None


def always(value):
    """Returns `value`, whatever is the case."""
    return lambda original: lambda *args, **options: value


def unchecked(original):
    """`acquire` without a look at what the device has read."""
    return lambda self: self.blocks[self.step % self.depth]


def one_late(original):
    """`_wait` lets the host run one block further than the ring is deep."""
    return lambda self, step: None if step - self._retired[0] == self.depth else original(self, step)


def first_block(original):
    """`acquire` waits as it should and gives the same block each time."""
    return lambda self: (original(self), self.blocks[0])[1]


def unpadded(original):
    """`describe` without the rows that pad."""

    def describe(self, words, live, columns, padded):
        original(self, words, live, columns, padded)
        at = self.columns_word - kernels.COLUMNS
        words[at + kernels.PADDED_ROWS] = words[at + kernels.ROWS]
        words[at + kernels.PADDED_COLUMNS] = words[at + kernels.COLUMNS]

    return describe


def padding_kept(original):
    """`table_row` that tells the fill to leave the padding as it is."""

    def table_row(self, source, target):
        row = original(self, source, target)
        row[kernels.PAD_MODE] = kernels.PAD_KEEP
        return row

    return table_row


def same_bucket(original):
    """`write` that takes the last step in the block for one of the same bucket."""

    def write(self, block, inputs, live, padded):
        block.padded = padded
        return original(self, block, inputs, live, padded)

    return write


def another_number(original):
    """`claim` that tells the device the number of the step before."""

    def claim(self, chosen, block, live, **options):
        outputs = original(self, chosen, block, live, **options)
        block.words[len(block.words) - self.layout.step_words + kernels.NUMBER] -= 1
        return outputs

    return claim


def first_place(original):
    """`claim` that has the device write the first return block."""

    def claim(self, chosen, block, live, **options):
        outputs = original(self, chosen, block, live, **options)
        block.words[len(block.words) - self.layout.step_words + kernels.PLACE] = 0
        return outputs

    return claim


def unwaited(original):
    """`read` of what is in the block."""
    return lambda self, outputs, name: self.view(self.names(outputs.chosen)[name], outputs).copy()


def without_fill(original):
    """`recorded` without the graph's first node."""
    return lambda stream, fill, captured, **options: original(stream, lambda stream: None, captured, **options)


def fill_last(original):
    """`recorded` with the graph's first node behind the user's."""

    @contextlib.contextmanager
    def recorded(stream, fill, captured, **options):
        with original(stream, lambda stream: None, captured, **options) as step:
            yield step
            fill(stream)

    return recorded


def storing_nothing(original):
    """A kernel whose `store8` has no effect."""

    @_cuda.cuda.jit(device=True)
    def ignore(addr, value):
        pass

    plain = getattr(original, "py_func", None) or original.fn
    return _cuda.cuda.jit(types.FunctionType(plain.__code__, {**plain.__globals__, "store8": ignore}, plain.__name__))


def one_smaller(original):
    """`covering` of a step that has one token less."""
    return lambda self, live: original(self, (live[0] - 1, *live[1:]))


def advancing(original):
    """`reset` that counts a step instead."""
    return lambda self: self.advance()


def table_as_it_is(original):
    """`_recount` that leaves the device's count alone."""

    def recount(self):
        self._write_table = lambda: None
        try:
            original(self)
        finally:
            del self._write_table

    return recount


def marking(stream):
    """`record` that marks the work of another stream."""
    return lambda original: lambda self, _: original(self, stream())


def idle_stream():
    return _cuda.as_stream(None)


def default_stream():
    return _cuda.as_stream(0)


STUB = pytest.mark.stub
MUTANTS = {
    # The five by which a staging ring, its fill and its graphs usually go wrong.
    "retirement check removed": (run_ring, STUB, "step.ring:StagingRing.acquire", unchecked),
    "wait removed": (run_ring, STUB, "step.ring:StagingRing._wait", nothing),
    "event recorded too early": (run_pool, STUB, "_cuda:Event.record", marking(idle_stream)),
    "padding skipped": (run_ring, (), "step.slot:InputSlot.describe", unpadded),
    "graph operand dropped": (run_operands, STUB, "_cuda.open_captures:OpenCapture.keep", nothing),
    # And more of their kinds.
    "retirement check one late": (run_ring, STUB, "step.ring:StagingRing._wait", one_late),
    "every block the same": (run_ring, (), "step.ring:StagingRing.acquire", first_block),
    "wait between streams removed": (run_pool, STUB, "_cuda:Event.wait", nothing),
    "event on the wrong stream": (run_pool, STUB, "_cuda:Event.record", marking(default_stream)),
    "withdrawn graph closed too early": (run_withdrawal, STUB, "_cuda:Event.query", always(True)),
    "pad left as it is": (run_ring, (), "step.slot:InputSlot.table_row", padding_kept),
    "sizes of an earlier bucket": (run_ring, (), "step.arena:Arena.write", same_bucket),
    "graph without its fill": (run_ring, (), "step.arena:recorded", without_fill),
    "fill not first": (run_ring, (), "step.arena:recorded", fill_last),
    "count not advanced": (run_ring, (), "_cuda.kernels:fill_slots", storing_nothing),
    "bucket one too small": (run_ring, (), "step.graphs:Graphs.covering", one_smaller),
    "late read not copied": (run_outputs, (), "step.returns:ReturnRing.own", nothing),
    "read before it is sent": (run_outputs, STUB, "step.returns:ReturnRing.read", unwaited),
    "number of another step": (run_outputs, (), "step.arena:Arena.claim", another_number),
    "return block of another step": (run_outputs, (), "step.arena:Arena.claim", first_place),
    "way back not launched": (run_outputs, (), "step.arena:Arena.launch_send", nothing),
    "counts not reset": (run_failed_launch, STUB, "step.ring:StagingRing.reset", advancing),
    "device count not reset": (run_failed_launch, STUB, "step.arena:Arena._recount", table_as_it_is),
}


def mutate(monkeypatch, path, mutation):
    """Put a mutation in the place of the function that `path` names, "room.module:Class.function"."""
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(f"numbabuf.{module}")
    for each in owners:
        owner = getattr(owner, each)
    monkeypatch.setattr(owner, name, mutation(getattr(owner, name)))


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
    run, _, path, mutation = MUTANTS[name]
    mutate(monkeypatch, path, mutation)
    try:
        wrong = run(controls)
    except Exception as error:  # an error is as good as wrong data: the mutant did not pass
        wrong = [repr(error)]
    if controls is not None:
        controls.clear_errors()
    assert wrong, f"nothing noticed the mutant {name!r}"
