"""What `on_oom` may do, in every pool: release anything, call the pool, and take locks that other threads hold."""

import threading

import pytest

from numbabuf.errors import TierFullError
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec
from numbabuf.tiers.pool import HierarchicalBufferPool


def simple(nbytes, **options):
    return SimpleBufferPool(max_bytes=nbytes, **options)


def tiered(nbytes, **options):
    return HierarchicalBufferPool(device_bytes=nbytes, pinned_bytes=0, **options)


def bytes_of(n):
    return BufferSpec(n, "uint8")


@pytest.fixture(params=[simple, tiered])
def make(request):
    return request.param


@pytest.mark.parametrize("end", [lambda held: held.pop().release(), list.clear], ids=["released", "dropped"])
def test_memory_of_another_size_serves_the_request(make, end):
    held = []
    with make(5200, on_oom=lambda nbytes: end(held)) as pool:
        held.append(pool.allocate(bytes_of(5000)))
        pool.allocate(bytes_of(768)).release()
        steps = pool.stats().oom
        assert (steps.callback, steps.failed) == (1, 0)
        pool.check()


def test_what_only_the_collector_frees_serves_the_request(make):
    """The callback drops a cycle: everything is tried once more after it, the collector as well."""
    held = []

    class Node:
        pass

    def drop(nbytes):
        node = Node()
        node.itself, node.entry = node, held.pop()

    with make(5200, on_oom=drop) as pool:
        held.append(pool.allocate(bytes_of(5000)))
        pool.allocate(bytes_of(768)).release()


def test_it_may_call_the_pool_and_is_not_asked_meanwhile(make):
    asked = []

    def on_oom(nbytes):
        asked.append(nbytes)
        with pytest.raises(TierFullError):
            pool.allocate(bytes_of(4096))
        pool.trim(0)
        pool.stats()
        held.pop().release()

    with make(5200, on_oom=on_oom) as pool:
        held = [pool.allocate(bytes_of(5000))]
        pool.allocate(bytes_of(768)).release()
        assert asked == [768]


def test_one_that_does_not_help_is_asked_once(make):
    asked = []
    with make(1024, on_oom=asked.append) as pool, pool.allocate(bytes_of(1024)):
        with pytest.raises(TierFullError, match="on_oom was called"):
            pool.allocate(bytes_of(512))
        assert asked == [512] and pool.stats().oom.failed == 1


def test_it_holds_no_lock(make):
    """Another thread holds what on_oom wants, and needs the pool before it lets go."""
    mine, holds, asked = threading.Lock(), threading.Event(), threading.Event()

    def other():
        with mine:
            holds.set()
            assert asked.wait(60)
            held.pop().release(stream=0)
            pool.stats()

    def on_oom(nbytes):
        asked.set()
        assert mine.acquire(timeout=60)
        mine.release()

    with make(5200, on_oom=on_oom) as pool:
        held = [pool.allocate(bytes_of(5000))]
        thread = threading.Thread(target=other)
        thread.start()
        assert holds.wait(60)
        pool.allocate(bytes_of(768)).release()
        thread.join(60)
        assert not thread.is_alive()
