"""SimpleBufferPool from many threads: nothing shared, nothing lost, limits and snapshots right at every instant."""

import gc
import random
import sys
import threading

import pytest

from numbabuf.errors import StaleBufferError, TierFullError
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier

THREADS = 6


@pytest.fixture(autouse=True)
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*functions):
    """Run the functions at once, one thread each, from a common start; raise what the first of them raised."""
    barrier = threading.Barrier(len(functions))
    failures = []

    def run(function):
        try:
            barrier.wait(60)
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failures:
        raise failures[0]


def pinned(size):
    return BufferSpec(size, "uint8", Tier.PINNED)


def worker(pool, seed, rounds, specs, drop=0.0):
    """Lease, write, let the others run, read back, release."""
    chance = random.Random(seed)

    def run():
        held = []
        for turn in range(rounds):
            entry = pool.allocate(specs[chance.randrange(len(specs))])
            mark = (seed * 37 + turn) % 251
            entry.array[:] = mark
            held.append((entry, mark))
            if len(held) > chance.randrange(4):
                entry, mark = held.pop(chance.randrange(len(held)))
                assert (entry.array == mark).all(), "two leases share memory"
                if chance.random() >= drop:
                    entry.release()
        for entry, mark in held:
            assert (entry.array == mark).all(), "two leases share memory"
            entry.release()

    return run


def test_no_byte_is_shared_and_every_lease_is_counted():
    specs = [pinned(size) for size in (64, 65, 500, 512)]
    rounds = 2000
    with SimpleBufferPool() as pool:
        together(*(worker(pool, seed, rounds, specs) for seed in range(THREADS)))
        pool.check()
        stats = pool.stats()
        assert stats.allocations == THREADS * rounds
        assert (stats.in_use_count, stats.lost) == (0, 0)
        assert stats.misses == stats.reserved_count <= THREADS * 4 * len(specs)


def test_of_many_releases_one_succeeds():
    with SimpleBufferPool() as pool:
        for _ in range(60):
            entry = pool.allocate(pinned(64))
            outcomes = []

            def release(entry=entry, outcomes=outcomes):
                try:
                    entry.release()
                    outcomes.append("released")
                except StaleBufferError:
                    outcomes.append("stale")

            together(*[release] * THREADS)
            assert sorted(outcomes) == ["released"] + ["stale"] * (THREADS - 1)
            pool.check()
        assert pool.stats().reserved_count == 1


def test_snapshots_add_up_and_limits_hold_while_others_lease():
    limit = 4096
    specs = [pinned(size) for size in (100, 256, 700, 1024)]
    running = [True]
    with SimpleBufferPool(max_pinned_bytes=limit) as pool:

        def lease(seed):
            chance = random.Random(seed)

            def run():
                for _ in range(150):
                    try:
                        entry = pool.allocate(specs[chance.randrange(len(specs))])
                    except TierFullError:
                        continue
                    entry.array[:] = 1
                    entry.release()

            return run

        def observe():
            while running[0]:
                stats = pool.stats()
                assert stats.in_use_bytes + stats.idle_bytes + stats.pending_bytes == stats.reserved_bytes <= limit
                assert stats.in_use_count + stats.idle_count + stats.pending_count == stats.reserved_count
                assert min(stats.in_use_bytes, stats.idle_bytes, stats.pending_bytes, stats.exact_hits) >= 0
                pool.check()

        def lease_all():
            try:
                together(*(lease(seed) for seed in range(THREADS - 1)))
            finally:
                running[0] = False

        together(lease_all, observe)
        assert pool.stats().peak_bytes <= limit
        assert pool.stats().in_use_count == 0


def test_everything_at_once():
    specs = [pinned(size) for size in (64, 72, 4096)]
    with SimpleBufferPool() as pool:

        def disturb():
            for turn in range(60):
                with pool.statistics() as scope:
                    pool.allocate(specs[turn % 3]).release()
                assert scope.stats().total_count >= 1
                (pool.clear, lambda: pool.trim(5000), lambda: pool.reserve(specs), gc.collect)[turn % 4]()
                pool.check()

        together(disturb, *(worker(pool, seed, 200, specs, drop=0.2) for seed in range(THREADS - 1)))
        gc.collect()
        stats = pool.stats()
        assert stats.in_use_count == 0 and stats.lost > 0
        assert stats.allocations == 200 * (THREADS - 1) + 60
        pool.check()


def test_closing_while_others_lease():
    from numbabuf.errors import ClosedError

    for _ in range(10):
        pool = SimpleBufferPool()

        def lease(pool=pool):
            try:
                while True:
                    entry = pool.allocate(pinned(64))
                    entry.array[:] = 1
                    entry.release()
            except ClosedError:
                pass

        together(lease, lease, pool.close)
        assert pool._store.ledger.total == 0, "freed without anybody looking"
