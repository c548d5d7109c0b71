"""What allocators are known for getting wrong, asked of both pools: cases that CuPy, RMM and PyTorch test for.

Only behaviour that the pool contract and the pools' own tests leave out. Where numbabuf decides otherwise, the test
says what it decides.
"""

import gc
import threading
import weakref

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, SimpleBufferPool, StaleBufferError, Tier, TierFullError, _cuda
from numbabuf.pool.spec import size_class
from numbabuf.tiers.pool import HierarchicalBufferPool

BUDGET = 1 << 16


def simple(**options):
    return SimpleBufferPool(max_bytes=BUDGET, max_pinned_bytes=BUDGET, **options)


def hierarchical(**options):
    return HierarchicalBufferPool(device_bytes=BUDGET, managed_bytes=0, pinned_bytes=BUDGET, **options)


@pytest.fixture(params=[simple, hierarchical], ids=["simple", "hierarchical"])
def make(request, no_leaks):
    return request.param


def pinned(nbytes):
    return BufferSpec(nbytes, "uint8", Tier.PINNED)


# ------------------------------------------------------------------------------------------- freed twice, or elsewhere


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.PINNED])
def test_a_double_free_does_not_free_the_next_owner(make, tier):
    """CuPy: a pointer freed twice must not hand one block to two owners."""
    spec = BufferSpec(512, "uint8", tier)
    with make() as pool:
        first = pool.allocate(spec)
        first.release()
        second = pool.allocate(spec)
        for _ in range(3):
            with pytest.raises(StaleBufferError):
                first.release()
        third = pool.allocate(spec)
        assert third.address != second.address
        for entry in (second, third):
            entry.release()
        pool.check()


def test_a_foreign_free_leaves_both_pools_as_they_were(make):
    with make() as pool, make() as other:
        entry = pool.allocate(pinned(512))
        before = pool.stats(), other.stats()
        with pytest.raises(ValueError, match="another pool"):
            other.release(entry)
        with pytest.raises(TypeError):
            other.release(entry.array)
        assert (pool.stats(), other.stats()) == before
        entry.release()


# ------------------------------------------------------------------------------------------------------ sizes, limits


@pytest.mark.parametrize("nbytes", [1, 511, 512, 513, 1023, 1025])
def test_odd_sizes_are_aligned_for_every_type(make, nbytes):
    """RMM and CuPy promise 256 and 512 bytes on the device; here the driver's own alignment, and 16 for the host."""
    with make() as pool:
        for tier in (Tier.DEVICE, Tier.PINNED):
            with pool.allocate(BufferSpec(nbytes, "uint8", tier)) as entry:
                assert entry.address % 16 == 0 or kit.SIM  # the simulator's memory is NumPy's


def test_a_limit_can_be_filled_to_the_last_byte_and_not_beyond(make):
    """RMM's limiting adaptor: the limit itself is legal, one byte more is not, and a failure takes nothing."""
    with make() as pool:
        whole = pool.allocate(pinned(BUDGET))
        with pytest.raises(TierFullError):
            pool.allocate(pinned(1))
        whole.release()
        halves = [pool.allocate(pinned(BUDGET // 2)) for _ in range(2)]
        with pytest.raises(TierFullError):
            pool.allocate(pinned(1))
        for half in halves:
            half.release()
        with pytest.raises(TierFullError):
            pool.allocate(pinned(BUDGET + 1))
        pool.allocate(pinned(BUDGET)).release()


def test_fragmentation_never_keeps_a_limit_from_being_used(make):
    """RMM: every second block of a full pool is freed, then one as large as all of those is wanted.

    A pool that splits blocks cannot serve it. This one gives whole blocks back to the driver, so that it can.
    """
    with make() as pool:
        small = [pool.allocate(pinned(1024)) for _ in range(BUDGET // 1024)]
        for entry in small[::2]:
            entry.release()
        large = pool.allocate(pinned(BUDGET // 2))
        spans = sorted((e.address, e.address + e.nbytes) for e in (*small[1::2], large))
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))
        large.release()
        for entry in small[1::2]:
            entry.release()
        pool.check()


def test_sizes_that_rise_and_fall_leave_no_more_than_the_limit(make):
    """CuPy: a ramp of ever new sizes must reuse or free, not pile up."""
    with make() as pool:
        for nbytes in (*range(100, 20_000, 700), *range(20_000, 100, -700)):
            pool.allocate(pinned(nbytes)).release()
            assert pool.stats().reserved_bytes <= BUDGET
        assert pool.stats().oom.failed == 0
        pool.clear()
        assert pool.stats().reserved_bytes == 0


def test_memory_of_a_class_is_reused_and_that_of_another_is_not(make):
    """CuPy: a request one byte over its bin is another bin's; within it, the same memory comes back."""
    with make() as pool:
        first = pool.allocate(pinned(1000))
        address, capacity = first.address, size_class(1000)
        first.release()
        same, beyond = pool.allocate(pinned(capacity)), pool.allocate(pinned(capacity + 1))
        assert same.address == address != beyond.address
        same.release()
        beyond.release()


# ----------------------------------------------------------------------------------------------------- out of memory


def test_a_retry_after_out_of_memory_asks_again_only_once_the_callback_freed(make, monkeypatch):
    """RMM's failure callback: it is told the bytes, once, and what it frees is what the request gets."""
    held, told = [], []

    def on_oom(nbytes):
        told.append(nbytes)
        held.pop().release()

    with make(on_oom=on_oom) as pool:
        held += [pool.allocate(pinned(BUDGET // 2)) for _ in range(2)]
        address = held[-1].address
        entry = pool.allocate(pinned(BUDGET // 2))
        assert told == [BUDGET // 2] and entry.address == address
        entry.release()
        held.pop().release()


def test_a_pool_recovers_from_a_driver_that_was_full_for_a_while(make, monkeypatch):
    """PyTorch: after an error for lack of memory, the same request must work once there is some."""
    with make() as pool:
        real = _cuda.empty_pinned

        def full(nbytes):
            raise MemoryError("full")

        monkeypatch.setattr(_cuda, "empty_pinned", full)
        for _ in range(3):
            with pytest.raises(TierFullError):
                pool.allocate(pinned(4096))
        assert pool.stats().reserved_bytes == 0
        monkeypatch.setattr(_cuda, "empty_pinned", real)
        pool.allocate(pinned(4096)).release()
        pool.check()


def test_an_error_held_by_its_catcher_keeps_no_memory(make):
    """PyTorch: frames of a caught out-of-memory error must not keep the buffers alive that a retry needs."""
    with make() as pool:

        def work():
            with pool.allocate(pinned(BUDGET)):
                pool.allocate(pinned(BUDGET))

        with pytest.raises(TierFullError) as caught:
            work()
        pool.allocate(pinned(BUDGET)).release()
        assert caught.value is not None


# ----------------------------------------------------------------------------------------------------------- streams


@pytest.mark.real
def test_record_stream_on_a_shifted_view_covers_the_whole_buffer(make, backend, request):
    """PyTorch: record_stream of a view that begins inside the block must guard the block."""
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    spec = BufferSpec(64, "int64")
    out = kit.to_device(np.zeros(32, np.int64))
    weights = kit.to_device(np.array([1, 0]))
    if backend == "stand-in":
        stub = request.getfixturevalue("stub")
        stub.set_async(1)
    try:
        with make() as pool:
            entry = pool.allocate(spec, stream=one)
            entry.array.copy_to_device(np.arange(64), stream=one.numba)
            one.synchronize()
            shifted = entry.array[32:]
            kit.run(kit.affine, two.numba, shifted, weights, out)
            entry.record_stream(two)
            entry.release()
            again = pool.allocate(spec, stream=one)
            again.array.copy_to_device(np.full(64, -1), stream=one.numba)
            one.synchronize()
            two.synchronize()
            assert kit.to_host(out, two.numba).tolist() == list(range(32, 64))
            again.release()
    finally:
        if backend == "stand-in":
            stub.set_async(kit.lazy_by_environment())


def test_a_release_on_another_stream_than_the_lease_waits_for_both(make):
    """RMM: freed on the wrong stream. Here the release adds its stream to the lease's, so that neither is forgotten."""
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    with make() as pool:
        entry = pool.allocate(BufferSpec(64), stream=one)
        block = entry._held[0].block
        entry.release(stream=two)
        users = [user for user, _ in block.fence.events] if block.fence else block.users
        assert {user.handle for user in users} == {one.handle, two.handle}
        pool.check()


# ------------------------------------------------------------------------------------------------------ ends of a life


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.PINNED])
def test_a_pool_dropped_before_its_buffers(make, tier):
    """CuPy: the pool dies first; its buffers stay valid, and their memory goes with the last of them."""
    pool = make()
    entries = [pool.allocate(BufferSpec(256, "uint8", tier)) for _ in range(3)]
    gone = weakref.ref(pool)
    block = weakref.ref(entries[0]._held[0].block)
    del pool
    kit.collect()
    assert gone() is None
    for entry in entries:
        assert entry.array.shape == (256,) and entry.nbytes == 256
        entry.release()
        with pytest.raises(StaleBufferError):
            entry.release()
    del entries, entry
    kit.collect()
    assert block() is None


def test_a_cycle_through_an_entry_and_its_array_is_collected(make, caplog):
    """CuPy: a buffer in a reference cycle comes back with the collector, once."""
    with make() as pool:

        class Holder:
            pass

        holder = Holder()
        holder.entry, holder.itself = pool.allocate(pinned(2048)), holder
        del holder
        assert pool.stats().in_use_count == 1
        kit.collect()
        assert (pool.stats().in_use_count, pool.stats().lost) == (0, 1)
        pool.allocate(pinned(2048)).release()
        assert pool.stats().reserved_count == 1
        pool.check()


def test_buffers_released_by_threads_that_end(make):
    """RMM: memory released by a thread that is gone is as good as any."""
    with make() as pool:
        entries = [pool.allocate(pinned(1024)) for _ in range(8)]

        def release(entry):
            entry.release()

        threads = [threading.Thread(target=release, args=(entry,)) for entry in entries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.stats().in_use_count == 0
        again = [pool.allocate(pinned(1024)) for _ in range(8)]
        assert len({entry.address for entry in again}) == 8 and pool.stats().reserved_count == 8
        for entry in again:
            entry.release()


def test_a_pool_in_a_cycle_with_its_own_callback(make):
    """RMM: the callback refers to the pool that calls it."""
    calls = []

    def cycle():
        pool = make(on_oom=lambda nbytes: calls.append(pool))
        pool.allocate(pinned(64)).release()
        return weakref.ref(pool)

    gone = cycle()
    while gc.collect():
        pass
    assert gone() is None and not calls
