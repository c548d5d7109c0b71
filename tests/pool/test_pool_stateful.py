"""SimpleBufferPool against a dictionary, and against CuPy's own pinned pool where that is installed."""

import itertools
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from numbabuf.errors import StaleBufferError, TierFullError
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier, size_class

LIMIT = 12_000
SPECS = [BufferSpec(size, "uint8", Tier.PINNED) for size in (0, 1, 900, 1000, 1024, 1025, 4096, 12_001)]
SPECS += [BufferSpec((25, 10), "float32", Tier.PINNED)]
specs = st.sampled_from(SPECS)


def bytes_of(spec):
    return max(1, spec.size_bytes)


class PoolAgainstDictionary(RuleBasedStateMachine):
    """The model: address -> (capacity, spec), and per spec the idle addresses, newest last."""

    def __init__(self):
        super().__init__()
        self.pool = SimpleBufferPool(max_pinned_bytes=LIMIT)
        self.blocks = {}  # address -> capacity
        self.idle = {}  # capacity -> addresses, newest last
        self.last = {}  # address -> the spec that it was leased as last
        self.live = []  # (entry, address, mark)
        self.dead = []
        self.marks = itertools.cycle(range(1, 251))
        self.counts = {"exact_hits": 0, "class_hits": 0, "misses": 0, "lost": 0}
        self.scope = None

    def idle_addresses(self):
        return {address for addresses in self.idle.values() for address in addresses}

    def fitting(self, spec):
        """The idle block that a spec gets: of its own capacity, else of the next larger one; None if there is none."""
        own = size_class(bytes_of(spec))
        sizes = [own, *(size for size in sorted(self.idle) if bytes_of(spec) <= size < 2 * own)]
        return next((self.idle[size][-1] for size in sizes if self.idle.get(size)), None)

    @rule(spec=specs)
    def allocate(self, spec):
        held = sum(self.blocks.values()) - sum(self.blocks[address] for address in self.idle_addresses())
        found = self.fitting(spec)
        if found is None and held + bytes_of(spec) > LIMIT:
            with pytest.raises(TierFullError):
                self.pool.allocate(spec)
            self.forget_idle()  # the ladder has trimmed: what is idle now is the pool's to say
            return
        entry = self.pool.allocate(spec)
        address = entry.address
        if found is not None:
            assert address == found
            self.take(address)
            self.counts["exact_hits" if self.last[address] == spec else "class_hits"] += 1
        else:
            self.counts["misses"] += 1
            self.forget_idle()
            if address in self.idle_addresses():  # a block was freed, and the system gave its address to the new one
                self.take(address)
                del self.blocks[address]
            assert address not in self.blocks
            self.blocks[address] = entry._held[0].block.nbytes
            assert bytes_of(spec) <= self.blocks[address] <= size_class(bytes_of(spec))
        self.last[address] = spec
        mark = next(self.marks)
        entry.array.fill(mark)
        self.live.append((entry, address, mark))

    def take(self, address):
        for addresses in self.idle.values():
            if address in addresses:
                addresses.remove(address)

    def forget_idle(self):
        """After a trim: drop from the model what the pool has freed, and nothing else."""
        there = {block.address for block in self.pool._store.blocks}
        for address in self.idle_addresses() - there:
            self.take(address)
            del self.blocks[address]

    def read_idle(self):
        """After a reservation, one that failed too: the pool says what is idle, and in which order."""
        self.idle = {}
        for handle in self.pool._store.idle():
            block = handle.block
            self.blocks[block.address] = block.nbytes
            self.last[block.address] = block.spec
            self.idle.setdefault(block.nbytes, []).append(block.address)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        entry, address, mark = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        assert (entry.array == mark).all()
        entry.release()
        self.idle.setdefault(self.blocks[address], []).append(address)
        self.dead.append(entry)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data):
        entry, address, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        del entry
        self.counts["lost"] += 1
        assert self.pool.stats().lost == self.counts["lost"]  # which brings it home
        self.idle.setdefault(self.blocks[address], []).append(address)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def use_after_release(self, data):
        entry = data.draw(st.sampled_from(self.dead))
        for use in (entry.release, lambda: entry.array, lambda: entry.address):
            with pytest.raises(StaleBufferError):
                use()

    @rule()
    def clear(self):
        self.pool.clear()
        for address in self.idle_addresses():
            del self.blocks[address]
        self.idle.clear()

    @rule(max_bytes=st.integers(0, LIMIT))
    def trim(self, max_bytes):
        idle = sum(self.blocks[address] for address in self.idle_addresses())
        total = sum(self.blocks.values())
        freed = self.pool.trim(max_bytes)
        assert (freed == 0) == (total <= max_bytes or not idle)
        assert total - freed <= max(max_bytes, total - idle)
        self.forget_idle()
        assert sum(self.blocks.values()) == total - freed

    @rule(wanted=st.lists(specs, max_size=4))
    def reserve(self, wanted):
        before = self.idle_addresses()
        try:
            self.pool.reserve(wanted)
        except TierFullError:
            self.forget_idle()
            there = {block.address for block in self.pool._store.blocks}
            assert there == set(self.blocks), "a reservation that failed left a buffer behind"
            self.read_idle()
            return
        self.forget_idle()
        self.read_idle()
        for spec in wanted:
            own = size_class(bytes_of(spec))
            alike = [
                other for other in wanted if size_class(bytes_of(other)) == own and other.size_bytes >= spec.size_bytes
            ]  # fmt: skip
            there = [size for size, idle in self.idle.items() for _ in idle if bytes_of(spec) <= size <= own]
            assert len(there) >= len(alike)
        assert before - self.idle_addresses() == before - set(self.blocks)

    @rule()
    def scope_begins_or_ends(self):
        if self.scope is None:
            self.scope = self.pool.statistics()
            self.scope.__enter__()
        else:
            self.scope.__exit__(None, None, None)
            self.scope = None

    @invariant()
    def the_pool_is_right(self):
        self.pool.check()
        stats = self.pool.stats()
        idle = self.idle_addresses()
        assert stats.reserved_bytes == sum(self.blocks.values()) <= LIMIT
        assert stats.reserved_count == len(self.blocks)
        assert stats.idle_bytes == sum(self.blocks[address] for address in idle)
        assert stats.idle_count == len(idle)
        assert stats.in_use_count == len(self.live)
        assert {name: getattr(stats, name) for name in self.counts} == self.counts
        for entry, address, mark in self.live:
            assert entry.address == address
            assert (entry.array == mark).all()

    def teardown(self):
        if self.scope is not None:
            self.scope.__exit__(None, None, None)
        self.pool.close()
        assert self.pool.stats().reserved_count == len(self.live)


class TestPoolAgainstDictionary(PoolAgainstDictionary.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------------------ CuPy's pinned pool


class _Memory:
    """What CuPy's pool asks its allocator for, without a driver: a pointer of its own."""

    pointers = itertools.count(1)

    def __init__(self, size):
        self.size = size
        self.ptr = next(self.pointers) << 20


class PoolAgainstCupy(RuleBasedStateMachine):
    """The same requests to both: the same blocks come back at the same time, and as many are idle.

    The sizes are multiples of CuPy's unit of 512 bytes, each in a size class of its own, where both promise the same.
    """

    @initialize()
    def start(self):
        from cupy.cuda.pinned_memory import PinnedMemoryPointer, PinnedMemoryPool

        self.theirs = PinnedMemoryPool(lambda size: PinnedMemoryPointer(_Memory(size), 0))
        self.ours = SimpleBufferPool()
        self.live = []
        self.same = {}  # our address -> their pointer

    @rule(size=st.sampled_from([512, 1024, 2048, 65536]))
    def allocate(self, size):
        theirs = self.theirs.malloc(size)
        ours = self.ours.allocate(BufferSpec(size, "uint8", Tier.PINNED))
        known = set(self.same.values())
        assert (ours.address in self.same) == (theirs.ptr in known)
        assert self.same.setdefault(ours.address, theirs.ptr) == theirs.ptr
        self.live.append((ours, theirs))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        ours, theirs = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        ours.release()
        theirs.mem.free()

    @rule()
    def free_what_is_idle(self):
        self.theirs.free_all_blocks()
        self.ours.clear()
        live = {ours.address for ours, _ in self.live}
        self.same = {address: pointer for address, pointer in self.same.items() if address in live}

    @invariant()
    def as_many_are_idle(self):
        if hasattr(self, "ours"):
            assert self.ours.stats().idle_count == self.theirs.n_free_blocks()
            self.ours.check()


@pytest.fixture(scope="module")
def cupy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns where there is no GPU
        pytest.importorskip("cupy.cuda.pinned_memory", reason="the comparison needs the package cupy")


@pytest.mark.usefixtures("cupy")
class TestPoolAgainstCupy(PoolAgainstCupy.TestCase):
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
