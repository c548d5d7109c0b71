"""Any sequence of a manager's operations against a NumPy model of its slots; `check()` after each of them.

Steps of random sizes and inputs, by every way of staging, errors in between, slots added, graphs captured and closed,
memory given back: after each rule every byte of every slot is what the model holds, padding included.
"""

import kit
import numpy as np
import pytest
import twins
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from numbabuf import BufferSpec, BusyError, GraphMissingError, InputBufferManager, SimpleBufferPool, _cuda

BUCKETS = {"tokens": (2, 5, 16), "seqs": (1, 4)}
TOKENS, SEQS = st.integers(0, 16), st.integers(0, 4)
KINDS = {  # name: spec, options, element type of the inputs
    "ids": ((16, "int64"), {"pad": 3, "index": True}, np.int64),
    "short": ((16, "int32"), {"source_dtype": "int64", "pad": "repeat_last"}, np.int64),
    "half": ((16, "float16"), {"source_dtype": "float32", "pad": 0.5}, np.float32),
    "kept": ((16, "int16"), {"pad": "keep"}, np.int16),
    "starts": ((5, "int32"), {"axis": "seqs+1", "pad": "repeat_last"}, np.int32),
    "table": (((4, 3), "int32"), {"axis": "seqs", "pad": "repeat_last"}, np.int32),
    "number": (((), "float32"), {"axis": None}, np.float32),
    "whole": (((2, 2), "int64"), {"axis": None, "source_dtype": "int32", "missing": "keep"}, np.int32),
    "late": ((16, "uint8"), {"pad": 9}, np.uint8),
    "later": (((4, 2, 2), "float32"), {"axis": "seqs", "source_dtype": "float64"}, np.float64),
}
FIRST = ("ids", "short", "half", "kept", "starts", "table", "number", "whole")


FUNCTIONS = [lambda step: tuple(step.bucket.values()), lambda step: (*step.bucket.values(),)]
"""Two functions that do the same: one after the other replaces all graphs, one after itself adds to them."""


class Machine(RuleBasedStateMachine):
    """A manager over a pool of its own, and the model of its slots."""

    @initialize(ring=st.integers(1, 3))
    def begin(self, ring):
        self.pool = SimpleBufferPool()
        buckets = {axis: list(sizes) for axis, sizes in BUCKETS.items()}
        self.manager = InputBufferManager(
            self.pool, max_batch_size=1, max_seq_len=16, ring=ring, buckets=buckets, default_slots=False
        )
        for name in FIRST:
            self.register(name)
        self.twin = twins.Slots(self.manager)
        self.captured, self.function = set(), None
        self.addresses = None
        self.steps = 0

    def register(self, name):
        spec, options, _ = KINDS[name]
        self.manager.register_slot(name, BufferSpec(*spec), **options)

    def inputs(self, data, tokens, seqs):
        """Random inputs for a random part of the slots."""
        random = np.random.default_rng(data.draw(st.integers(0, 1000)))
        found = {}
        for name, slot in self.twin.slots.items():
            if random.random() < 0.2:
                continue
            rows = self.twin.rows(name, {"tokens": tokens, "seqs": seqs})
            shape = slot.shape(rows)
            if name == "table":
                shape = (rows, int(random.integers(0, 4)))
            found[name] = random.integers(0, 100, shape).astype(KINDS[name][2])
        return found

    def bucket(self, tokens, seqs):
        sizes = {"tokens": tokens, "seqs": seqs}
        return {axis: next(size for size in BUCKETS[axis] if size >= sizes[axis]) for axis in BUCKETS}

    # ------------------------------------------------------------------------------------------------------------ steps

    @rule(data=st.data(), tokens=TOKENS, seqs=SEQS)
    def stage_inputs(self, data, tokens, seqs):
        inputs = self.inputs(data, tokens, seqs)
        self.manager.stage_inputs(inputs, tokens, seqs=seqs)
        self.twin.step(inputs, self.bucket(tokens, seqs))
        self.steps += 1

    @rule(data=st.data(), tokens=TOKENS, seqs=SEQS)
    def replay(self, data, tokens, seqs):
        inputs = self.inputs(data, tokens, seqs)
        serving = [size for size in sorted(self.captured) if size[0] >= tokens and size[1] >= seqs]
        if not serving:
            with pytest.raises((GraphMissingError, ValueError)):
                self.manager.replay(inputs, tokens, seqs=seqs)
            return
        assert self.manager.replay(inputs, tokens, seqs=seqs) == serving[0]
        self.twin.step(inputs, dict(zip(("tokens", "seqs"), serving[0], strict=True)))
        self.steps += 1

    @rule(data=st.data(), tokens=TOKENS, seqs=SEQS, keep=st.booleans())
    def lease(self, data, tokens, seqs, keep):
        inputs = self.inputs(data, tokens, seqs)
        inputs.pop("table", None)  # a lease writes whole rows
        lease = self.manager.stage(tokens, seqs=seqs)
        for name, values in inputs.items():
            lease[name][...] = values
        if not keep:
            lease.discard()
            return
        lease.fill()
        self.twin.step(inputs, self.bucket(tokens, seqs))
        self.steps += 1

    @rule(data=st.data(), rows=TOKENS)
    def set_data(self, data, rows):
        values = np.arange(rows) + data.draw(st.integers(0, 50))
        self.manager.get_slot("ids").set_data(values)
        padded = self.bucket(rows, 0)["tokens"]
        self.twin.contents["ids"] = twins.fill_slot(self.twin.contents["ids"], values, padded, 3)

    @rule(data=st.data(), tokens=TOKENS, seqs=SEQS)
    def refused(self, data, tokens, seqs):
        inputs = self.inputs(data, tokens, seqs)
        inputs["short"] = np.full(tokens + 1, 1 << 40)
        for call in (self.manager.stage_inputs, self.manager.replay):
            with pytest.raises((ValueError, OverflowError, GraphMissingError)):
                call(inputs, tokens, seqs=seqs)

    # ----------------------------------------------------------------------------------------------------------- graphs

    @rule(size=st.sampled_from([(5, 4), (16, 4), (16, 1)]))
    def capture(self, size):
        with self.manager.capture(size[0], seqs=size[1]) as step:
            step.result = size
        self.captured.add(size)

    @rule(sizes=st.sets(st.sampled_from([(2, 1), (5, 4), (16, 4)]), min_size=1), fn=st.sampled_from(FUNCTIONS))
    def capture_buckets(self, sizes, fn):
        wanted = [{"tokens": tokens, "seqs": seqs} for tokens, seqs in sizes]
        self.manager.capture_buckets(fn, wanted)
        self.captured = sizes | self.captured if fn is self.function else sizes
        self.function = fn

    @rule(size=st.sampled_from([(5, 4), (16, 1)]))
    def capture_that_fails(self, size):
        with pytest.raises(ZeroDivisionError), self.manager.capture(size[0], seqs=size[1]):
            raise ZeroDivisionError

    @rule()
    def close_graphs(self):
        self.manager.close_graphs()
        self.captured, self.function = set(), None

    # ----------------------------------------------------------------------------------------------------------- memory

    @precondition(lambda self: len(self.twin.slots) < len(KINDS))
    @rule()
    def add_slot(self):
        name = list(KINDS)[len(self.twin.slots)]
        if self.captured:
            with pytest.raises(BusyError):
                self.register(name)
            return
        self.register(name)
        grown = twins.Slots(self.manager)
        grown.contents.update(self.twin.contents)
        grown.written = self.twin.written
        self.twin, self.addresses = grown, None

    @rule()
    def release_all(self):
        self.manager.release_all()
        assert self.pool.stats().in_use_count == 0
        self.twin = twins.Slots(self.manager)
        self.captured, self.addresses, self.function = set(), None, None

    # ------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def slots_hold_what_the_model_holds(self):
        self.twin.assert_same(kit.contents(self.manager))
        self.manager.check()

    @invariant()
    def addresses_stay_while_the_slots_do(self):
        arrays = self.manager.get_static_tensors()
        found = {name: _cuda.address(array) for name, array in arrays.items()}
        self.addresses = found if self.addresses is None else self.addresses
        assert found == self.addresses

    @invariant()
    def counts_agree(self):
        stats = self.manager.stats()
        assert stats.steps == self.steps == sum(stats.buckets.values())
        assert stats.graphs == len(self.captured)

    def teardown(self):
        if not hasattr(self, "manager"):
            return
        self.manager.close()
        assert self.pool.stats().in_use_count == 0
        self.pool.check()
        self.pool.close()


Machine.TestCase.settings = settings(max_examples=60 if kit.SIM else 80, stateful_step_count=30, deadline=None)
TestManager = Machine.TestCase
