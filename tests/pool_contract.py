"""What every buffer pool must do; each pool's test class inherits it and says how to make the pool."""

import dataclasses
import gc

import numpy as np
import pytest
from numba import cuda

from numbabuf import _cuda
from numbabuf.errors import ClosedError, StaleBufferError, TierFullError
from numbabuf.pool.spec import BufferSpec, BufferState, Tier

TIERS = tuple(Tier)


@cuda.jit
def add_one(array):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] += 1


@cuda.jit
def scale_points(points):
    for i in range(cuda.grid(1), points.size, cuda.gridsize(1)):
        points[i].x *= points[i].k


def to_host(entry):
    return entry.array.copy_to_host() if entry.tier is Tier.DEVICE else entry.array


class PoolContract:
    def make_pool(self, **options):
        raise NotImplementedError

    @pytest.fixture
    def pool(self):
        with self.make_pool() as pool:
            yield pool
            pool.check()

    @pytest.mark.parametrize("tier", TIERS)
    @pytest.mark.parametrize("shape", [7, (3, 5), (), (2, 0, 4), 0])
    def test_array_is_what_the_spec_says(self, pool, tier, shape):
        spec = BufferSpec(shape, "int16", tier)
        with pool.allocate(spec) as entry:
            assert entry.array.shape == spec.shape
            assert entry.array.dtype == np.int16
            assert isinstance(entry.array, np.ndarray) == (tier is not Tier.DEVICE)
            assert entry.device_array.shape == spec.shape
            assert entry.device_array is entry.device_array
            assert (entry.spec, entry.tier, entry.nbytes) == (spec, tier, spec.size_bytes)

    @pytest.mark.parametrize("tier", TIERS)
    def test_bfloat16_is_uint16_to_kernels(self, pool, tier):
        ml_dtypes = pytest.importorskip("ml_dtypes")
        with pool.allocate(BufferSpec(4, "bfloat16", tier)) as entry:
            assert entry.array.dtype == (np.uint16 if tier is Tier.DEVICE else ml_dtypes.bfloat16)
            assert entry.device_array.dtype == np.uint16

    @pytest.mark.parametrize("tier", TIERS)
    @pytest.mark.parametrize("shape", [5, (2, 3), 0])
    def test_records_keep_their_fields(self, pool, tier, shape):
        point = np.dtype([("x", "f4"), ("k", "i4")], align=True)
        with pool.allocate(BufferSpec(shape, point, tier)) as entry:
            assert entry.array.dtype == entry.device_array.dtype == point
            assert entry.__cuda_array_interface__["descr"] == point.descr
            start = np.zeros(entry.spec.shape, point)
            start["x"], start["k"] = 1.5, 7
            if start.size:
                entry.device_array.copy_to_device(start)
                _cuda.launch(scale_points, 1, 2, _cuda.as_stream(0), entry.device_array.reshape(start.size))
                assert (entry.device_array.copy_to_host()["x"] == 10.5).all()

    def test_fields_that_overlap_have_no_descriptor(self, pool):
        twice = np.dtype({"names": ["whole", "low"], "formats": ["i8", "i4"], "offsets": [0, 0]})
        with pool.allocate(BufferSpec(4, twice)) as entry:
            assert entry.device_array.dtype == twice
            assert "descr" not in entry.__cuda_array_interface__

    @pytest.mark.parametrize("tier", TIERS)
    def test_kernels_take_the_device_array_of_every_tier(self, pool, tier):
        stream = _cuda.as_stream(None)
        with pool.allocate(BufferSpec(33, "float32", tier)) as entry:
            start = np.arange(33, dtype=np.float32)
            if tier is Tier.DEVICE:
                entry.array.copy_to_device(start)
            else:
                entry.array[:] = start
            _cuda.launch(add_one, 1, 4, stream, entry.device_array)
            stream.synchronize()
            assert to_host(entry).tolist() == (start + 1).tolist()

    @pytest.mark.parametrize("tier", TIERS)
    def test_address_and_interface_are_of_the_array(self, pool, tier):
        with pool.allocate(BufferSpec((2, 3), "float64", tier)) as entry:
            assert entry.address == _cuda.address(entry.array)
            interface = entry.__cuda_array_interface__
            assert interface["data"] == (entry.address, False)
            assert (interface["shape"], interface["typestr"]) == ((2, 3), np.dtype("float64").str)
            assert (interface["version"], interface["stream"]) == (3, None)

    def test_states_of_a_life(self, pool):
        entry = pool.allocate(BufferSpec(4, "uint8", Tier.PINNED))
        assert entry.state is BufferState.ALLOCATED and entry.use_count == 0 and entry.last_used is None
        entry.mark_staged()
        assert entry.state is BufferState.STAGED
        entry.mark_in_use()
        first = entry.last_used
        entry.mark_in_use(stream=_cuda.as_stream(None))
        assert entry.state is BufferState.IN_USE and entry.use_count == 2 and entry.last_used >= first
        entry.release()
        assert entry.state is BufferState.FREE

    @pytest.mark.parametrize("tier", TIERS)
    def test_memory_is_reused_and_generations_tell_leases_apart(self, pool, tier):
        spec = BufferSpec(100, "int32", tier)
        first = pool.allocate(spec)
        address, generation = first.address, first.generation
        first.release()
        second = pool.allocate(spec)
        assert second is not first
        assert (second.address, second.generation) == (address, generation + 1)
        second.release()

    @pytest.mark.parametrize("tier", TIERS)
    def test_a_released_entry_is_dead_for_ever(self, pool, tier):
        spec = BufferSpec((5, 9), "float32", tier)
        entry = pool.allocate(spec)
        entry.release()
        with pool.allocate(spec) as other:  # the same memory, leased anew
            uses = (
                lambda: entry.array,
                lambda: entry.device_array,
                lambda: entry.address,
                lambda: entry.generation,
                lambda: entry.__cuda_array_interface__,
                entry.mark_in_use,
                entry.mark_staged,
                entry.release,
                lambda: entry.release(stream=_cuda.as_stream(None)),
                lambda: entry.record_stream(_cuda.as_stream(None)),
                lambda: pool.release(entry),
                entry.__enter__,
            )
            for use in uses:
                with pytest.raises(StaleBufferError, match=r"BufferSpec\(\(5, 9\), float32"):
                    use()
            assert other.state is BufferState.ALLOCATED and other.array.shape == (5, 9)
            pool.check()

    def test_leaving_the_with_releases_once(self, pool):
        with pool.allocate(BufferSpec(3, "uint8", Tier.PINNED)) as entry:
            entry.release()
        with pytest.raises(ZeroDivisionError), pool.allocate(BufferSpec(3, "uint8", Tier.PINNED)) as entry:
            raise ZeroDivisionError
        assert entry.state is BufferState.FREE
        assert pool.stats().in_use_count == 0

    def test_an_entry_is_neither_copied_nor_pickled(self, pool):
        import copy
        import pickle

        with pool.allocate(BufferSpec(3, "uint8", Tier.PINNED)) as entry:
            for copier in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="cannot be copied"):
                    copier(entry)
            assert not hasattr(entry, "no_such_thing")

    @pytest.mark.parametrize("tier", TIERS)
    def test_live_buffers_share_no_byte(self, pool, tier):
        entries = [pool.allocate(BufferSpec(size, "uint8", tier)) for size in (1, 0, 64, 65, 64, 1000, 1, 0)]
        ends = 0
        for entry in sorted(entries, key=lambda entry: entry.address):
            assert entry.address >= ends
            ends = entry.address + max(1, entry.nbytes)
        for entry in entries:
            entry.release()

    @pytest.mark.parametrize("bad", [None, 4096, "float32", (4, "uint8"), [], {}])
    def test_what_is_no_spec_is_refused(self, pool, bad):
        before = pool.stats()
        with pytest.raises(TypeError, match="BufferSpec"):
            pool.allocate(bad)
        with pytest.raises(TypeError, match="BufferSpec"):
            pool.reserve([bad])
        assert pool.stats() == before

    def test_what_is_no_stream_is_refused_and_the_lease_goes_on(self, pool):
        spec = BufferSpec(4, "uint8", Tier.PINNED)
        with pytest.raises(TypeError, match="no stream"):
            pool.allocate(spec, stream="stream")
        entry = pool.allocate(spec)
        for use in (entry.release, entry.mark_in_use):
            with pytest.raises(TypeError, match="no stream"):
                use(stream=object())
        entry.array[:] = 1
        assert entry.state is BufferState.ALLOCATED
        entry.release()

    def test_what_is_no_entry_of_this_pool_is_not_released(self, pool):
        with self.make_pool() as other, other.allocate(BufferSpec(4, "uint8", Tier.PINNED)) as entry:
            with pytest.raises(ValueError, match="another pool"):
                pool.release(entry)
            assert entry.state is BufferState.ALLOCATED
            for bad in (None, entry.array, "entry"):
                with pytest.raises(TypeError, match="BufferEntry"):
                    pool.release(bad)
        mine = pool.allocate(BufferSpec(4, "uint8", Tier.PINNED))
        pool.release(mine)
        assert mine.state is BufferState.FREE

    def test_closing_spares_leased_buffers(self):
        pool = self.make_pool()
        spec = BufferSpec(64, "uint8", Tier.PINNED)
        idle, leased = pool.allocate(spec), pool.allocate(spec)
        idle.release()
        pool.close()
        pool.close()
        assert pool.closed
        assert pool.stats().reserved_count == 1
        leased.array[:] = 3
        assert leased.array.sum() == 192
        for call in (lambda: pool.allocate(spec), lambda: pool.reserve([spec])):
            with pytest.raises(ClosedError, match="closed"):
                call()
        pool.check()
        leased.release()
        assert pool.stats().reserved_bytes == 0
        pool.check()

    def test_entries_outlive_their_pool(self):
        pool = self.make_pool()
        entry = pool.allocate(BufferSpec(64, "uint8", Tier.PINNED))
        del pool
        gc.collect()
        entry.array[:] = 5
        assert entry.array.sum() == 320
        entry.release()
        with pytest.raises(StaleBufferError):
            entry.release()

    @pytest.mark.parametrize("tier", TIERS)
    def test_clear_and_trim_free_idle_memory_only(self, pool, tier):
        specs = [BufferSpec(size, "uint8", tier) for size in (1024, 2048, 4096)]
        entries = [pool.allocate(spec) for spec in specs]
        entries[1].release()
        entries[2].release()
        assert pool.trim(1 << 30) == 0
        assert pool.trim(1024 + 4096) > 0
        assert 1024 < pool.stats().reserved_bytes <= 1024 + 4096
        pool.clear()
        stats = pool.stats()
        assert (stats.reserved_bytes, stats.in_use_bytes, stats.idle_bytes) == (1024, 1024, 0)
        assert to_host(entries[0]).shape == (1024,)
        entries[0].release()
        with pytest.raises(ValueError, match="max_bytes"):
            pool.trim(-1)

    @pytest.mark.parametrize("tier", TIERS)
    def test_reserved_buffers_are_hits(self, pool, tier):
        specs = [BufferSpec(64, "int64", tier)] * 3 + [BufferSpec((8, 8), "float32", tier)]
        pool.reserve(specs)
        reserved = pool.stats()
        assert reserved.idle_count == 4 and reserved.misses == 0
        pool.reserve(specs)
        assert pool.stats() == reserved  # they are there already
        entries = [pool.allocate(spec) for spec in specs]
        assert pool.stats().exact_hits == 4 and pool.stats().misses == 0
        for entry in entries:
            entry.release()

    def test_limits_hold_and_a_reservation_is_all_or_nothing(self):
        with self.make_pool(max_bytes=8192, max_pinned_bytes=4096) as pool:
            held = pool.allocate(BufferSpec(4096, "uint8", Tier.PINNED))
            small, large = BufferSpec(1024, "uint8"), BufferSpec(8192, "uint8")
            before = pool.stats()
            with pytest.raises(TierFullError, match="limit"):
                pool.allocate(BufferSpec(1, "uint8", Tier.PINNED))
            with pytest.raises(TierFullError, match="8192"):
                pool.reserve([small, large])
            after = pool.stats()
            assert (after.reserved_bytes, after.idle_bytes) == (before.reserved_bytes, before.idle_bytes)
            pool.check()
            pool.allocate(large).release()
            held.release()

    def test_snapshots_are_frozen_and_add_up(self, pool):
        entries = [pool.allocate(BufferSpec(size, "uint8", Tier.PINNED)) for size in (10, 100, 1000)]
        entries.pop().release()
        stats = pool.stats()
        assert stats.in_use_bytes + stats.idle_bytes + stats.pending_bytes == stats.reserved_bytes
        assert stats.in_use_count + stats.idle_count + stats.pending_count == stats.reserved_count
        assert (stats.in_use_count, stats.idle_count, stats.allocations) == (2, 1, 3)
        assert (stats.peak_count, stats.peak_bytes) == (3, stats.reserved_bytes)
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.reserved_bytes = 0
        assert str(stats.reserved_bytes) in repr(pool)
        for entry in entries:
            entry.release()
