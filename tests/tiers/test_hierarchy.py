"""HierarchicalBufferPool: the pool contract, and what it adds: tiers, moves, leases, pressure, graphs."""

import contextlib
import gc
import os
import pathlib
import subprocess
import sys
import threading

import kit
import numpy as np
import pytest
from pool_contract import PoolContract

from numbabuf import _cuda
from numbabuf._cuda import cuda
from numbabuf.errors import BusyError, CaptureError, ClosedError, StaleBufferError, TierFullError
from numbabuf.pool.block import same_stream
from numbabuf.pool.spec import BufferSpec, BufferState, Tier
from numbabuf.step.manager import InputBufferManager
from numbabuf.tiers import mover as movers
from numbabuf.tiers import traffic
from numbabuf.tiers.entry import MovableEntry
from numbabuf.tiers.policies import LRU, Frequency
from numbabuf.tiers.pool import HierarchicalBufferPool

MIB = 1 << 20
ROOT = pathlib.Path(__file__).resolve().parents[2]


@cuda.jit
def doubled(source, out):
    """out[: source.size] = 2 * source"""
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        out[i] = 2 * source[i]


@cuda.jit
def set_all(array, value):
    """array[:] = value"""
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


class TestHierarchicalBufferPool(PoolContract):
    """No user of a plain pool notices the tiers."""

    def make_pool(self, *, max_bytes=64 * MIB, max_pinned_bytes=64 * MIB, **options):
        return HierarchicalBufferPool(
            device_bytes=max_bytes, managed_bytes=max_bytes, pinned_bytes=max_pinned_bytes, **options
        )


@pytest.fixture
def make():
    """Makes small pools; each is checked at the end."""
    pools = []

    def make(device=4096, pinned=16384, managed=0, **options):
        pools.append(HierarchicalBufferPool(device_bytes=device, pinned_bytes=pinned, managed_bytes=managed, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.check()


@pytest.fixture
def stream():
    return _cuda.as_stream(None)


def spec(size, tier=Tier.DEVICE):
    return BufferSpec(size, "uint8", tier)


def write(pool, entry, value, stream):
    with pool.use([entry], stream=stream) as (array,):
        _cuda.launch(set_all, 1, 1, stream, array, value)


def read(pool, entry, stream):
    with pool.use([entry], stream=stream, write=False) as (array,):
        found = array.copy_to_host(stream=stream.numba)
    stream.synchronize()
    return found


def settled(stats):
    """What a failed step must leave as it was."""
    return {
        name: getattr(stats, name)
        for name in (
            "in_use_bytes",
            "in_use_count",
            "promotions",
            "demotions",
            "in_place",
            "moved_bytes",
            "buffers_by_tier",
        )
    }


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": -1}, ValueError, "device_bytes is -1"),
        ({"managed": -1}, ValueError, "managed_bytes is -1"),
        ({"device": 1.5}, TypeError, "whole number"),
        ({"policy": "clever"}, ValueError, "frequency, lru"),
        ({"policy": 3}, TypeError, "Policy"),
        ({"on_oom": 3}, TypeError, "on_oom"),
    ],
)
def test_wrong_arguments(options, error, text):
    budgets = {"device_bytes": 1, "pinned_bytes": 1}
    budgets.update({f"{key}_bytes" if key in ("device", "managed") else key: value for key, value in options.items()})
    with pytest.raises(error, match=text):
        HierarchicalBufferPool(**budgets)


def test_a_policy_serves_one_pool(make):
    own = Frequency()
    for options in ({"on_oom": 3}, {"events": -1}):
        with pytest.raises((TypeError, ValueError)):
            make(policy=own, **options)
    make(policy=own)
    with pytest.raises(ValueError, match="another pool.*give each pool its own"):
        make(policy=own)


def test_only_this_pools_live_entries_are_taken(make, stream):
    pool, other = make(), make()
    mine, theirs, dead = (each.allocate(spec(8), movable=True) for each in (pool, other, pool))
    dead.release()
    calls = [
        lambda entries: pool.use(entries, stream=stream).__enter__(),
        pool.promote,
        pool.demote,
        pool.prefetch,
    ]
    for call in calls:
        for entries, error in (
            ([theirs], ValueError),
            ([mine, mine], ValueError),
            ([dead], StaleBufferError),
            ([3], TypeError),
        ):
            with pytest.raises(error):
                call(entries)
    with pytest.raises(TypeError, match="no stream"):
        pool.use([mine], stream="stream").__enter__()
    assert mine.movable and not mine.record.users
    mine.release()
    theirs.release()


# ------------------------------------------------------------------------------------------------------------ placing


def test_pressure_demotes_the_coldest(make, stream):
    pool = make(policy="lru")
    a, b, c = (pool.allocate(spec(2048), movable=True) for _ in "abc")
    assert [e.tier for e in (a, b, c)] == [Tier.PINNED, Tier.DEVICE, Tier.DEVICE], (
        "c made a go: the coldest of two unused"
    )
    write(pool, b, 1, stream)
    write(pool, c, 2, stream)
    write(pool, b, 3, stream)
    d = pool.allocate(spec(1000), movable=True)
    assert (b.tier, c.tier, d.tier) == (Tier.DEVICE, Tier.PINNED, Tier.DEVICE)
    assert (read(pool, b, stream) == 3).all() and (read(pool, c, stream) == 2).all()


def test_where_nothing_can_go_the_next_tier_is_taken(make):
    pool = make(device=1024, managed=1024, pinned=1024)
    fixed = pool.allocate(spec(1024))
    assert fixed.array.size == 1024 and fixed.tier is Tier.DEVICE
    entries = [pool.allocate(spec(1024), movable=True) for _ in range(2)]
    assert [entry.tier for entry in entries] == [Tier.PINNED, Tier.MANAGED], "there too the colder makes room"


def test_the_last_tier_full_is_an_error_with_the_account(make):
    pool = make(device=1024, pinned=1024)
    held = [pool.allocate(spec(1024), movable=True) for _ in range(2)]
    before = settled(pool.stats())
    for tier in (Tier.DEVICE, Tier.PINNED, Tier.MANAGED):
        with pytest.raises(TierFullError, match=f"{tier.value} memory and there is no room"):
            pool.allocate(spec(1024, tier), movable=True)
    assert settled(pool.stats()) == before
    assert {entry.tier for entry in held} == {Tier.DEVICE, Tier.PINNED}


def test_a_demotion_goes_to_managed_memory_while_there_is_room(make, stream):
    pool = make(device=1024, managed=1024)
    a, b, c = (pool.allocate(spec(1024), movable=True) for _ in "abc")
    assert (a.tier, b.tier, c.tier) == (Tier.MANAGED, Tier.PINNED, Tier.DEVICE)
    pool.demote([a])
    pool.demote([a])
    assert pool.tier_of(a) is Tier.PINNED


def test_managed_memory_is_never_more_than_the_card_has_free(make, monkeypatch):
    pool = make(device=1 << 20, managed=1 << 20)
    free = 10_000
    monkeypatch.setattr(_cuda, "memory_info", lambda: (free, 1 << 30))
    held = [pool.allocate(spec(4096, Tier.MANAGED), movable=True) for _ in range(3)]
    assert [entry.tier for entry in held] == [Tier.PINNED, Tier.MANAGED, Tier.MANAGED], "one made room"
    for refused in (spec(4096, Tier.MANAGED), spec(2000, Tier.DEVICE)):  # the managed may come to need what is free
        with pytest.raises(TierFullError, match="do not fit"):
            pool.reserve([refused])
    pool.reserve([spec(1000, Tier.DEVICE)])


def test_the_ladder_demotes_where_the_driver_has_less_than_the_budget(make, monkeypatch, stream):
    pool = make(device=1 << 20)
    held = [pool.allocate(spec(1024), movable=True) for _ in range(3)]
    empty, asked = _cuda.empty_device, []

    def two_at_most(nbytes):
        asked.append(nbytes)
        if pool._store.ledger.reserved[Tier.DEVICE] >= 3072:
            raise MemoryError("the driver has no more")
        return empty(nbytes)

    monkeypatch.setattr(_cuda, "empty_device", two_at_most)
    entry = pool.allocate(spec(1000), movable=True)
    stats = pool.stats()
    assert entry.tier is Tier.DEVICE and stats.demotions == 1
    assert (stats.oom.demote, stats.oom.collect, stats.oom.failed) == (1, 0, 0), "a demotion is a rung of its own"
    assert len(asked) >= 2 and [e.tier for e in held].count(Tier.PINNED) == 1


def test_a_short_budget_frees_idle_memory_of_its_own_tier_alone(make):
    pool = make(device=1024, managed=1024)
    pool.allocate(spec(1024, Tier.MANAGED), movable=True).release()
    pool.reserve([spec(1024)])
    pool.reserve([spec(512)])
    assert dict(pool.stats().reserved_by_tier) == {Tier.DEVICE: 512, Tier.MANAGED: 1024, Tier.PINNED: 0}


def test_a_full_card_frees_idle_memory_of_both_tiers_on_it(make, monkeypatch):
    pool = make(device=4096, managed=1024)
    pool.allocate(spec(1024, Tier.MANAGED), movable=True).release()
    empty = _cuda.empty_device

    def nothing_beside_managed(nbytes):
        if pool._store.ledger.reserved[Tier.MANAGED]:
            raise MemoryError("the driver has no more")
        return empty(nbytes)

    monkeypatch.setattr(_cuda, "empty_device", nothing_beside_managed)
    assert pool.allocate(spec(1024), movable=True).tier is Tier.DEVICE
    assert pool.stats().oom.trim == 1 and pool.stats().oom.demote == 0


# ------------------------------------------------------------------------------------------------------------- leases


def test_a_lease_promotes_and_holds(make, stream):
    pool = make(device=2048)
    a, b = pool.allocate(spec(2048), movable=True), pool.allocate(spec(2048), movable=True)
    write(pool, a, 7, stream)
    assert a.tier is Tier.DEVICE
    with pool.use([b], stream=stream, in_place=False) as (array,):
        address = b.address
        assert b.tier is Tier.DEVICE and not b.movable and array is b.device_array
        for move in (pool.demote, pool.promote):
            if move == pool.demote:
                with pytest.raises(BusyError, match="use of it is open"):
                    move([b])
        with pytest.raises(TierFullError):
            pool.promote([a])
        with pytest.raises(BusyError, match="leave its with block"):
            b.release()
        with pool.use([a], stream=stream, write=False) as (in_place,):
            assert a.tier is Tier.PINNED and in_place is not array
        assert b.address == address
    assert b.movable and (read(pool, a, stream) == 7).all()


def test_states_and_counts_of_a_lease(make, stream):
    pool = make()
    entry = pool.allocate(spec(64), movable=True)
    with pool.use([entry], stream=stream):
        assert entry.state is BufferState.IN_USE and entry.use_count == 1 and entry.last_used is not None
    entry.release()
    assert entry.state is BufferState.FREE


def test_an_error_in_the_body_ends_the_lease(make, stream):
    pool = make()
    entry = pool.allocate(spec(64), movable=True)
    with pytest.raises(ZeroDivisionError), pool.use([entry], stream=stream):
        raise ZeroDivisionError
    assert entry.movable


def test_a_clean_copy_makes_demotion_free(make, stream):
    pool = make()
    entry = pool.allocate(spec(1024, Tier.PINNED), movable=True)
    write(pool, entry, 5, stream)
    pool.demote([entry])
    before = pool.stats()
    for _ in range(3):
        with pool.use([entry], stream=stream, write=False, in_place=False):
            pass
        pool.demote([entry])
    after = pool.stats()
    assert after.clean_demotions - before.clean_demotions == 3 == after.launches - before.launches
    assert after.moved_bytes - before.moved_bytes == 3 * 1024
    with pool.use([entry], stream=stream, in_place=False) as (array,):
        _cuda.launch(set_all, 1, 1, stream, array, 6)
    pool.demote([entry])
    assert pool.stats().clean_demotions == after.clean_demotions, "it was written: the copy would be stale"
    assert (read(pool, entry, stream) == 6).all()


def test_copies_give_way_to_buffers(make, stream):
    pool = make(device=2048, pinned=2048)
    entries = [pool.allocate(spec(1024, Tier.PINNED), movable=True) for _ in range(2)]
    pool.promote(entries)
    assert pool.stats().in_use_count == 4 and all(e.record.copy for e in entries)
    more = pool.allocate(spec(2048, Tier.PINNED), movable=True)
    assert more.tier is Tier.PINNED and not any(e.record.copy for e in entries)


def test_a_policy_refuses_what_is_worth_less_than_its_victims(make, stream):
    pool = make(device=1024, policy=Frequency())
    hot, cold = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024, Tier.PINNED), movable=True)
    for _ in range(3):
        write(pool, hot, 1, stream)
    write(pool, cold, 2, stream)
    assert (hot.tier, cold.tier) == (Tier.DEVICE, Tier.PINNED)
    assert pool.stats().refused == 1 == pool.stats().in_place
    for _ in range(3):
        write(pool, cold, 3, stream)
    assert (hot.tier, cold.tier) == (Tier.PINNED, Tier.DEVICE)
    assert (read(pool, hot, stream) == 1).all() and (read(pool, cold, stream) == 3).all()


def test_a_lease_of_many_moves_in_two_batches(make, stream):
    pool = make(device=8 * 256, policy="lru")
    first, second = ([pool.allocate(spec(256), movable=True) for _ in range(8)] for _ in range(2))
    for value, entry in enumerate(first + second):
        write(pool, entry, value, stream)
    before = pool.stats()
    with pool.use(first, stream=stream):
        pass
    after = pool.stats()
    assert all(e.tier is Tier.DEVICE for e in first) and all(e.tier is Tier.PINNED for e in second)
    assert after.launches - before.launches == 2 and after.promotions - before.promotions == 8
    assert [int(read(pool, entry, stream)[0]) for entry in first + second] == list(range(16))


def test_what_must_come_up_and_does_not_fit_is_an_error(make, stream):
    pool = make(device=2048)
    a, b = pool.allocate(spec(2048), movable=True), pool.allocate(spec(2048), movable=True)
    before = settled(pool.stats())
    for call in (lambda: pool.promote([a, b]), lambda: pool.use([a, b], stream=stream, in_place=False).__enter__()):
        with pytest.raises(TierFullError, match="does not fit device memory"):
            call()
        assert settled(pool.stats()) == before and a.movable and b.movable
    pool.prefetch([a, b])
    with pool.use([a, b], stream=stream):
        assert {a.tier, b.tier} == {Tier.DEVICE, Tier.PINNED}


# ------------------------------------------------------------------------------------------------ addresses


ADDRESSES = {
    "array": lambda entry: entry.array,
    "address": lambda entry: entry.address,
    "device_array": lambda entry: entry.device_array,
    "interface": lambda entry: entry.__cuda_array_interface__,
    "dlpack": lambda entry: entry.__dlpack__(),
    "record_stream": lambda entry: entry.record_stream(_cuda.as_stream(0)),
    "mark_in_use": lambda entry: entry.mark_in_use(),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_what_may_move_has_an_address_only_inside_a_use(make, stream, name):
    pool = make()
    entry = pool.allocate(spec(64), movable=True)
    with pytest.raises(BusyError, match=r"pool.use\(\[entry\]\).*without movable=True"):
        ADDRESSES[name](entry)
    with pool.use([entry], stream=stream):
        ADDRESSES[name](entry)
        outcome = elsewhere(lambda: ADDRESSES[name](entry))
        assert isinstance(outcome, BusyError), "another thread is outside of the use"
    with pytest.raises(BusyError):
        ADDRESSES[name](entry)
    assert entry.movable and entry.generation == 1 and entry.nbytes == 64


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.MANAGED, Tier.PINNED])
def test_what_is_not_movable_stays_where_it_was_asked_for(make, stream, tier):
    pool = make(device=2048, managed=2048, pinned=8192, policy="lru")
    plain = pool.allocate(spec(1024, tier))
    address = plain.address
    plain.device_array.copy_to_device(np.full(1024, 7, np.uint8))
    loose = [pool.allocate(spec(1024, tier), movable=True) for _ in range(3)]
    for value, entry in enumerate(loose * 3):
        write(pool, entry, value % 3, stream)
    stream.synchronize()
    assert (plain.tier, plain.address) == (tier, address) and not isinstance(plain, MovableEntry)
    assert (plain.device_array.copy_to_host() == 7).all()
    for call in (pool.promote, pool.demote, pool.prefetch, pool.use):
        with pytest.raises(TypeError, match="movable=True"):
            call([plain])
    assert pool.tier_of(plain) is tier


def test_what_is_not_movable_has_room_made_and_is_refused_without(make):
    pool = make(device=2048)
    loose = pool.allocate(spec(2048), movable=True)
    plain = pool.allocate(spec(1500))
    assert (plain.tier, loose.tier) == (Tier.DEVICE, Tier.PINNED)
    with pytest.raises(TierFullError, match="device memory and there is no room"):
        pool.allocate(spec(2048))
    assert pool.allocate(spec(2048), movable=True).tier is Tier.PINNED, "this one may be anywhere"


@pytest.mark.parametrize("name", ["move_blocks", "engine_bytes"])
def test_numbers_of_moves_are_whole(name):
    for wrong, error in ((0, ValueError), (1.5, TypeError), ("8", TypeError)):
        with pytest.raises(error, match=name):
            HierarchicalBufferPool(device_bytes=64, pinned_bytes=64, **{name: wrong})
    pool = HierarchicalBufferPool(device_bytes=64, pinned_bytes=64, **{name: 8})
    entry = pool.allocate(spec(64), movable=True)
    pool.demote([entry])
    assert entry.tier is Tier.PINNED
    entry.release()
    pool.close()


# ------------------------------------------------------------------------------------------------------------ graphs


@pytest.fixture
def capture(stream):
    """Captures a launch of `set_all` over an entry: (graph, pool) -> Graph."""
    scratch = _cuda.device_view(_cuda.empty_device(8), 0, (8,), np.dtype(np.uint8))
    _cuda.launch(set_all, 1, 1, stream, scratch, 0)
    stream.synchronize()

    def capture(pool, entry, value):
        capture = _cuda.Capture(stream)
        capture.begin()
        try:
            with pool.use([entry], stream=stream) as (array,):
                _cuda.launch(set_all, 1, 1, stream, array, value)
        except BaseException:
            capture.abort()
            raise
        return capture.end()

    return capture


def test_what_a_live_graph_uses_is_not_demoted(make, stream, capture):
    pool = make(device=2048)
    entry = pool.allocate(spec(1024), movable=True)
    write(pool, entry, 1, stream)
    stream.synchronize()
    graph = capture(pool, entry, 2)
    before = settled(pool.stats())
    with pytest.raises(BusyError, match="close the graph first"):
        pool.demote([entry])
    with pytest.raises(TierFullError):
        pool.limits[Tier.DEVICE] = 512
    assert settled(pool.stats()) == before and entry.movable
    with pool.use([entry], stream=stream, write=False):
        graph.launch_on(stream.core)
    assert (read(pool, entry, stream) == 2).all()
    graph.close()
    pool.demote([entry])
    assert entry.tier is Tier.PINNED and (read(pool, entry, stream) == 2).all()


def test_pressure_passes_over_what_a_graph_holds(make, stream, capture):
    pool = make(device=2048, policy="lru")
    bound, loose = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024), movable=True)
    write(pool, bound, 1, stream)
    write(pool, loose, 2, stream)
    stream.synchronize()
    graph = capture(pool, bound, 3)
    write(pool, loose, 2, stream)
    assert pool.allocate(spec(1024), movable=True).tier is Tier.DEVICE
    assert (bound.tier, loose.tier) == (Tier.DEVICE, Tier.PINNED)
    stream.synchronize()
    graph.close()


def test_nothing_moves_during_a_capture(make, stream, capture):
    pool = make(device=2048)
    entry, below = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024, Tier.PINNED), movable=True)
    write(pool, below, 1, stream)
    pool.demote([below])
    stream.synchronize()
    open_capture = _cuda.Capture(stream)
    open_capture.begin()
    try:
        for call in (lambda: pool.promote([below]), lambda: pool.demote([entry])):
            with pytest.raises(CaptureError):
                call()
        pool.prefetch([below])
        with pytest.raises(CaptureError, match="promote"), pool.use([below], stream=stream, in_place=False):
            pass
        with pool.use([below], stream=stream):
            assert below.tier is Tier.PINNED, "read in place"
    finally:
        open_capture.abort()
    assert below.movable and entry.movable
    assert (read(pool, below, stream) == 1).all()


def test_what_a_graph_reads_in_place_stays_there(make, stream, capture):
    pool = make(device=2048)
    entry = pool.allocate(spec(1024, Tier.PINNED), movable=True)
    write(pool, entry, 1, stream)
    pool.demote([entry])
    stream.synchronize()
    graph = capture(pool, entry, 2)
    assert entry.tier is Tier.PINNED
    for insisting in (lambda: pool.promote([entry]), lambda: pool.use([entry], in_place=False).__enter__()):
        with pytest.raises(BusyError, match="close the graph first"):
            insisting()
    with pool.use([entry], stream=stream, write=False):
        graph.launch_on(stream.core)
    assert entry.tier is Tier.PINNED and (read(pool, entry, stream) == 2).all()
    graph.close()
    pool.promote([entry])
    assert entry.tier is Tier.DEVICE and (read(pool, entry, stream) == 2).all()


@contextlib.contextmanager
def capturing_elsewhere(work=lambda stream: None):
    """Another thread has a capture open meanwhile, in which it has called `work`."""
    open_, over, failed = threading.Event(), threading.Event(), []

    def run():
        try:
            mine = _cuda.as_stream(None)
            open_capture = _cuda.Capture(mine)
            open_capture.begin()
            try:
                work(mine)
                open_.set()
                assert over.wait(60)
            finally:
                open_capture.abort()
        except BaseException as error:
            failed.append(error)
            open_.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert open_.wait(60)
        assert not failed
        yield
    finally:
        over.set()
        thread.join(60)
    assert not failed


def test_a_capture_refuses_nothing_to_other_threads(make, stream):
    pool = make(device=4096)
    a, b = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024), movable=True)
    write(pool, a, 1, stream)
    write(pool, b, 2, stream)
    with capturing_elsewhere():
        pool.demote([a])
        with pool.use([b], stream=stream) as (array,):
            _cuda.launch(set_all, 1, 1, stream, array, 3)
        more = pool.allocate(spec(512, Tier.PINNED), movable=True)
        pool.prefetch([more])
        pool.reserve([spec(256, Tier.PINNED)])
        assert a.tier is Tier.PINNED
        pool.promote([a])
        more.release()
        pool.trim(0)
    assert (read(pool, a, stream) == 1).all() and (read(pool, b, stream) == 3).all()


def test_what_another_threads_capture_uses_stays_where_it_is(make, stream):
    pool = make(device=2048, policy="lru")
    bound, loose = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024), movable=True)
    write(pool, bound, 1, stream)
    write(pool, loose, 2, stream)

    def launch(mine):
        with pool.use([bound], stream=mine) as (array,):
            _cuda.launch(set_all, 1, 1, mine, array, 9)

    with capturing_elsewhere(launch):
        write(pool, loose, 2, stream)
        address = bound.handle.block.address
        more = pool.allocate(spec(1024), movable=True)  # pressure, which takes the colder of two but for the capture
        assert (bound.tier, loose.tier) == (Tier.DEVICE, Tier.PINNED) and bound.handle.block.address == address
    more.release()
    assert (read(pool, bound, stream) == 1).all() and (read(pool, loose, stream) == 2).all()


@pytest.mark.parametrize("last", ["lease", "capture"])
def test_a_capture_begun_within_a_lease(make, stream, capture, last):
    """The end of the lease marks nothing then: the event would become part of the graph."""
    pool = make(device=2048)
    entry = pool.allocate(spec(1024), movable=True)
    write(pool, entry, 1, stream)
    stream.synchronize()
    lease, within = pool.use([entry], stream=stream), _cuda.Capture(stream)
    (array,) = lease.__enter__()
    _cuda.launch(set_all, 1, 1, stream, array, 4)
    within.begin()
    if last == "capture":
        lease.__exit__(None, None, None)
    within.end().close()
    if last == "lease":
        lease.__exit__(None, None, None)
    pool.demote([entry])
    pool.promote([entry])
    assert (read(pool, entry, _cuda.as_stream(None)) == 4).all() and entry.movable


def test_a_use_that_cannot_be_marked_is_waited_for(make, stream, monkeypatch):
    pool = make()
    entry = pool.allocate(spec(64, Tier.PINNED), movable=True)
    with monkeypatch.context() as patch, pool.use([entry], stream=stream) as (array,):
        _cuda.launch(set_all, 1, 1, stream, array, 8)
        patch.setattr(pool._store.fences, "behind", lambda *_: (_ for _ in ()).throw(RuntimeError("no event")))
    assert entry.record.fence is None and entry.movable
    pool.demote([entry])
    assert (read(pool, entry, _cuda.as_stream(None)) == 8).all()


# --------------------------------------------------------------------------------------------------------- transactions


@pytest.mark.parametrize("failing", ["launch", "empty_pinned"])
def test_a_failed_move_leaves_everything_where_it_was(make, stream, monkeypatch, failing):
    pool = make()
    entries = [pool.allocate(spec(1024), movable=True) for _ in range(3)]
    for value, entry in enumerate(entries):
        write(pool, entry, value, stream)
    stream.synchronize()
    before, places = settled(pool.stats()), [entry._held[0].block.address for entry in entries]
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, failing, lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError, match="no"):
            pool.demote(entries)
    assert settled(pool.stats()) == before and [e._held[0].block.address for e in entries] == places
    assert all(entry.movable for entry in entries)
    pool.check()
    gc.collect()
    pool.demote(entries)
    assert pool.stats().lost == 0, "the targets went back by hand, not by their loss"
    assert [int(read(pool, entry, stream)[9]) for entry in entries] == [0, 1, 2]


def test_the_third_target_without_room_undoes_the_first_two(make, stream):
    pool = make(device=4096, pinned=2048)
    entries = [pool.allocate(spec(1024), movable=True) for _ in range(3)]
    before = settled(pool.stats())
    with pytest.raises(TierFullError, match="no room for"):
        pool.demote(entries)
    assert settled(pool.stats()) == before and all(entry.tier is Tier.DEVICE for entry in entries)
    pool.check()
    pool.demote(entries[:2])
    assert pool.stats().lost == 0


def test_memory_that_cannot_be_marked_is_taken_back_later(make, stream, monkeypatch):
    """After the swap nothing may fail: what a release would have raised is put off."""
    pool = make()
    entry = pool.allocate(spec(1024), movable=True)
    write(pool, entry, 4, stream)
    with monkeypatch.context() as patch:
        patch.setattr(pool._store, "put_back", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        pool.demote([entry])
        assert entry.tier is Tier.PINNED and len(pool._store.deferred.all()) == 1
        pool.check()
    stream.synchronize()
    assert pool.allocate(spec(4096), movable=True).tier is Tier.DEVICE, "the parked memory came home"
    assert (read(pool, entry, stream) == 4).all()


def test_a_finaliser_that_releases_in_the_middle_of_a_move_is_heard_at_its_end(make, stream, monkeypatch):
    pool = make()
    entry, other = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024), movable=True)
    run = pool._traffic.mover.run

    def collected(moves):
        entry.release()
        other.release(stream=stream)
        with contextlib.suppress(StaleBufferError):
            other.release()  # a second time, heard by nobody
        assert pool._store.turns.mine() and entry.state is not BufferState.FREE
        return run(moves)

    with monkeypatch.context() as patch:
        patch.setattr(pool._traffic.mover, "run", collected)
        pool.demote([entry])
    assert entry.state is other.state is BufferState.FREE and pool.stats().in_use_count == 0
    with pytest.raises(StaleBufferError):
        entry.release()


def entered_again(pool, entry, other):
    """Every call on a pool that changes something, or looks at all of it, by name."""
    return {
        "allocate": lambda: pool.allocate(spec(64), movable=True),
        "use": lambda: pool.use([other]).__enter__(),
        "promote": lambda: pool.promote([other]),
        "demote": lambda: pool.demote([other]),
        "prefetch": lambda: pool.prefetch([other]),
        "limits": lambda: pool.limits.__setitem__(Tier.PINNED, 1 << 20),
        "reserve": lambda: pool.reserve([spec(64)]),
        "trim": lambda: pool.trim(0),
        "clear": pool.clear,
        "stats": pool.stats,
        "check": pool.check,
        "close": pool.close,
    }


def test_a_step_within_a_step_is_refused_and_changes_nothing(make, stream, monkeypatch):
    pool = make(device=2048)
    entry, other = pool.allocate(spec(1024), movable=True), pool.allocate(spec(1024), movable=True)
    write(pool, entry, 5, stream)
    write(pool, other, 6, stream)
    run, refused = pool._traffic.mover.run, []

    def collected(moves):
        for name, call in entered_again(pool, entry, other).items():
            with pytest.raises(BusyError, match="in the middle of another call"):
                call()
            refused.append(name)
        return run(moves)

    with monkeypatch.context() as patch:
        patch.setattr(pool._traffic.mover, "run", collected)
        pool.demote([entry])
    assert len(refused) == 12 and (entry.tier, other.tier) == (Tier.PINNED, Tier.DEVICE)
    assert (read(pool, entry, stream) == 5).all() and (read(pool, other, stream) == 6).all()
    assert pool.stats().allocations == 2 and not pool.closed


class Curious(LRU):
    """A policy that calls its pool."""

    pool = entry = None

    def rank(self, key, nbytes):
        if self.entry is not None:
            entry, self.entry = self.entry, None
            with pytest.raises(BusyError):
                self.pool.demote([entry])
            entry.release()
        return super().rank(key, nbytes)


def test_a_policy_that_calls_its_pool_is_refused_but_for_releases(make, stream):
    policy = Curious()
    pool = policy.pool = make(policy=policy)
    entry, policy.entry = pool.allocate(spec(64), movable=True), pool.allocate(spec(64), movable=True)
    gone = policy.entry
    with pool.use([entry], stream=stream):
        assert gone.state is BufferState.FREE and pool.stats().in_use_count == 1


def test_a_use_that_ends_in_the_middle_of_a_step_ends_with_it(make, stream, monkeypatch):
    """A generator that holds a use open is collected while its thread moves other buffers."""
    pool = make()
    entry, other = pool.allocate(spec(64), movable=True), pool.allocate(spec(64), movable=True)
    run, lease = pool._traffic.mover.run, pool.use([other], stream=stream)
    lease.__enter__()

    def collected(moves):
        lease.__exit__(None, None, None)
        assert not other.movable
        return run(moves)

    with monkeypatch.context() as patch:
        patch.setattr(pool._traffic.mover, "run", collected)
        pool.demote([entry])
    assert other.movable and other.record.fence is not None


# --------------------------------------------------------------------------------------------------------- lost, closed


def test_a_lost_buffer_is_reclaimed_with_all_it_holds_and_reported_once(make, stream, caplog):
    pool = make()
    entry = pool.allocate(spec(1024, Tier.PINNED), movable=True)
    pool.promote([entry])
    key = entry.record.key
    write(pool, pool.allocate(spec(8), movable=True), 1, stream)
    assert entry.record.copy is not None
    caplog.clear()
    del entry
    gc.collect()
    _cuda.synchronize()
    stats = pool.stats()
    assert (stats.in_use_count, stats.lost) == (0, 2) and sum(stats.buffers_by_tier.values()) == 0
    assert key not in pool.policy.ranks
    assert len([r for r in caplog.records if "dropped" in r.message]) == 2  # the other is the eight bytes


def test_closing_drops_copies_and_leaves_buffers(make, stream):
    pool = make()
    entry = pool.allocate(spec(1024, Tier.PINNED), movable=True)
    write(pool, entry, 2, stream)
    pool.demote([entry])
    pool.promote([entry])
    pool.close()
    assert pool.stats().reserved_count == 1
    for call in (
        lambda: pool.promote([entry]),
        lambda: pool.use([entry], stream=stream).__enter__(),
    ):
        with pytest.raises(ClosedError):
            call()
    entry.release()
    pool.close()
    assert pool.stats().reserved_bytes == 0


def test_an_entry_outlives_its_pool(stream):
    pool = HierarchicalBufferPool(device_bytes=1024, pinned_bytes=1024)
    entry = pool.allocate(spec(64, Tier.PINNED), movable=True)
    write(pool, entry, 5, stream)
    del pool
    gc.collect()
    stream.synchronize()
    assert entry.state is BufferState.IN_USE and entry.nbytes == 64
    entry.release()
    assert entry.state is BufferState.FREE


FORK = """
import os, sys, gc, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from numba import cuda
from numbabuf import HierarchicalBufferPool, BufferSpec, Tier
pool = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=4096)
kept, dropped = (pool.allocate(BufferSpec(1024, "uint8", Tier.PINNED), movable=True) for _ in "ab")
pool.promote([kept, dropped])
assert kept.record.copy is not None
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    from numbabuf.errors import ClosedError
    del dropped
    gc.collect()
    pool.check()
    pool.close()
    stats = pool.stats()
    assert (stats.reserved_count, stats.pending_count, stats.lost, sum(stats.buffers_by_tier.values())) == (0, 0, 0, 0)
    try:
        pool.allocate(BufferSpec(8), movable=True)
    except ClosedError as error:
        assert "another process" in str(error), error
    else:
        os._exit(3)
    kept.release()
    pool.check()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
pool.check()
assert pool.stats().in_use_count == 4
kept.release()
dropped.release()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_holds_nothing_of_its_parents():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------------------------------- threads


def test_threads_that_press_on_each_other(make):
    """Every use of one thread makes another's buffers go; each finds in its own what it wrote."""
    pool = make(device=2048, pinned=32768)
    barrier, failures = threading.Barrier(3), []

    def work(number):
        try:
            stream = _cuda.as_stream(None)
            entries = [pool.allocate(spec(700), movable=True) for _ in range(3)]
            for value, entry in enumerate(entries):
                write(pool, entry, 10 * number + value, stream)
            barrier.wait()
            for turn in range(12):
                entry = entries[turn % 3]
                assert (read(pool, entry, stream) == 10 * number + turn % 3).all()
                if turn % 4 == 0:
                    pool.prefetch(entries[:2])
                if turn % 5 == 0:
                    pool.demote([entries[1]])
            for entry in entries:
                entry.release()
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    pool.check()
    assert pool.stats().in_use_count == 0


# -------------------------------------------------------------------------------------------------------------- manager


def test_a_manager_works_over_it_unchanged(make):
    pool = make(device=1 << 20, pinned=1 << 20)
    others = [pool.allocate(spec(300_000), movable=True) for _ in range(3)]
    with InputBufferManager(pool, max_batch_size=2, max_seq_len=32) as manager:
        for tokens in (3, 17, 64):
            views = manager.stage_inputs({"input_ids": np.arange(tokens), "positions": np.arange(tokens)}, tokens)
            manager.synchronize()
            assert views["input_ids"].copy_to_host()[:tokens].tolist() == list(range(tokens))
            stream = _cuda.as_stream(None)
            for other in others:  # pressure between the steps
                write(pool, other, tokens, stream)
        pool.check()
    assert pool.stats().in_use_count == len(others)


def test_a_managers_graphs_replay_between_moves(make):
    pool = make(device=100_000, pinned=1 << 20, policy="lru")
    out = _cuda.device_view(_cuda.empty_device(64 * 8), 0, (64,), np.dtype(np.int64))
    others = [pool.allocate(spec(60_000), movable=True) for _ in range(3)]
    stream = _cuda.as_stream(None)
    with InputBufferManager(pool, max_batch_size=2, max_seq_len=32) as manager:

        def double(step):
            _cuda.launch(doubled, 1, 1, _cuda.as_stream(step.stream), step["input_ids"], out)

        manager.capture_buckets(double, [16, 64])
        for tokens in (3, 40, 16, 64, 7):
            manager.replay({"input_ids": np.arange(tokens) + tokens}, tokens)
            manager.synchronize()
            assert out.copy_to_host()[:tokens].tolist() == (2 * (np.arange(tokens) + tokens)).tolist()
            for value, other in enumerate(others):  # each makes another go
                write(pool, other, value, stream)
        assert pool.stats().demotions > 5
        pool.check()
    assert [int(read(pool, other, stream)[0]) for other in others] == [0, 1, 2]


def test_a_manager_finds_the_device_full_of_what_can_go(make):
    pool = make(device=100_000, pinned=1 << 20)
    others = [pool.allocate(spec(25_000), movable=True) for _ in range(4)]
    with InputBufferManager(pool, max_batch_size=2, max_seq_len=512) as manager:
        manager.stage_inputs({"input_ids": np.arange(9)}, 9)
        manager.synchronize()
    assert any(other.tier is Tier.PINNED for other in others)


def test_stats_and_repr(make, stream):
    pool = make()
    a, b = pool.allocate(spec(1024), movable=True), pool.allocate(spec(512, Tier.PINNED), movable=True)
    stats = pool.stats()
    assert dict(stats.buffers_by_tier) == {Tier.DEVICE: 1, Tier.MANAGED: 0, Tier.PINNED: 1}
    assert stats.in_use_bytes + stats.idle_bytes + stats.pending_bytes == stats.reserved_bytes == 1536
    assert "1536 bytes" in repr(pool) and "Hierarchical" in repr(pool)
    assert pool.tier_of(a) is Tier.DEVICE and pool.tier_of(b) is Tier.PINNED


def test_on_oom_is_called_once_for_all_tiers(make, monkeypatch):
    def refuse(nbytes):
        raise MemoryError(f"no {nbytes} bytes")

    asked = []
    pool = make(managed=4096, on_oom=asked.append)
    with monkeypatch.context() as patch, pytest.raises(TierFullError):
        for name in ("empty_device", "empty_managed", "empty_pinned"):
            patch.setattr(_cuda, name, refuse)
        pool.allocate(spec(64), movable=True)
    assert asked == [64]
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "empty_device", refuse)
        entry = pool.allocate(spec(64), movable=True)
    assert entry.tier is Tier.MANAGED and asked == [64], "nothing was amiss"
    entry.release()


def test_what_the_card_has_no_room_for_goes_below_managed_memory(make, monkeypatch):
    pool = make(managed=8192)
    entry = pool.allocate(spec(64), movable=True)
    monkeypatch.setattr(_cuda, "memory_info", lambda: (16, 1 << 20))
    pool.demote([entry])
    assert entry.tier is Tier.PINNED
    entry.release()


def test_managed_memory_that_takes_no_advice_is_not_lost(make, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no advice")

    pool = make(managed=8192)
    monkeypatch.setattr(_cuda, "settle_on_host", refuse)
    with pytest.raises(RuntimeError, match="no advice"):
        pool.allocate(spec(64, Tier.MANAGED), movable=True)
    assert (pool.stats().lost, pool.stats().in_use_count) == (0, 0)


# ------------------------------------------------------------------------------------------ interrupted, other threads


class Noting:
    """A lock that says when it is asked for."""

    def __init__(self, lock, asked):
        self.lock, self.asked = lock, asked

    def __enter__(self):
        self.asked()
        return self.lock.__enter__()

    def __exit__(self, *exc):
        return self.lock.__exit__(*exc)


def test_two_threads_that_need_the_mover_first_get_one(make, monkeypatch):
    pool = make()
    came, found = threading.Event(), []

    def need():
        found.append(pool._traffic.mover)
        came.set()

    other = threading.Thread(target=need)

    def asked():
        if threading.current_thread() is other:
            came.set()

    class Slow(movers.Mover):
        def __init__(self, **options):
            if threading.current_thread() is not other:
                other.start()
                assert came.wait(60)
            super().__init__(**options)

    monkeypatch.setattr(traffic, "Mover", Slow)
    monkeypatch.setattr(pool._store, "lock", Noting(pool._store.lock, asked))
    mine = pool._traffic.mover
    other.join()
    assert found == [mine]


def elsewhere(function):
    """Call a function in another thread; return what it returned or raised."""
    kit.collect()  # here, where there is a context: Numba's finalisers want one, and the thread has none
    outcome = []

    def run():
        try:
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return outcome.pop()  # an error keeps its frames, and they keep the list: no cycle is left


def test_a_stream_named_within_a_use_counts_beyond_it(make, stream):
    """The end of the use is marked on one stream, which then stands for all."""
    pool = make()
    entry, named = pool.allocate(spec(64), movable=True), _cuda.as_stream(None)
    waits = []
    with pool.use([entry], stream=stream):
        entry.record_stream(named)
        fences = pool._store.fences
        behind, fences.wait_for = fences.wait_for, lambda users, on: waits.append((users, on)) or behind(users, on)
    del fences.wait_for
    (users, on), *_ = waits
    assert on is stream and any(same_stream(user, named) for user in users)


def test_lost_buffers_are_forgotten_as_others_come(make, caplog):
    pool = make()
    for _ in range(20):
        pool.allocate(spec(64), movable=True)
        gc.collect()
    assert sum(pool.stats().buffers_by_tier.values()) <= 2


def test_the_tier_of_what_is_no_entry_of_the_pool_is_refused(make):
    pool, other = make(), make()
    entry = pool.allocate(spec(64), movable=True)
    assert pool.tier_of(entry) is Tier.DEVICE
    with pytest.raises(TypeError, match="None is not an entry of a pool: give what allocate returned"):
        pool.tier_of(None)
    with pytest.raises(ValueError, match="belongs to another pool"):
        other.tier_of(entry)
    entry.release()
    assert pool.tier_of(entry) is Tier.DEVICE, "that of its spec"


ENDED = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from numba import cuda
from numbabuf import BufferSpec, ClosedError, HierarchicalBufferPool, Tier, _cuda
pool = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=16384)
tiers = Tier.DEVICE, Tier.PINNED, Tier.PINNED
device, pinned, used = (pool.allocate(BufferSpec(1024, "uint8", tier), movable=True) for tier in tiers)
plain = pool.allocate(BufferSpec(1024, "uint8"))
inside = pool.use([used])
inside.__enter__()
pool.promote([pinned])
lease = pool.use([device])
lease.__enter__()
cuda.close() if _cuda.SIM else cuda.current_context().reset()  # with memory in use Numba's own close() fails
spec = BufferSpec(64)
for call in (
    lambda: pool.allocate(spec, movable=True), lambda: pool.use([device]).__enter__(), lambda: pool.promote([device]),
    lambda: pool.demote([device]), lambda: pool.prefetch([device]), lambda: pool.reserve([spec]), pool.stats,
    pool.check, lambda: pool.trim(0), pool.clear, lambda: plain.array, lambda: plain.address, plain.mark_in_use,
    lambda: used.array, lambda: used.address, lambda: used.device_array, lambda: used.__cuda_array_interface__,
    lambda: used.__dlpack__(), lambda: pinned.array, lambda: pinned.generation, lambda: pinned.__cuda_array_interface__,
    pinned.__enter__, pinned.mark_in_use, lambda: pool.limits.__setitem__(Tier.DEVICE, 0),
):
    try:
        call()
    except ClosedError as error:
        assert "context" in str(error) and "closed" in str(error), error
    else:
        raise AssertionError("not refused")
lease.__exit__(None, None, None)
inside.__exit__(None, None, None)
device.release()
used.release()
plain.release()
pool.close()
pool.close()
pinned.release()
with HierarchicalBufferPool(device_bytes=4096, pinned_bytes=16384) as another:
    with another.allocate(spec, movable=True) as entry, another.use([entry]) as (array,):
        array.copy_to_host()
    another.demote([])
    another.check()
"""


def test_after_the_end_of_its_context_a_pool_says_so_and_closes_quietly():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ENDED], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
