"""Snapshots, scopes and the event ring, by themselves."""

import copy
import dataclasses
import importlib
import pickle

import hypothesis.strategies as st
import kit
import numpy as np
import pytest
from hypothesis import given

from numbabuf import HierarchicalBufferPool, InputBufferManager, PredictiveBufferManager, SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.pool.stats import EVENT_DTYPE, EventRing, Frozen, OomSteps, PoolStats, Scope

FIGURES = {field.name: 0 for field in dataclasses.fields(PoolStats) if field.name not in ("oom", "reserved_by_tier")}


def test_snapshots_are_frozen_and_compare():
    stats = PoolStats(**FIGURES)
    assert stats == PoolStats(**FIGURES) != PoolStats(**FIGURES | {"lost": 1})
    assert stats.oom == OomSteps()
    for frozen, name in ((stats, "lost"), (stats.oom, "trim")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)
    with pytest.raises(TypeError):
        stats.reserved_by_tier[Tier.DEVICE] = 1


def snapshots():
    """A snapshot of each kind, from what gives it."""
    pinned = BufferSpec(8, "uint8", Tier.PINNED)
    with (
        SimpleBufferPool() as pool,
        HierarchicalBufferPool(device_bytes=64, pinned_bytes=64) as tiers,
        InputBufferManager(max_batch_size=1, max_seq_len=8) as manager,
        PredictiveBufferManager(max_batch_size=1, max_seq_len=8) as predictive,
    ):
        with pool.statistics() as scope, pool.allocate(pinned), tiers.allocate(pinned):
            found = [pool.stats(), pool.stats().oom, tiers.stats(), scope.stats(), manager.stats()]
            return [*found, predictive.prediction(), *manager.stats().programs.values()]


def kinds():
    """The dataclasses of the package that are snapshots."""
    values = [value for name in kit.modules() for value in vars(importlib.import_module(name)).values()]
    classes = {value for value in values if isinstance(value, type) and dataclasses.is_dataclass(value)}
    return {c for c in classes if c.__name__.endswith(("Stats", "Steps"))}


def test_every_kind_of_snapshot_can_be_copied_and_pickled():
    given = snapshots()
    assert {type(stats) for stats in given} == kinds()
    for stats in given:
        assert copy.copy(stats) == copy.deepcopy(stats) == dataclasses.replace(stats) == stats
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(stats, protocol)) == stats
        assert dataclasses.asdict(stats).keys() == {field.name for field in dataclasses.fields(stats)}


def test_a_frozen_mapping_is_a_mapping_of_its_own():
    given = {"a": 1, "b": 2}
    frozen = Frozen(given)
    given["a"] = 3
    assert frozen == {"a": 1, "b": 2} and list(frozen) == ["a", "b"] and len(frozen) == 2
    assert repr(frozen) == "{'a': 1, 'b': 2}"
    with pytest.raises(TypeError):
        frozen["a"] = 4


def test_hit_rate():
    assert PoolStats(**FIGURES).hit_rate == 1.0
    assert PoolStats(**FIGURES | {"allocations": 8, "misses": 2}).hit_rate == 0.75


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1000))))
def test_a_scope_is_a_running_sum_with_its_maximum(steps):
    scope = Scope()
    net, count, peak, peak_count, total, leases = 0, 0, 0, 0, 0, 0
    for lease, nbytes in steps:
        if lease:
            scope.add(nbytes)
            net, count, total, leases = net + nbytes, count + 1, total + nbytes, leases + 1
        else:
            scope.remove(nbytes)
            net, count = net - nbytes, count - 1
        peak, peak_count = max(peak, net), max(peak_count, count)
    got = scope.stats()
    assert (got.current_bytes, got.peak_bytes, got.total_bytes) == (net, peak, total)
    assert (got.current_count, got.peak_count, got.total_count) == (count, peak_count, leases)
    assert str(got.peak_bytes) in repr(scope)


@given(st.integers(1, 9), st.integers(0, 30))
def test_the_ring_keeps_the_last_events_in_order(capacity, count):
    ring = EventRing(capacity)
    for i in range(count):
        ring.add("release", Tier.MANAGED, 4096 * i, i, i)
    records = ring.snapshot()
    assert records.dtype == EVENT_DTYPE and ring.count == count
    assert records["nbytes"].tolist() == list(range(count))[-capacity:]
    assert (np.diff(records["time_ns"]) >= 0).all()
    assert {EventRing.KINDS[kind] for kind in records["kind"]} <= {"release"}
    assert {list(Tier)[tier] for tier in records["tier"]} <= {Tier.MANAGED}


def test_a_snapshot_of_the_ring_is_a_copy():
    ring = EventRing(2)
    ring.add("grow", Tier.DEVICE, 1 << 47, 8, 0)
    records = ring.snapshot()
    ring.add("free", Tier.DEVICE, 0, 8, 0)
    ring.add("free", Tier.DEVICE, 0, 8, 0)
    assert records["address"].tolist() == [1 << 47]


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_ring_of_nothing_is_refused(capacity):
    with pytest.raises(ValueError, match=str(capacity)):
        EventRing(capacity)
