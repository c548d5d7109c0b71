"""HierarchicalBufferPool against a shadow: whatever is moved, used, lost or refused, contents are what was written.

`Churn` takes steps by name; Hypothesis drives it here, seeded random choices drive it on the stand-in driver.
"""

import contextlib
import gc
import logging

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from numbabuf import _cuda
from numbabuf._cuda import cuda
from numbabuf.errors import BusyError, TierFullError
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers.pool import HierarchicalBufferPool

BUDGETS = {Tier.DEVICE: 1536, Tier.MANAGED: 768, Tier.PINNED: 6144}
SIZES = (0, 1, 33, 100, 256, 300, 600, 1000)
THREADS = 1 if _cuda.SIM else 32


@cuda.jit
def add_index(array, seed):
    """array[i] = array[i] * 3 + i + seed, modulo 256: what comes of it depends on all that was there."""
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = (int(array[i]) * 3 + i + seed) & 255


@cuda.jit
def set_index(array, seed):
    """array[i] = i + seed, modulo 256"""
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = (i + seed) & 255


def ramp(size, seed):
    return ((np.arange(size) + seed) & 255).astype(np.uint8)


def bytes_of(block, nbytes):
    """What lies in a block right now; the caller has waited for all work."""
    view = _cuda.device_view(block.memory.base, 0, (nbytes,), np.dtype(np.uint8))
    return view.copy_to_host() if nbytes else np.empty(0, np.uint8)


class Churn:
    """A pool, its entries, and the bytes that each must hold. A step may be refused for lack of room, and only so."""

    refusals = (TierFullError, BusyError)

    def __init__(self, **options):
        budgets = {f"{tier.value}_bytes": budget for tier, budget in BUDGETS.items()}
        self.pool = HierarchicalBufferPool(**{**budgets, **options})
        self.streams = [_cuda.as_stream(None) for _ in range(2)]
        self.shadow = {}  # entry -> bytes
        self.fixed = {}  # entry that does not move -> address, bytes
        self.graphs = {}  # entry -> graph
        self.steps = 0
        scratch = _cuda.device_view(_cuda.empty_device(1), 0, (1,), np.dtype(np.uint8))
        for kernel in (add_index, set_index):  # compiled here, as no capture may do
            _cuda.launch(kernel, 1, THREADS, self.streams[0], scratch, 0)
        self.streams[0].synchronize()

    def step(self, name, *arguments):
        """Take one step; returns whether it was carried out."""
        self.steps += 1
        try:
            getattr(self, name)(*arguments)
        except self.refusals:
            return False
        return True

    def entry(self, index):
        return list(self.shadow)[index % len(self.shadow)]

    # ----- steps

    def allocate(self, size, tier):
        entry = self.pool.allocate(BufferSpec(SIZES[size % len(SIZES)], "uint8", tier), movable=True)
        try:
            with self.pool.use([entry], stream=self.streams[0]) as (array,):
                if entry.nbytes:
                    _cuda.launch(set_index, 1, THREADS, self.streams[0], array, self.steps)
        except BaseException:
            entry.release()
            raise
        self.shadow[entry] = ramp(entry.nbytes, self.steps)

    def write(self, index, which, count=1, in_place=True):
        entries = list(dict.fromkeys(self.entry(index + i) for i in range(count)))
        stream = self.streams[which]
        with self.pool.use(entries, stream=stream, in_place=in_place) as arrays:
            for entry, array in zip(entries, arrays, strict=True):
                if entry.nbytes:
                    _cuda.launch(add_index, 1, THREADS, stream, array, self.steps)
                    self.shadow[entry] = self.shadow[entry] * 3 + ramp(entry.nbytes, self.steps)

    def read(self, index, which, in_place=True):
        entry, stream = self.entry(index), self.streams[which]
        with self.pool.use([entry], stream=stream, write=False, in_place=in_place) as (array,):
            found = array.copy_to_host(stream=stream.numba) if entry.nbytes else np.empty(0, np.uint8)
        stream.synchronize()
        assert found.tobytes() == self.shadow[entry].tobytes(), f"step {self.steps}: {entry!r}"

    def plain(self, size, tier):
        """Lease a buffer that does not move, among those that do; the pool orders the stream it names."""
        entry = self.pool.allocate(BufferSpec(SIZES[size % len(SIZES)], "uint8", tier), stream=self.streams[0])
        if entry.nbytes:
            _cuda.launch(set_index, 1, THREADS, self.streams[0], entry.device_array, self.steps)
        self.fixed[entry] = entry.address, ramp(entry.nbytes, self.steps)

    def unplain(self, index):
        if self.fixed:
            entry = list(self.fixed)[index % len(self.fixed)]
            del self.fixed[entry]
            entry.release()

    def promote(self, index):
        self.pool.promote([self.entry(index)])
        assert self.entry(index).tier is Tier.DEVICE

    def prefetch(self, index):
        self.pool.prefetch([self.entry(index), *([self.entry(index + 1)] if len(self.shadow) > 1 else [])])

    def demote(self, index, tier):
        self.pool.demote([self.entry(index)], tier=tier)

    def release(self, index, which):
        entry = self.entry(index)
        entry.release(stream=[None, *self.streams][which])
        del self.shadow[entry]

    def lose(self, index):
        entry = self.entry(index)
        del self.shadow[entry]
        del entry
        gc.collect()

    def pressure(self, size):
        self.pool.allocate(BufferSpec(size, "uint8", Tier.DEVICE), movable=True).release()

    def trim(self, nbytes):
        self.pool.trim(nbytes)

    def bind(self, index):
        """Capture a graph over an entry."""
        entry, stream = self.entry(index), self.streams[0]
        if entry in self.graphs or not entry.nbytes:
            return
        self.pool.promote([entry])
        with self.pool.use([entry], stream=stream):
            pass  # the capture below may wait for nothing
        stream.synchronize()
        capture = _cuda.Capture(stream)
        capture.begin()
        with self.pool.use([entry], stream=stream) as (array,):
            _cuda.launch(add_index, 1, THREADS, stream, array, 7)
        self.graphs[entry] = capture.end(), entry.handle.block.address

    def replay(self, index):
        if not self.graphs:
            return
        entry = list(self.graphs)[index % len(self.graphs)]
        graph, address = self.graphs[entry]
        with self.pool.use([entry], stream=self.streams[0]):
            assert entry.address == address, f"{entry!r} left the memory that its graph knows"
            graph.launch_on(self.streams[0].core)
        self.shadow[entry] = self.shadow[entry] * 3 + ramp(entry.nbytes, 7)

    def unbind(self, index):
        if self.graphs:
            entry = list(self.graphs)[index % len(self.graphs)]
            _cuda.synchronize()
            self.graphs.pop(entry)[0].close()

    # ----- what must hold

    def check(self, contents=True):
        self.pool.check()
        for tier, budget in BUDGETS.items():
            assert self.pool._store.ledger.reserved[tier] + self.pool._store.ledger.promised[tier] <= budget
        if contents:
            _cuda.synchronize()
            for entry, wanted in self.shadow.items():
                assert bytes_of(entry.handle.block, entry.nbytes).tobytes() == wanted.tobytes(), repr(entry)
                if entry.record.copy is not None:
                    assert bytes_of(entry.record.copy.block, entry.nbytes).tobytes() == wanted.tobytes(), repr(entry)
            for entry, (address, wanted) in self.fixed.items():
                found = entry.device_array.copy_to_host() if entry.nbytes else wanted
                assert (entry.address, found.tobytes()) == (address, wanted.tobytes()), repr(entry)

    def close(self):
        for graph, _ in self.graphs.values():
            _cuda.synchronize()
            graph.close()
        self.graphs.clear()
        for entry in (*self.shadow, *self.fixed):
            entry.release()
        self.shadow.clear()
        self.fixed.clear()
        self.pool.close()
        self.pool.check()
        assert self.pool.stats().reserved_bytes == 0


STEPS = {
    "allocate": 4, "write": 4, "read": 4, "promote": 2, "demote": 3, "prefetch": 1, "release": 2, "lose": 1,
    "pressure": 1, "trim": 1, "plain": 1, "unplain": 2, "bind": 1, "replay": 2, "unbind": 1,
}  # fmt: skip


def random_step(churn, rng, names=tuple(STEPS)):
    """One step drawn by weight: (name, arguments)."""
    weights = np.array([STEPS[name] for name in names], float)
    name = "allocate" if not churn.shadow else str(rng.choice(names, p=weights / weights.sum()))
    index, which = int(rng.integers(64)), int(rng.integers(2))
    tier = list(Tier)[rng.integers(3)]
    arguments = {
        "allocate": (index, tier), "plain": (index, tier),
        "write": (index, which, int(rng.integers(1, 4)), bool(rng.integers(4))),
        "read": (index, which, bool(rng.integers(4))), "demote": (index, tier if rng.integers(2) else None),
        "release": (index, int(rng.integers(3))), "pressure": (int(rng.integers(1, 1537)),),
        "trim": (int(rng.integers(4096)),),
    }.get(name, (index,))  # fmt: skip
    return name, arguments


def may_leave(churn, name, arguments):
    """A buffer whose graph is alive is neither released nor lost here: its address would be used after it."""
    return name not in ("release", "lose") or churn.entry(arguments[0]) not in churn.graphs


@pytest.mark.parametrize("seed, policy", [(0, "frequency"), (1, "lru"), (2, "frequency")])
def test_a_thousand_random_steps(seed, policy, caplog):
    caplog.set_level(logging.ERROR, "numbabuf")  # lost buffers are reported, and many are lost here
    rng = np.random.default_rng(seed)
    churn = Churn(policy=policy)
    done = 0
    for _ in range(1000):
        name, arguments = random_step(churn, rng)
        if may_leave(churn, name, arguments):
            done += churn.step(name, *arguments)
            churn.check()
    stats = churn.pool.stats()
    assert done > 500 and stats.promotions > 50 and stats.demotions > 50 and stats.clean_demotions > 5
    churn.close()


class Machine(RuleBasedStateMachine):
    """The same steps, chosen and shortened by Hypothesis."""

    def __init__(self):
        super().__init__()
        self.churn = Churn()
        self.leases = contextlib.ExitStack()
        self.held = set()

    some = precondition(lambda self: self.churn.shadow)
    indices = st.integers(0, 15)
    which = st.integers(0, 1)
    tiers = st.sampled_from(list(Tier))

    @rule(size=st.integers(0, len(SIZES) - 1), tier=tiers)
    def allocate(self, size, tier):
        self.churn.step("allocate", size, tier)

    @rule(size=st.integers(0, len(SIZES) - 1), tier=tiers)
    def plain(self, size, tier):
        self.churn.step("plain", size, tier)

    @some
    @rule(index=indices, which=which, count=st.integers(1, 3), in_place=st.booleans())
    def write(self, index, which, count, in_place):
        self.churn.step("write", index, which, count, in_place)

    @some
    @rule(index=indices, which=which, in_place=st.booleans())
    def read(self, index, which, in_place):
        self.churn.step("read", index, which, in_place)

    @some
    @rule(
        index=indices,
        name=st.sampled_from(["promote", "prefetch", "unplain", "bind", "replay", "unbind"]),
    )
    def by_hand(self, index, name):
        self.churn.step(name, index)

    @some
    @rule(index=indices, tier=st.none() | tiers)
    def demote(self, index, tier):
        self.churn.step("demote", index, tier)

    @some
    @rule(index=indices)
    def hold(self, index):
        """A lease that stays open over later steps: the buffer must not move, nor be released."""
        entry = self.churn.entry(index)
        self.leases.enter_context(self.churn.pool.use([entry], stream=None, write=False))
        self.held.add((entry, entry.address))

    @rule()
    def leave(self):
        self.leases.close()
        self.held.clear()

    @some
    @rule(index=indices, which=st.integers(0, 2))
    def release(self, index, which):
        if may_leave(self.churn, "release", (index,)):
            self.churn.step("release", index, which)

    @rule(size=st.integers(1, 1536))
    def pressure(self, size):
        self.churn.step("pressure", size)

    @rule(nbytes=st.integers(0, 4096))
    def trim(self, nbytes):
        self.churn.step("trim", nbytes)

    @invariant()
    def holds(self):
        self.churn.check()
        for entry, address in self.held:
            assert entry.address == address

    def teardown(self):
        self.leases.close()
        self.churn.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
