"""What a step costs, counted on the stand-in driver: one graph launch, and nothing else from the driver or the heap."""

import tracemalloc

import kit
import numpy as np
import pytest

import numbabuf
from numbabuf import BufferSpec, InputBufferManager

pytestmark = pytest.mark.stub

SLOTS = 8
STEPS = 40


@pytest.fixture
def manager(stub):
    """Eight slots of several kinds, two captured buckets, all fills made."""
    stub.set_async(0)
    with InputBufferManager(max_batch_size=4, max_seq_len=64, buckets=[64, 256], default_slots=False) as m:
        for n in range(SLOTS):
            source, target = [(None, "int64"), ("int64", "int32"), ("float32", "float16"), (None, "int32")][n % 4]
            m.register_slot(f"s{n}", BufferSpec(256, target), source_dtype=source)
        total = kit.to_device(np.zeros(1, np.int64))
        m.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, step["s0"], total))
        for tokens in (64, 256):
            m.stage_inputs(inputs(tokens), tokens)
        m.synchronize()
        stub.reset_counts()
        yield m
    stub.set_async(kit.lazy_by_environment())


def inputs(tokens):
    dtypes = ["int64", "int64", "float32", "int32"]
    return {f"s{n}": np.ones(tokens, dtypes[n % 4]) for n in range(SLOTS)}


def made(stub):
    """Driver calls since the counts were reset, without those that only read the calling thread's state."""
    return {name: count for name, count in stub.counts().items() if count}


def test_a_replay_is_one_driver_call(manager, stub):
    data = {tokens: inputs(tokens) for tokens in (1, 64, 200)}
    stub.reset_counts()
    for step in range(STEPS):
        tokens = (1, 64, 200)[step % 3]
        manager.replay(data[tokens], tokens)
    assert made(stub) == {"cuGraphLaunch": STEPS}


def test_stage_inputs_is_one_driver_call(manager, stub):
    data = {tokens: inputs(tokens) for tokens in (1, 64, 200)}
    stub.reset_counts()
    for step in range(STEPS):
        tokens = (1, 64, 200)[step % 3]
        manager.stage_inputs(data[tokens], tokens)
    assert made(stub) == {"cuGraphLaunch": STEPS}


def test_a_lease_is_one_driver_call(manager, stub):
    stub.reset_counts()
    for _ in range(STEPS):
        with manager.stage(50) as lease:
            for n in range(SLOTS):
                lease[f"s{n}"][:] = 1
            lease.replay()
    assert made(stub) == {"cuGraphLaunch": STEPS}


def test_a_slower_input_is_still_one_driver_call(manager, stub):
    """Inputs that need a cast, lists and slices take the careful way on the host, not another one on the device."""
    stub.reset_counts()
    manager.replay({"s0": [1, 2, 3], "s1": np.ones(3, np.int16), "s2": np.ones(6, np.float32)[::2]}, 3)
    assert made(stub) == {"cuGraphLaunch": 1}


def test_a_split_step_is_one_call_a_piece(stub):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="split") as m:
        m.capture_buckets(lambda step: None)
        stub.reset_counts()
        m.replay({"input_ids": np.arange(20)}, 20)
        assert made(stub) == {"cuGraphLaunch": 3}


def test_a_refused_step_calls_nothing(manager, stub):
    with pytest.raises(ValueError):
        manager.replay({"s0": np.ones(3, np.int64)}, 4)
    with pytest.raises(numbabuf.BucketOverflowError):
        manager.replay({}, 1000)
    assert made(stub) == {}


def test_a_step_leaves_nothing_behind_on_the_heap(manager):
    """Invariant 9: a thousand steps later the process holds no more than before, but for a few counters."""
    data = inputs(64)
    for _ in range(10):
        manager.replay(data, 64)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(1000):
            manager.replay(data, 64)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 4096, f"{after - before} bytes more after 1000 steps"
    assert peak - before < 64 * 1024, f"a step holds {peak - before} bytes at its peak"


def test_a_step_allocates_no_device_or_pinned_memory(manager, stub):
    before = stub.live()
    for step in range(200):
        manager.replay(inputs(64), 64)
        manager.stage_inputs(inputs(step), step)
    assert stub.live() == before


def test_the_captured_graph_begins_with_the_fill(manager):
    """Node 0 is `fill_slots`, so the user's kernels see this step's inputs: the sum is that of the staged ones."""
    with InputBufferManager(max_batch_size=1, max_seq_len=16, buckets=[16]) as m:
        total = kit.to_device(np.zeros(1, np.int64))
        m.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, step["input_ids"], total))
        for size in (3, 16, 1):
            m.replay({"input_ids": np.full(size, 10)}, size)
        assert kit.to_host(total, m.stream).tolist() == [200]
