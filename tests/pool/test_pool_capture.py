"""A pool while a thread captures: what the capture gets, and what every other thread goes on doing."""

import re
import threading

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, CaptureError, InputBufferManager, SimpleBufferPool, Tier, _cuda

SPEC = BufferSpec(64, "int64")


def in_thread(work):
    """Do `work` in another thread; raise what it raises."""
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for the capture"
    if failed:
        raise failed[0]


@pytest.fixture
def capture():
    """An open capture of this thread's, over one memset."""
    stream, target = _cuda.as_stream(None), _cuda.empty_device(8)
    _cuda.zero(target, stream)
    stream.synchronize()
    capture = _cuda.Capture(stream)
    capture.begin()
    _cuda.zero(target, stream)
    yield capture
    if _cuda.capturing():
        capture.abort()


CALLS = {
    "allocate": lambda pool, held: pool.allocate(BufferSpec(3000)).release(),
    "allocate pinned": lambda pool, held: pool.allocate(BufferSpec(3000, tier=Tier.PINNED)).release(),
    "release": lambda pool, held: held.release(),
    "release on a stream": lambda pool, held: held.release(stream=_cuda.as_stream(None)),
    "reserve": lambda pool, held: pool.reserve([BufferSpec(3000)] * 2),
    "trim": lambda pool, held: pool.trim(0),
    "clear": lambda pool, held: pool.clear(),
    "limits": lambda pool, held: pool.limits.update({Tier.DEVICE: 2048}),
    "close": lambda pool, held: pool.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_threads_capture_refuses_nothing_to_another(capture, call):
    pool = SimpleBufferPool()

    def work():
        held = pool.allocate(BufferSpec(100))
        pool.allocate(BufferSpec(200), stream=_cuda.as_stream(None)).release()
        CALLS[call](pool, held)
        if call in ("trim", "clear", "limits"):
            assert pool.stats().idle_count == 0 or call == "limits"
        if call != "close":
            stream = _cuda.as_stream(None)
            pool.allocate(BufferSpec(8, tier=Tier.PINNED), stream=stream).release()
            stream.synchronize()
        assert pool.stats().pending_count == 0
        pool.check()

    in_thread(work)
    graph = capture.end()
    graph.launch_on(capture.stream.core)
    capture.stream.synchronize()
    graph.close()
    pool.close()


def test_a_buffer_leased_before_the_capture_can_be_released_in_another_thread(capture):
    with SimpleBufferPool() as pool:
        entries = []
        in_thread(lambda: entries.extend(pool.allocate(SPEC) for _ in range(2)))
        in_thread(entries[0].release)
        entries[1].release()  # in the thread that captures: put off
        assert (pool.stats().idle_count, pool.stats().pending_count) == (1, 1)
        capture.end().close()
        assert pool.stats().idle_count == 2


@pytest.fixture
def step():
    """A function to capture, with a temporary from a pool, over the slot input_ids; where its result goes."""
    with InputBufferManager(max_batch_size=1, max_seq_len=16, buckets=[8, 16]) as manager, SimpleBufferPool() as pool:
        out = kit.to_device(np.zeros(16, np.int64))
        ten = kit.to_device(np.array([1, 10]))

        def function(step):
            ids = step["input_ids"]
            with pool.allocate(BufferSpec(16, "int64")) as temporary:
                kit.run(kit.affine, step.stream, ids, ten, temporary.array)
                kit.run(kit.widen, step.stream, temporary.array[: ids.size], out)

        yield manager, pool, function, out


def test_the_advised_reservation_is_enough_and_graphs_share_it(step):
    manager, pool, function, out = step
    with pytest.raises(CaptureError) as refused:
        manager.capture_buckets(function)
    advice = re.search(r"reserve\(\[.*\]\)", str(refused.value)).group()
    eval(f"pool.{advice}", {"pool": pool, "BufferSpec": BufferSpec, "Tier": Tier})
    manager.capture_buckets(function)
    found = pool.stats()
    assert (found.reserved_count, found.misses, found.pending_count) == (1, 0, 1)
    for size in (16, 8, 3, 16):
        manager.replay({"input_ids": np.arange(size)}, size)
        assert (kit.to_host(out, manager.stream)[:size] == np.arange(size) + 10).all()
    manager.close_graphs()
    assert pool.stats().idle_count == 1
    pool.check()
