"""The limits of a hierarchical pool, changed while it is used: what an error advises works, and nothing is lost."""

import numpy as np
import pytest

from numbabuf import _cuda
from numbabuf.errors import CaptureError, ClosedError, TierFullError
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers.policies import LRU
from numbabuf.tiers.pool import HierarchicalBufferPool


def spec(size, tier=Tier.DEVICE):
    return BufferSpec(size, "uint8", tier)


@pytest.fixture
def pool():
    with HierarchicalBufferPool(device_bytes=4096, pinned_bytes=8192) as pool:
        yield pool
        pool.check()


def fill(pool, count):
    entries = [pool.allocate(spec(1024), movable=True) for _ in range(count)]
    for number, entry in enumerate(entries):
        with pool.use([entry], in_place=False) as (array,):
            array.copy_to_device(np.full(1024, number, np.uint8))
    return entries


def release(pool, entries):
    """Release buffers that still hold what `fill` wrote."""
    for number, entry in enumerate(entries):
        with pool.use([entry], write=False) as (array,):
            assert (array.copy_to_host() == number).all()
        entry.release()


def test_limits_are_a_mapping_of_tiers(pool):
    assert dict(pool.limits) == {Tier.DEVICE: 4096, Tier.MANAGED: 0, Tier.PINNED: 8192}
    pool.limits = {Tier.DEVICE: 2048, Tier.PINNED: 1024}
    pool.limits["managed"] = 512
    assert repr(pool.limits) == "<Limits device: 2048, managed: 512, pinned: 1024>"
    with pytest.raises(TypeError, match="assign another"):
        del pool.limits[Tier.DEVICE]


@pytest.mark.parametrize(
    ("limits", "error"),
    [({"gpu": 1}, ValueError), ({Tier.DEVICE: -1}, ValueError), ({Tier.DEVICE: 1.5}, TypeError), (4096, TypeError)],
)
def test_what_is_no_limit_is_refused(pool, limits, error):
    before = dict(pool.limits)
    with pytest.raises(error):
        pool.limits = limits
    assert dict(pool.limits) == before


def test_all_idle_memory_of_a_tier_is_room_in_it(pool):
    """Of every capacity, of whatever stream it was released on; none of another tier's."""
    fixed = pool.allocate(spec(2048))
    large = pool.allocate(spec(4096), movable=True)
    assert large.tier is Tier.PINNED
    idle = [(512, None), (512, None), (256, _cuda.as_stream(None))]
    leases = [pool.allocate(spec(size), stream=stream) for size, stream in idle]
    leases.append(pool.allocate(spec(128, Tier.PINNED)))
    for lease in leases:
        lease.release()
    assert pool.stats().idle_bytes == 512 + 512 + 256 + 128
    with pytest.raises(TierFullError, match="leave 2048"):
        pool.promote([large])
    fixed.release()
    pool.promote([large])
    assert large.tier is Tier.DEVICE
    large.release()


def test_the_advice_of_an_error_works(pool):
    entries = fill(pool, 4)
    with pytest.raises(TierFullError, match=r"raise limits\[Tier.DEVICE\]"):
        pool.use([*entries, pool.allocate(spec(1024), movable=True)], in_place=False).__enter__()
    more = pool.allocate(spec(1024), movable=True)
    pool.limits[Tier.DEVICE] = 5120
    with pool.use([*entries, more], in_place=False):
        assert more.tier is Tier.DEVICE
    more.release()
    release(pool, entries)


def test_a_lower_limit_frees_what_is_idle_then_demotes_the_coldest(pool):
    entries = fill(pool, 3)
    pool.allocate(spec(1024), movable=True).release()
    pool.limits[Tier.DEVICE] = 3072
    assert [entry.tier for entry in entries] == [Tier.DEVICE] * 3
    with pool.use(entries[:1], write=False):
        pass
    pool.limits[Tier.DEVICE] = 1024
    assert [entry.tier for entry in entries] == [Tier.DEVICE, Tier.PINNED, Tier.PINNED]
    assert pool.stats().reserved_by_tier[Tier.DEVICE] == 1024
    release(pool, entries)


def test_a_lower_limit_of_pinned_memory_gives_up_copies(pool):
    entries = [pool.allocate(spec(1024, Tier.PINNED), movable=True) for _ in range(2)]
    pool.promote(entries)
    pool.limits[Tier.PINNED] = 0
    assert pool.stats().reserved_by_tier[Tier.PINNED] == 0
    for entry in entries:
        entry.release()


def test_a_limit_below_what_is_in_use_is_refused_and_stays(pool):
    entries = fill(pool, 3)
    with pool.use(entries[:2], write=False), pytest.raises(TierFullError, match="the limit stays at 4096"):
        pool.limits[Tier.DEVICE] = 1024
    assert pool.limits[Tier.DEVICE] == 4096
    plain = pool.allocate(BufferSpec(512, "uint8"))
    with pytest.raises(TierFullError, match="leased and not movable"):
        pool.limits[Tier.DEVICE] = 0
    plain.release()
    pool.limits[Tier.PINNED] = 0
    with pytest.raises(TierFullError, match="raise the limit of a tier below, first"):
        pool.limits[Tier.DEVICE] = 0
    pool.limits[Tier.PINNED] = 4096
    pool.limits[Tier.DEVICE] = 0
    assert pool.stats().reserved_by_tier[Tier.DEVICE] == 0
    release(pool, entries)


def test_a_limit_cannot_fall_in_a_capture_but_can_rise(pool):
    entries = fill(pool, 2)
    capture = _cuda.Capture(_cuda.as_stream(None))
    capture.begin()
    try:
        with pytest.raises(CaptureError, match="a lower limit"):
            pool.limits[Tier.DEVICE] = 1024
        pool.limits[Tier.DEVICE] = 8192
    finally:
        capture.abort()
    release(pool, entries)
    pool.close()
    with pytest.raises(ClosedError):
        pool.limits[Tier.DEVICE] = 1


def test_a_policy_is_told_of_the_device_limit(pool):
    told = []

    class Told(LRU):
        def resize(self, budget_bytes):
            told.append(budget_bytes)

    with HierarchicalBufferPool(device_bytes=4096, pinned_bytes=8192, policy=Told()) as pool:
        pool.limits = {Tier.PINNED: 4096, Tier.DEVICE: 2048}
    assert told == [2048]


# ------------------------------------------------------------------------------------------------------- reservation


def test_reserve_demotes_what_is_cold(pool):
    entries = fill(pool, 4)
    pool.reserve([spec(2048)])
    assert [entry.tier for entry in entries].count(Tier.PINNED) == 2
    before = pool.stats().misses
    with pool.allocate(spec(2048), movable=True) as entry:
        assert entry.tier is Tier.DEVICE and pool.stats().misses == before
    release(pool, entries)


def test_what_was_reserved_earlier_is_kept_while_others_can_go(pool):
    entries = fill(pool, 4)
    for size in (900, 800, 700):
        pool.reserve([spec(size)])
    before = pool.stats().misses
    held = [pool.allocate(spec(size), movable=True) for size in (900, 800, 700)]
    assert pool.stats().misses == before and all(entry.tier is Tier.DEVICE for entry in held)
    pool.reserve([spec(64)])
    for entry in held:
        entry.release()
    release(pool, entries)


def test_a_reservation_that_cannot_be_met_demotes_nothing(pool):
    entries = fill(pool, 4)
    with pytest.raises(TierFullError, match="do not fit"):
        pool.reserve([spec(4096), spec(1024)])
    assert all(entry.tier is Tier.DEVICE for entry in entries)
    with pytest.raises(TypeError, match="reserve was given 5"):
        pool.reserve([5])
    release(pool, entries)
