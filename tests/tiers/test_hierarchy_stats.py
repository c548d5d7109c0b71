"""HierarchyStats against an independent count of the same history, figure by figure."""

from collections import Counter

import numpy as np
import pytest

from numbabuf.errors import TierFullError
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers.pool import HierarchicalBufferPool
from numbabuf.tiers.traffic import ORDER

SIZES = (64, 256, 1024, 2048)
"""Sizes that are their own size classes, so that capacity is what was asked for."""


class History:
    """Random calls on a pool, and what a user counts of them: leases, and the tier of each buffer round each call."""

    def __init__(self, seed, **budgets):
        self.pool = HierarchicalBufferPool(**budgets)
        self.random = np.random.default_rng(seed)
        self.entries = []
        self.counts = Counter()

    def some(self, most=3):
        count = min(len(self.entries), int(self.random.integers(1, most + 1)))
        return [self.entries[i] for i in self.random.permutation(len(self.entries))[:count]]

    def act(self, call, *arguments, **options):
        """Make one call, and count which buffers changed their tier."""
        before = {entry: entry.tier for entry in self.entries}
        try:
            return call(*arguments, **options)
        except TierFullError:
            self.counts["refused calls"] += 1
        finally:
            for entry, tier in before.items():
                way = ORDER.index(entry.tier) - ORDER.index(tier)
                if way:
                    self.counts["demotions" if way > 0 else "promotions"] += 1
                    self.counts["moved_bytes"] += entry.nbytes

    def allocate(self):
        spec = BufferSpec(int(self.random.choice(SIZES)), "uint8", Tier.DEVICE)
        entry = self.act(self.pool.allocate, spec, movable=True)
        if entry is None:
            return
        self.entries.append(entry)
        self.counts["allocations"] += 1
        self.counts["allocated_bytes"] += spec.size_bytes
        self.counts["misses"] += entry.generation == 1  # the first lease of new memory

    def release(self):
        for entry in self.some(1):
            self.entries.remove(entry)
            self.counts["released_bytes"] += entry.nbytes
            self.counts["released"] += 1
            entry.release()

    def use(self):
        in_place = bool(self.random.integers(2))
        entries = self.some()
        lease = self.pool.use(entries, in_place=in_place)
        if self.act(lease.__enter__) is not None:
            self.counts["in_place"] += sum(entry.tier is not Tier.DEVICE for entry in entries)
            lease.__exit__(None, None, None)

    def move(self):
        name = str(self.random.choice(["promote", "demote", "prefetch"]))
        self.act(getattr(self.pool, name), self.some())

    def run(self, steps):
        for _ in range(steps):
            getattr(self, str(self.random.choice(["allocate", "release", "use", "use", "move"])))()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("managed", [0, 2048])
def test_every_figure_is_what_was_counted(seed, managed):
    history = History(seed, device_bytes=4096, pinned_bytes=16384, managed_bytes=managed, policy="lru")
    pool, counts = history.pool, history.counts
    with pool.statistics() as scope:
        history.run(150)
    said = pool.stats()
    for name in ("allocations", "allocated_bytes", "misses", "promotions", "demotions", "in_place"):
        assert getattr(said, name) == counts[name], name
    assert said.exact_hits + said.class_hits + said.misses == said.allocations
    assert said.hit_rate == 1 - counts["misses"] / counts["allocations"]
    assert said.moved_bytes <= counts["moved_bytes"] and said.clean_demotions <= said.demotions
    assert dict(said.buffers_by_tier) == {tier: sum(entry.tier is tier for entry in history.entries) for tier in Tier}
    assert said.refused <= said.in_place and said.settled <= said.reserved_count + said.freed and said.lost == 0
    within = scope.stats()
    assert (within.total_count, within.total_bytes) == (counts["allocations"], counts["allocated_bytes"])
    assert within.current_count == len(history.entries)
    assert within.current_bytes == sum(entry.nbytes for entry in history.entries)
    assert counts["promotions"] and counts["demotions"] and counts["released"]
    pool.check()
    for entry in history.entries:
        entry.release()
    pool.close()


def test_copies_below_make_demotions_free_until_a_write():
    with HierarchicalBufferPool(device_bytes=1024, pinned_bytes=16384) as pool:
        entry = pool.allocate(BufferSpec(1024, "uint8"), movable=True)
        for write, clean, moved in [(True, 0, 1024), (False, 1, 2048), (False, 2, 3072), (True, 2, 5120)]:
            with pool.use([entry], in_place=False, write=write):
                pass
            pool.demote([entry])
            said = pool.stats()
            assert (said.clean_demotions, said.moved_bytes) == (clean, moved)
        entry.release()
    assert (said.promotions, said.demotions, said.allocations, said.misses) == (3, 4, 1, 1)


def test_a_use_that_fails_counts_nothing():
    with HierarchicalBufferPool(device_bytes=1024, pinned_bytes=16384) as pool:
        entries = [pool.allocate(BufferSpec(1024, "uint8"), movable=True) for _ in range(2)]
        before = pool.stats()
        with pytest.raises(TierFullError):
            pool.use(entries, in_place=False).__enter__()
        assert pool.stats() == before and all(entry.use_count == 0 for entry in entries)
        for entry in entries:
            entry.release()


def test_a_scope_follows_a_buffer_to_memory_of_another_capacity():
    """1000 bytes take 1024 of the device, and exactly what there is of pinned memory."""
    with HierarchicalBufferPool(device_bytes=4096, pinned_bytes=1000) as pool, pool.statistics() as scope:
        entry = pool.allocate(BufferSpec(1000, "uint8"), movable=True)
        assert scope.stats().current_bytes == 1024
        pool.demote([entry])
        assert scope.stats().current_bytes == 1000 and scope.stats().total_bytes == 1024
        entry.release()
        assert (scope.stats().current_bytes, scope.stats().current_count) == (0, 0)
