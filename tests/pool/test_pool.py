"""SimpleBufferPool: the contract, and what it adds: classes, stream order, the ladder, captures, lost buffers."""

import copy
import gc
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from pool_contract import PoolContract, add_one

from numbabuf import _cuda
from numbabuf.errors import CaptureError, ClosedError, StaleBufferError, TierFullError
from numbabuf.pool import store
from numbabuf.pool.block import Block
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import EXACT_ABOVE, BufferSpec, BufferState, Tier

ROOT = pathlib.Path(__file__).resolve().parents[2]


class TestSimpleBufferPool(PoolContract):
    def make_pool(self, **options):
        return SimpleBufferPool(**options)


class TestObservedPool(PoolContract):
    """The contract again where every lease takes the slow path."""

    def make_pool(self, **options):
        return SimpleBufferPool(events=64, **options)


@pytest.fixture
def pool():
    with SimpleBufferPool() as pool:
        yield pool
        pool.check()


def pinned(size):
    return BufferSpec(size, "uint8", Tier.PINNED)


def device(size):
    return BufferSpec(size, "uint8", Tier.DEVICE)


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_bytes": -1}, ValueError, "max_bytes is -1"),
        ({"max_pinned_bytes": -5}, ValueError, "max_pinned_bytes is -5"),
        ({"on_oom": 3}, TypeError, "on_oom"),
        ({"events": -1}, ValueError, "-1"),
    ],
)
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        SimpleBufferPool(**options)


# ------------------------------------------------------------------------------------------------- classes and limits


def test_a_class_hit_serves_another_spec_of_nearly_the_same_size(pool):
    first = pool.allocate(BufferSpec(1000, "uint8"))
    address = first.address
    first.release()
    second = pool.allocate(BufferSpec((3, 83), "float32"))  # 996 bytes
    assert second.address == address and second.array.shape == (3, 83)
    second.release()
    third = pool.allocate(BufferSpec(1000, "uint8"))  # and back, without a new view
    assert third.address == address and third.array.shape == (1000,)
    third.release()
    stats = pool.stats()
    assert (stats.misses, stats.class_hits, stats.exact_hits) == (1, 2, 0)


def test_views_are_made_once_per_block_and_spec(pool):
    specs = [BufferSpec(64, "float32"), BufferSpec(32, "float64")]
    seen = {}
    for _ in range(3):
        for spec in specs:
            with pool.allocate(spec) as entry:
                assert seen.setdefault(spec, entry.array) is entry.array
    with pool.allocate(pinned(8)) as entry:
        view = entry.device_array
    with pool.allocate(pinned(8)) as entry:
        assert entry.device_array is view
    assert pool.stats().reserved_count == 2


def test_a_block_that_serves_many_specs_does_not_remember_them_all(pool):
    views = []
    for rows in range(1, 60):
        with pool.allocate(BufferSpec((rows, 1024 // rows), "uint8", Tier.PINNED)) as entry:
            assert entry.array.shape == (rows, 1024 // rows)
            views.append(weakref.ref(entry.array))
    assert pool.stats().reserved_count <= 2
    assert sum(view() is not None for view in views) <= 2 * 16


def test_waste_is_at_most_an_eighth_and_large_requests_are_exact(pool):
    for size in (1025, 1 << 20, (1 << 20) + 1, EXACT_ABOVE - 5):
        pool.allocate(pinned(size)).release()
        assert pool.stats().waste_bytes * 8 <= size
        pool.clear()
    entry = pool.allocate(pinned(EXACT_ABOVE + 3))
    assert pool.stats().waste_bytes == 0
    entry.release()
    again = pool.allocate(BufferSpec((EXACT_ABOVE + 3, 1), "uint8", Tier.PINNED))
    assert pool.stats().class_hits == 1
    again.release()
    pool.allocate(pinned(EXACT_ABOVE + 2)).release()  # a little smaller: served by the next larger one
    assert pool.stats().misses == 5


def test_the_limit_is_worth_more_than_rounding_and_capacity_is_compared():
    with SimpleBufferPool(max_pinned_bytes=2100) as pool:
        big = pool.allocate(pinned(1025))  # its class is 1152
        exact = pool.allocate(pinned(920))  # its class, 960, does not fit the remaining 948
        assert pool.stats().reserved_bytes == 1152 + 920
        exact.release()
        with pytest.raises(TierFullError):
            pool.allocate(pinned(950))  # the class of the idle block, which is too small for it
        big.release()
        pool.check()


def test_pinned_device_and_managed_limits_are_told_apart():
    with SimpleBufferPool(max_bytes=1024, max_pinned_bytes=512) as pool:
        a, b = pool.allocate(device(512)), pool.allocate(BufferSpec(512, "uint8", Tier.MANAGED))
        c = pool.allocate(pinned(512))
        for spec in (device(1), BufferSpec(1, "uint8", Tier.MANAGED), pinned(1)):
            with pytest.raises(TierFullError, match="limit"):
                pool.allocate(spec)
        assert dict(pool.stats().reserved_by_tier) == dict.fromkeys(Tier, 512)
        for entry in (a, b, c):
            entry.release()


def test_a_failed_allocation_leaves_everything_as_it_was(monkeypatch):
    pool = SimpleBufferPool(max_pinned_bytes=256)

    def fail(nbytes):
        raise RuntimeError("broken driver")

    keep = pool.allocate(pinned(64))
    before = pool.stats()
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "empty_pinned", fail)
        with pytest.raises(RuntimeError, match="broken driver"):
            pool.allocate(pinned(128))
        with pytest.raises(RuntimeError, match="broken driver"):
            pool.reserve([pinned(64), pinned(128)])
    assert pool.stats() == before
    pool.allocate(pinned(192)).release()  # all that the limit leaves
    keep.release()


def test_a_reservation_frees_other_idle_memory_but_none_that_it_wants():
    with SimpleBufferPool(max_pinned_bytes=4096) as pool:
        pool.allocate(pinned(2048)).release()
        pool.allocate(pinned(1024)).release()
        pool.reserve([pinned(1024), pinned(3072)])
        stats = pool.stats()
        assert (stats.reserved_bytes, stats.idle_count) == (4096, 2)
        with pytest.raises(TierFullError, match=r"1 of 3 buffers.*BufferSpec\(512"):
            pool.reserve([pinned(1024), pinned(3072), pinned(512)])
        assert pool.stats().reserved_bytes == 4096


# --------------------------------------------------------------------------------------------------------- the ladder


def test_the_ladder_trims_idle_memory_of_its_own_tier():
    with SimpleBufferPool(max_pinned_bytes=1024) as pool:
        pool.allocate(device(512)).release()
        pool.allocate(pinned(512)).release()
        pool.allocate(pinned(1024)).release()
        stats = pool.stats()
        assert stats.oom.reap == stats.oom.trim == 1 and stats.oom.failed == 0
        assert dict(stats.reserved_by_tier) == {Tier.DEVICE: 512, Tier.MANAGED: 0, Tier.PINNED: 1024}


def test_the_ladder_collects_lost_buffers_in_cycles():
    with SimpleBufferPool(max_pinned_bytes=1024) as pool:
        gc.disable()
        try:
            cycle = [pool.allocate(pinned(1000))]
            cycle.append(cycle)
            del cycle
            pool.allocate(pinned(900)).release()
        finally:
            gc.enable()
        stats = pool.stats()
        assert (stats.lost, stats.oom.collect, stats.oom.flush) == (1, 1, 0)


def test_the_ladder_flushes_what_numba_has_put_off(monkeypatch):
    real, flushed = _cuda.empty_pinned, []

    def full(nbytes):
        if not flushed:
            raise MemoryError(f"no {nbytes} bytes")
        return real(nbytes)

    monkeypatch.setattr(_cuda, "empty_pinned", full)
    monkeypatch.setattr(_cuda, "flush_pending_frees", lambda: flushed.append(True))
    with SimpleBufferPool() as pool:
        pool.allocate(pinned(64)).release()
        stats = pool.stats().oom
        assert (stats.collect, stats.flush, stats.callback, stats.failed) == (1, 1, 0, 0)


def test_on_oom_is_called_once_with_the_bytes_and_may_release():
    held, calls = [], []

    def make_room(nbytes):
        calls.append(nbytes)
        held.pop().release()

    with SimpleBufferPool(max_pinned_bytes=1024, on_oom=make_room) as pool:
        held.append(pool.allocate(pinned(1024)))
        pool.allocate(pinned(1000)).release()
        assert calls == [1000]
        stats = pool.stats().oom
        assert (stats.reap, stats.trim, stats.collect, stats.flush, stats.callback, stats.failed) == (1, 1, 1, 1, 1, 0)


def test_on_oom_is_not_called_by_its_own_requests_and_the_report_is_full():
    calls = []

    def greedy(nbytes):
        calls.append(nbytes)
        with pytest.raises(TierFullError):
            pool.allocate(pinned(5000))

    with SimpleBufferPool(max_pinned_bytes=1024, on_oom=greedy) as pool:
        held = pool.allocate(pinned(1000))
        before = pool.stats()
        with pytest.raises(TierFullError) as caught:
            pool.allocate(pinned(2000))
        assert calls == [2000]
        text = str(caught.value)
        parts = ("BufferSpec(2000, uint8, pinned)", "2000 bytes", "1024 bytes", "reap:", "trim:", "collect:", "flush:")
        for part in (*parts, "callback:", "limit"):
            assert part in text
        assert isinstance(caught.value, MemoryError)
        after = pool.stats()
        assert after.oom.failed == 2
        assert (after.reserved_bytes, after.in_use_bytes) == (before.reserved_bytes, before.in_use_bytes)
        held.release()


def test_an_on_oom_that_raises_leaves_the_pool_usable():
    def fail(nbytes):
        raise KeyError(nbytes)

    with SimpleBufferPool(max_pinned_bytes=64, on_oom=fail) as pool:
        for _ in range(2):  # and is called again by the next request
            with pytest.raises(KeyError, match="100"):
                pool.allocate(pinned(100))
        pool.allocate(pinned(64)).release()
        pool.check()


def test_an_unknown_amount_of_free_memory_does_not_hide_the_report(monkeypatch):
    def unknown():
        raise RuntimeError("no context")

    with SimpleBufferPool(max_bytes=64) as pool:
        for answer, text in ((unknown, "does not say"), (lambda: (5, 77), "5 of 77"), (lambda: None, "does not say")):
            monkeypatch.setattr(_cuda, "memory_info", answer)
            with pytest.raises(TierFullError, match=text):
                pool.allocate(device(100))


# ------------------------------------------------------------------------------------------------------- stream order


class Stream:
    """A stream whose work is done when the test says so."""

    handles = iter(range(1000, 10**6))
    device = 0

    def __init__(self, handle=None):
        self.handle = self.raw = next(self.handles) if handle is None else handle
        self.core = self
        self.numba, self.owner = self, None
        self.destroyed = self.closed = self.elsewhere = False
        self.thread = None
        self.waits_for = []

        self.idle = handle == 0
        self.synchronized = 0

    def query(self):
        return self.idle

    def synchronize(self):
        self.synchronized += 1


class Event:
    made = 0

    def __init__(self):
        Event.made += 1
        self.done = False
        self.stream = None

    def record(self, stream):
        if stream.destroyed:
            raise RuntimeError("invalid stream")
        self.stream, self.done = stream, False
        events[stream] = self

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True

    def wait(self, stream):
        stream.waits_for.append(self.stream)


events = weakref.WeakKeyDictionary()  # stream -> its last mark


@pytest.fixture
def streams(monkeypatch):
    default = Stream(0)
    Event.made = 0
    monkeypatch.setattr(_cuda, "Event", Event)
    monkeypatch.setattr(_cuda, "as_stream", lambda stream: default if stream == 0 else stream)
    return default, Stream(), Stream()


def test_wait_makes_another_stream_wait_and_the_host_never(streams):
    _, one, two = streams
    with SimpleBufferPool() as pool:
        entry = pool.allocate(device(64), stream=one)
        address = entry.address
        entry.release()
        same = pool.allocate(device(64), stream=one)
        assert same.address == address and not one.waits_for
        same.release()
        other = pool.allocate(device(64), stream=two)
        assert other.address == address and two.waits_for == [one]
        other.release()
        own = pool.allocate(device(64))
        assert own.address == address and streams[0].waits_for == [two]
        assert (pool.stats().stream_waits, Event.made) == (2, 1)  # one event, used again and again
        own.release()
        pool.check()


def test_a_stream_prefers_its_own_memory_to_waiting(streams):
    _, one, two = streams
    with SimpleBufferPool() as pool:
        mine, theirs = pool.allocate(device(64), stream=one), pool.allocate(device(64), stream=two)
        address = mine.address
        mine.release()
        theirs.release()
        assert pool.allocate(device(64), stream=one).address == address
        assert not one.waits_for


def test_work_on_the_default_stream_is_waited_for(streams):
    default, one, _ = streams
    with SimpleBufferPool() as pool:
        pool.allocate(device(64)).release()
        assert Event.made == 0  # no mark before somebody else comes
        pool.allocate(device(64), stream=one).release()
        assert one.waits_for == [default]


def test_reserved_memory_is_any_streams_without_a_wait(streams):
    default, one, two = streams
    default.idle = False
    with SimpleBufferPool() as pool:
        pool.allocate(device(64)).release()  # the default stream may still use this one,
        pool.reserve([device(64)] * 2)  # so the reservation waits for it
        assert default.synchronized == 1 and pool.stats().reserved_count == 2
        entries = [pool.allocate(device(64), stream=stream) for stream in (one, two)]
        assert pool.stats().misses == 1 and not one.waits_for and not two.waits_for
        for entry in entries:
            entry.release()


def test_freeing_waits_for_the_work(streams):
    default, one, _ = streams
    with SimpleBufferPool() as pool:
        pool.allocate(device(64)).release()
        pool.allocate(device(128), stream=one).release()
        mark = events[one]
        pool.clear()
        assert default.synchronized == 1 and mark.done
        assert pool.stats().reserved_bytes == 0


@pytest.mark.parametrize("tier", [Tier.PINNED, Tier.MANAGED])
def test_memory_that_the_cpu_writes_is_always_done_first(streams, tier):
    _, one, _ = streams
    with SimpleBufferPool() as pool:
        spec = BufferSpec(64, "uint8", tier)
        entry = pool.allocate(spec)
        address = entry.address
        entry.release(stream=one)
        assert pool.stats().pending_count == 1
        fresh = pool.allocate(spec, stream=one)
        assert fresh.address != address
        events[one].done = True
        again = pool.allocate(spec)
        assert again.address == address
        fresh.release()
        again.release()


def test_mark_in_use_without_a_stream_means_the_default_stream(streams):
    default, _, _ = streams
    with SimpleBufferPool() as pool:
        entry = pool.allocate(pinned(64))
        entry.mark_in_use()
        entry.release()
        assert pool.stats().pending_count == 1
        events[default].done = True
        assert pool.stats().pending_count == 0


def test_every_recorded_stream_is_waited_for(streams):
    default, one, two = streams
    with SimpleBufferPool() as pool:
        entry = pool.allocate(device(64), stream=one)
        entry.record_stream(two)
        entry.record_stream(two)
        entry.release()
        entry = pool.allocate(device(64), stream=one)  # `two` is still at it
        assert one.waits_for == [two]
        entry.release(stream=two)
        pool.allocate(device(64)).release()
        assert default.waits_for == [one, two]
        pool.allocate(device(64)).release(stream=two)  # leased for the default stream: it and `two`
        one.waits_for.clear()
        pool.allocate(device(64), stream=one).release()
        assert one.waits_for == [default, two]
        entry = pool.allocate(pinned(64), stream=one)
        entry.record_stream(two)
        entry.release()
        events[two].done = True
        assert pool.stats().pending_count == 1
        events[one].done = True
        assert pool.stats().pending_count == 0


@pytest.mark.parametrize("how", ["destroyed", "closed"])
def test_a_destroyed_stream_poisons_nothing(streams, monkeypatch, how):
    _, one, two = streams
    synchronised = []
    monkeypatch.setattr(_cuda, "synchronize", lambda: synchronised.append(True))
    with SimpleBufferPool() as pool:
        entry = pool.allocate(device(64), stream=one)
        address = entry.address
        setattr(one, how, True)
        entry.release()
        assert synchronised and pool.stats().lost_streams == 1
        other = pool.allocate(device(64), stream=two)
        assert other.address == address
        other.release()


def test_a_stream_with_a_dead_ones_handle_is_another_stream(streams):
    _, one, _ = streams
    with SimpleBufferPool() as pool:
        entry = pool.allocate(device(64), stream=one)
        address = entry.address
        entry.release()
        new = Stream(one.handle)
        entry = pool.allocate(device(64), stream=new)
        assert entry.address == address and new.waits_for == [one]
        entry.release()


def test_a_failed_wait_puts_the_buffer_back(streams, monkeypatch):
    _, one, two = streams
    with SimpleBufferPool() as pool:
        pool.allocate(device(64), stream=one).release()
        pool.allocate(device(128)).release()
        before = pool.stats()

        def fail(self, stream):
            raise RuntimeError("broken wait")

        with monkeypatch.context() as patch:
            patch.setattr(Event, "wait", fail)
            for size in (64, 128):
                with pytest.raises(RuntimeError, match="broken wait"):
                    pool.allocate(device(size), stream=two)
        assert pool.stats() == before
        pool.check()


def test_a_release_that_cannot_be_ordered_leaves_the_lease(streams, monkeypatch):
    _, one, _ = streams

    def fail():
        raise RuntimeError("device is lost")

    with SimpleBufferPool() as pool:
        entry = pool.allocate(pinned(64), stream=one)
        before = pool.stats()
        one.destroyed = True
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "synchronize", fail)
            with pytest.raises(RuntimeError, match="device is lost"):
                entry.release()
        entry.array[:] = 0
        assert pool.stats() == before
        one.destroyed = False
        entry.release()


def test_closing_waits_for_released_buffers(streams):
    _, one, _ = streams
    pool = SimpleBufferPool()
    pool.allocate(pinned(64)).release(stream=one)
    pool.allocate(device(64), stream=one).release()
    pool.close()
    assert pool.stats().reserved_bytes == 0
    pool.check()


# ------------------------------------------------------------------------------------------------------------ capture


@pytest.fixture
def capture():
    stream = _cuda.as_stream(None)
    warm = _cuda.empty_device(8)
    _cuda.zero(warm, stream)
    _cuda.launch(add_one, 1, 4, stream, warm)  # compiled before any capture
    staged = _cuda.empty_pinned(8)
    staged[:] = 0
    _cuda.launch(add_one, 1, 4, stream, _cuda.device_view(staged, 0, (8,), np.dtype("uint8")))
    capture = _cuda.Capture(stream)
    yield capture
    if _cuda.capturing():
        capture.abort()


def test_a_capture_gets_idle_memory_and_nothing_else(pool, capture):
    pool.reserve([device(64), pinned(64)])
    capture.begin()
    pool.allocate(device(64)).release()
    entry = pool.allocate(pinned(64))
    with pytest.raises(CaptureError, match=r"BufferSpec\(100, uint8\)"):
        pool.allocate(device(100))
    pool.allocate(device(64)).release()  # again: what is released in a capture serves the next lease in it
    for call in (lambda: pool.reserve([device(1)]), pool.clear, lambda: pool.trim(0), pool.close):
        with pytest.raises(CaptureError, match="capture"):
            call()
    assert pool.stats().pending_count == 1
    capture.end().close()
    assert pool.stats().pending_count == 0
    entry.release()


def test_a_capture_gets_reserved_memory_on_its_stream(capture):
    with SimpleBufferPool() as pool:
        pool.allocate(device(64)).release()
        capture.begin()
        with pytest.raises(CaptureError, match="reserve"):  # it may have work on the default stream
            pool.allocate(device(64), stream=capture.stream)
        capture.abort()
        pool.reserve([device(64), device(64)])
        capture.begin()
        entries = [pool.allocate(device(64), stream=capture.stream) for _ in range(2)]
        graph = capture.end()
        for entry in entries:
            entry.release()
        graph.close()
        assert pool.stats().misses == 1
        pool.check()


def test_a_capture_never_makes_a_driver_call_for_order(pool, capture, monkeypatch):
    other = _cuda.as_stream(None)
    keep = pool.allocate(device(32), stream=other)
    host = pool.allocate(pinned(64))
    pool.allocate(device(64), stream=other).release()
    host.release(stream=other)
    capture.begin()

    def forbidden(*args):
        raise AssertionError("an event was touched in a capture")

    for name in ("record", "query", "wait"):
        monkeypatch.setattr(_cuda.Event, name, forbidden)
    for spec in (device(64), pinned(64)):
        with pytest.raises(CaptureError):
            pool.allocate(spec, stream=capture.stream)
    keep.release()
    pool.check()
    assert pool.stats().pending_count == 2
    capture.end().close()


def test_memory_under_a_live_graph_is_not_handed_out(pool, capture):
    entry = pool.allocate(device(64))
    address = entry.address
    capture.begin()
    _cuda.launch(add_one, 1, 4, capture.stream, entry.array[8:16])  # a part of it is enough
    graph = capture.end()
    entry.release()
    assert pool.stats().pending_count == 1
    with pool.allocate(device(64)) as other:
        assert other.address != address
    pool.clear()
    assert pool.stats().reserved_count == 1
    graph.launch_on(capture.stream.core)
    capture.stream.synchronize()
    graph.close()
    assert pool.stats().idle_count == 1
    with pool.allocate(device(64)) as again:
        assert again.address == address


@pytest.mark.parametrize("tier", list(Tier))
def test_an_entry_may_be_named_as_an_operand(pool, capture, tier):
    entry = pool.allocate(BufferSpec(64, "uint8", tier))
    capture.begin()
    capture.keep(entry)  # as for a kernel that is given the bare address
    graph = capture.end()
    entry.release()
    assert pool.stats().pending_count == 1
    graph.close()
    assert pool.stats().pending_count == 0


def test_an_aborted_capture_frees_what_it_touched(pool, capture):
    entry = pool.allocate(device(64))
    capture.begin()
    _cuda.launch(add_one, 1, 4, capture.stream, entry.array)
    entry.release()
    capture.abort()
    assert pool.stats().pending_count == 0


def test_a_capture_in_which_fifty_entries_die_succeeds(pool, capture):
    pool.reserve([device(64)] * 25 + [pinned(64)] * 25)
    target = pool.allocate(device(32))
    capture.begin()
    for spec in [device(64)] * 25 + [pinned(64)] * 25:
        pool.allocate(spec)  # dropped at once
    gc.collect()
    assert pool.stats().lost == 0 and pool.stats().pending_count == 50
    _cuda.launch(add_one, 1, 4, capture.stream, target.array)
    graph = capture.end()
    stats = pool.stats()
    assert (stats.lost, stats.pending_count, stats.idle_count) == (50, 0, 50)
    graph.close()
    target.release()


# ------------------------------------------------------------------------------------------------------ lost buffers


def test_a_dropped_entry_is_reclaimed_counted_and_reported_once(pool, caplog):
    entry = pool.allocate(BufferSpec(77, "uint8", Tier.PINNED))
    address = entry.address
    del entry
    with caplog.at_level(logging.WARNING, "numbabuf"):
        again = pool.allocate(BufferSpec(77, "uint8", Tier.PINNED))
        assert again.address == address
        pool.check()
        pool.stats()
    assert [record.name for record in caplog.records] == ["numbabuf"]
    assert "BufferSpec(77, uint8, pinned) was dropped" in caplog.text
    assert pool.stats().lost == 1
    again.release()
    del again
    assert pool.stats().lost == 1


def test_an_array_kept_beyond_its_lost_entry_stays_memory(pool):
    array = pool.allocate(pinned(64)).array
    pool.clear()
    array[:] = 9
    assert array.sum() == 576
    assert pool.stats().reserved_bytes == 0


def test_debug_mode_says_where(monkeypatch, caplog):
    monkeypatch.setenv("NUMBABUF_DEBUG", "1")
    with SimpleBufferPool() as pool:
        entry = pool.allocate(pinned(8))
        entry.release()
        with pytest.raises(StaleBufferError, match=r"was released before, at .*test_pool\.py:\d+: release each"):
            entry.release()
        pool.allocate(pinned(8))
        with caplog.at_level(logging.WARNING, "numbabuf"):
            assert pool.stats().lost == 1
        assert "allocated at" in caplog.text and "test_pool.py" in caplog.text


def test_a_finaliser_takes_no_lock(pool):
    """Were it to take the pool's, dropping an entry while another thread holds it would never return."""
    entries = [pool.allocate(pinned(8)), pool.allocate(pinned(8))]
    cycle = [entries.pop()]
    cycle.append(cycle)
    dropped = threading.Event()

    def drop():
        entries.clear()
        cycle.clear()
        gc.collect()
        dropped.set()

    with pool._store.lock:
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        assert dropped.wait(20)
    thread.join()
    assert pool.stats().lost == 2


def test_the_collector_may_run_anywhere_in_allocate(pool):
    """A user's finaliser that releases, run wherever the collector comes; thresholds of 1 make that everywhere."""

    class Owner:
        def __init__(self, entry):
            self.entry, self.me = entry, self

        def __del__(self):
            self.entry.release()

    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for turn in range(60):
            Owner(pool.allocate(pinned(turn % 7), stream=_cuda.as_stream(None) if turn % 3 else None))
            lost = [pool.allocate(device(turn % 5))]
            lost.append(lost)
            del lost
            pool.allocate(pinned(turn)).release()
            pool.stats()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    stats = pool.stats()
    assert (stats.in_use_count, stats.lost, stats.allocations) == (0, 60, 180)
    assert stats.reserved_count < 90


def test_a_dropped_pool_frees_its_idle_memory_at_once():
    gc.disable()
    try:
        pool = SimpleBufferPool()
        entry = pool.allocate(pinned(64))
        block = weakref.ref(entry._held[0].block)
        entry.release()
        del entry, pool
        assert block() is None
    finally:
        gc.enable()


def test_a_pool_in_a_cycle_is_collected_quietly(capsys):
    class Owner:
        pass

    owner = Owner()
    owner.me, owner.pool = owner, SimpleBufferPool()
    owner.entry = owner.pool.allocate(pinned(64))
    owner.idle = owner.pool.allocate(device(64))
    owner.idle.release()
    blocks = [weakref.ref(block) for block in owner.pool._store.blocks]
    del owner
    gc.collect()
    gc.collect()
    assert not any(block() for block in blocks)
    assert capsys.readouterr().err == ""


def run_program(source, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


PREAMBLE = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from numba import cuda
from numbabuf.pool import SimpleBufferPool
from numbabuf import BufferSpec, BufferState, Tier
pool = SimpleBufferPool()
spec = BufferSpec(64, "uint8", Tier.PINNED)
leased, idle, dropped = pool.allocate(spec), pool.allocate(spec), pool.allocate(spec)
idle.release()
"""


@pytest.mark.parametrize(
    "ending",
    ["", "del dropped", "cycle = [dropped, pool]; cycle.append(cycle); del cycle, dropped, pool", "pool.close()"],
)
def test_the_interpreter_exits_quietly(ending):
    done = run_program(PREAMBLE + ending)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FORK = """
import os, sys, gc, threading
holding, go = threading.Event(), threading.Event()
def hold():
    with pool._store.lock:
        holding.set()
        go.wait(20)
thread = threading.Thread(target=hold)
thread.start()
holding.wait(20)
warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
if child == 0:
    from numbabuf.errors import ClosedError
    try:
        pool.allocate(spec)
    except ClosedError as error:
        assert "another process" in str(error), error
    else:
        os._exit(3)
    leased.release()
    del dropped, idle
    gc.collect()
    pool.check()
    assert pool.stats().reserved_bytes == 0
    pool.close()
    del leased, pool
    sys.exit(0)
go.set()
thread.join()
assert os.waitpid(child, 0)[1] == 0
leased.release()
assert pool.stats().in_use_count == 1
dropped.release()
pool.check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_quiet_and_the_child_is_told():
    done = run_program(PREAMBLE + FORK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------------------------------------------- observation


def test_scopes_nest_and_count_what_happens_inside(pool):
    before = pool.allocate(pinned(1000))  # takes 1024
    with pool.statistics() as outer:
        a = pool.allocate(pinned(2048))
        with pool.statistics() as inner:
            b = pool.allocate(pinned(4096))
            b.release()
            before.release()
            pool.allocate(pinned(4096)).release()
        a.release()
    pool.allocate(pinned(4096)).release()  # after both
    got = inner.stats()
    assert (got.current_bytes, got.peak_bytes, got.total_bytes) == (-1024, 4096, 8192)
    assert (got.current_count, got.peak_count, got.total_count) == (-1, 1, 2)
    got = outer.stats()
    assert (got.current_bytes, got.peak_bytes, got.total_bytes) == (-1024, 2048 + 4096, 2048 + 8192)
    assert pool.stats().exact_hits == 2


def test_a_hit_and_its_release_take_no_lock(pool):
    inside = pool._store

    class Forbidden:
        def __enter__(self):
            raise AssertionError("the hot path took the lock")

        acquire = __exit__ = __enter__

    specs = [BufferSpec(8, "uint8", tier) for tier in Tier]
    pool.reserve(specs)
    lock, inside.lock = inside.lock, Forbidden()
    try:
        for spec in specs * 3:
            pool.allocate(spec).release()
        with pytest.raises(AssertionError, match="took the lock"):
            pool.allocate(pinned(9))
    finally:
        inside.lock = lock
    assert pool.stats().exact_hits == 9


def test_after_a_scope_leases_are_hot_again(pool):
    with pool.statistics():
        entry = pool.allocate(pinned(8))
    assert not pool._hot or pool._hot == {pinned(8).line: pool._store.lists.by_key[pinned(8).line].ready}
    entry.release()
    with pool.allocate(pinned(8)) as entry:
        assert entry._held[0].block.plain


def test_the_event_ring_tells_the_story():
    with SimpleBufferPool(events=16) as pool:
        first = pool.allocate(pinned(100))
        first.release()
        pool.allocate(BufferSpec((1, 104), "uint8", Tier.PINNED))
        pool.stats()
        pool.clear()
        records = pool.events()
        kinds = [pool._store.watch.ring.KINDS[kind] for kind in records["kind"]]
        assert kinds == ["grow", "miss", "release", "class_hit", "lost", "free"]
        assert set(records["nbytes"]) == {104} and len(set(records["address"])) == 1
        assert list(records["generation"]) == [0, 1, 1, 2, 2, 2]
        assert set(records["thread"]) == {threading.get_ident()}
        assert (np.diff(records["time_ns"]) >= 0).all()
        for _ in range(20):
            pool.allocate(pinned(1)).release()
        assert len(pool.events()) == 16
    with SimpleBufferPool() as pool, pytest.raises(ValueError, match="events="):
        pool.events()


def test_check_finds_what_is_wrong(pool):
    inside = pool._store
    entries = [pool.allocate(pinned(8)) for _ in range(2)]
    blocks = [entry._held[0].block for entry in entries]
    entries[0].release()
    shelf = inside.lists.by_key[pinned(8).line]

    def twice():
        shelf.ready.append(shelf.ready[0])
        return shelf.ready.pop

    def overlap():
        old, blocks[1].address = blocks[1].address, blocks[0].address + 4
        return lambda: setattr(blocks[1], "address", old)

    def account():
        inside.ledger.reserved[Tier.PINNED] += 1
        return lambda: inside.ledger.reserved.update({Tier.PINNED: 16})

    def small():
        blocks[1].nbytes = 4
        return lambda: setattr(blocks[1], "nbytes", 8)

    def limit():
        inside.ledger.set_limit(Tier.PINNED, 15)
        return lambda: inside.ledger.set_limit(Tier.PINNED, None)

    def foreign():
        del inside.blocks[blocks[0]]
        return lambda: inside.blocks.__setitem__(blocks[0], None)

    for damage in (twice, overlap, account, small, limit, foreign):
        repair = damage()
        with pytest.raises(AssertionError, match="SimpleBufferPool"):
            pool.check()
        repair()
        pool.check()
    entries[1].release()


def test_closed_in_the_middle_of_an_allocation(pool, monkeypatch):
    """The pool is closed while the driver call runs: the lease is good, and its release frees."""
    pool = SimpleBufferPool()
    real = _cuda.empty_pinned

    def close_first(nbytes):
        pool.close()
        return real(nbytes)

    monkeypatch.setattr(_cuda, "empty_pinned", close_first)
    entry = pool.allocate(pinned(64))
    with pytest.raises(ClosedError):
        pool.allocate(pinned(64))
    entry.release()
    assert pool.stats().reserved_bytes == 0


# ---------------------------------------------------------------------------------- interrupted, called from within


def interrupt(*_, **__):
    raise KeyboardInterrupt


def two_leases(pool, spec, stream=None):
    """Two leases at one time never share memory."""
    one, two = pool.allocate(spec, stream=stream), pool.allocate(spec, stream=stream)
    assert one.address != two.address
    pool.check()
    one.release()
    two.release()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pool_cannot_be_copied(pool, way):
    with pytest.raises(TypeError, match="SimpleBufferPool cannot be copied or pickled"):
        way(pool)


@pytest.mark.parametrize("stream", [None, "own"])
def test_an_interrupt_after_the_release_does_not_give_the_lease_back(stream, monkeypatch):
    with SimpleBufferPool(events=8) as pool:
        stream = stream and _cuda.as_stream(None)
        entry = pool.allocate(device(64), stream=stream)
        with monkeypatch.context() as patch:
            patch.setattr(pool._store.watch, "tell", interrupt)
            with pytest.raises(KeyboardInterrupt):
                entry.release()
        two_leases(pool, device(64), stream)
        if entry.state is not BufferState.FREE:
            entry.release()
        two_leases(pool, device(64), stream)


class Interrupted:
    """A lock, the wait for which is interrupted once."""

    def __init__(self, lock):
        self.lock, self.interrupts = lock, [KeyboardInterrupt]

    def __enter__(self):
        if self.interrupts:
            raise self.interrupts.pop()
        return self.lock.__enter__()

    def __exit__(self, *exc):
        return self.lock.__exit__(*exc)


@pytest.mark.parametrize("where", ["lock", "set_hot"])
def test_a_scope_whose_beginning_is_interrupted_is_closed(pool, monkeypatch, where):
    inside = pool._store
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "lock":
            patch.setattr(inside, "lock", Interrupted(inside.lock))
        else:
            set_hot, interrupts = inside.set_hot, [KeyboardInterrupt]

            def set_hot_interrupted():
                set_hot()
                if interrupts:
                    raise interrupts.pop()

            patch.setattr(inside, "set_hot", set_hot_interrupted)
        with pool.statistics():
            pass
    pool.allocate(pinned(64)).release()
    assert not inside.watch.active
    assert pool._hot, "leases go past the lock again"


def test_lost_memory_whose_report_is_interrupted_is_reclaimed(pool, monkeypatch):
    pool.allocate(pinned(64))
    gc.collect()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store._log, "warning", interrupt)
        pool.stats()
    assert pool.stats().idle_count == 1
    pool.check()


def test_a_late_release_leaves_a_closed_pool_no_events(streams):
    _, one, _ = streams
    pool = SimpleBufferPool()
    inside = pool._store
    entry = pool.allocate(pinned(64))
    pool.close()
    entry.release(stream=one)
    assert not inside.fences.spare and not inside.blocks


def test_a_class_hit_that_fails_puts_the_buffer_back_in_order(streams, monkeypatch):
    _, one, two = streams
    with SimpleBufferPool() as pool:
        pool.allocate(device(1024), stream=one).release()
        with monkeypatch.context() as patch:
            patch.setattr(Block, "become", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.allocate(device(1020), stream=one)
        gc.collect()
        assert pool.stats().idle_count == 1 and pool.stats().lost == 0
        waits = pool.stats().stream_waits
        pool.allocate(device(1024), stream=two).release()
        assert pool.stats().stream_waits == waits + 1, "the other stream's work still has to be waited for"


def test_lost_memory_that_cannot_be_marked_is_reported_once(streams, monkeypatch, caplog):
    _, one, _ = streams
    with SimpleBufferPool() as pool:
        inside = pool._store
        entry = pool.allocate(pinned(64), stream=one)
        del entry
        gc.collect()
        with monkeypatch.context() as patch:
            patch.setattr(inside.fences, "behind", lambda _: (_ for _ in ()).throw(RuntimeError("lost")))
            for _ in range(3):
                assert pool.stats().lost == 1 and pool.stats().pending_count == 1
        assert pool.stats().lost == 1 and len(inside.deferred.pending()) == 1 and len(caplog.records) == 1


def test_what_is_released_with_a_stream_after_the_end_is_freed(streams):
    _, one, _ = streams
    pool = SimpleBufferPool()
    inside = pool._store
    entries = [pool.allocate(pinned(64)), pool.allocate(device(64), stream=one)]
    pool.close()
    for entry in entries:
        entry.release(stream=one)
    assert inside.ledger.total == 0 and not inside.blocks, "a release frees, without anybody looking"
    pool.check()


def test_a_plain_release_that_races_with_the_close_frees(pool):
    """The close comes when the release has seen that the buffer may go straight back to its shelf."""
    inside = pool._store
    entry = pool.allocate(pinned(64))
    block = entry._held[0].block
    home = block.home

    def closed_first(handle):
        pool.close()
        home(handle)

    block.home = closed_first
    entry.release()
    assert inside.ledger.total == 0 and not inside.blocks, "freed without anybody looking"
    pool.check()


# ------------------------------------------------------------------------------------------------- limits, many sizes


def test_a_limit_can_be_changed(pool):
    entry = pool.allocate(pinned(1 << 12))
    pool.allocate(pinned(1 << 14)).release()
    pool.limits[Tier.PINNED] = 1 << 13  # frees what is idle
    assert pool.stats().reserved_bytes <= 1 << 13 and pool.limits[Tier.PINNED] == 1 << 13
    with pytest.raises(TierFullError, match="limits"):
        pool.allocate(pinned(1 << 13))
    with pytest.raises(TierFullError, match="the limit stays at 8192"):
        pool.limits[Tier.PINNED] = 1 << 10
    pool.limits = {Tier.PINNED: 1 << 15}  # as the error advises
    pool.allocate(pinned(1 << 13)).release()
    entry.release()
    pool.limits[Tier.PINNED] = None
    for bad, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error):
            pool.limits[Tier.PINNED] = bad
    pool.check()


def test_a_buffer_of_many_sizes_leaves_none_of_them_behind(pool):
    for more in range(300):
        pool.allocate(pinned((1 << 20) + 1 + more)).release()
    stats = pool.stats()
    assert (stats.misses, stats.class_hits) == (1, 299)
    assert len(pool._store.lists) == 1
    pool.check()
