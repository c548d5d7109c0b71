"""What a pool says of itself, against an account kept beside it and against the driver, in random histories."""

import contextlib
import gc
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

from numbabuf import BufferSpec, SimpleBufferPool, Tier, TierFullError, _cuda

LIMIT = 1 << 15
STEPS = 400


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def controls(request, backend):
    """The stand-in driver's controls, or None."""
    return request.getfixturevalue("stub") if backend == "stand-in" else None


def put_off():
    """Carry out the frees that Numba has put off, so that the driver's figures are of this moment."""
    _cuda.synchronize()
    _cuda.flush_pending_frees()


class History:
    """Random calls on a pool, and an account of them that knows nothing but addresses."""

    def __init__(self, pool, seed, controls):
        self.pool, self.random, self.controls = pool, np.random.default_rng(seed), controls
        self.streams = [None, _cuda.as_stream(None), _cuda.as_stream(None)]
        self.live = []
        self.last = {}  # (address, tier) of every block of the pool -> the spec that it was leased as last
        self.counted = dict.fromkeys(
            ("allocations", "allocated_bytes", "exact_hits", "class_hits", "misses", "lost", "freed", "stream_waits"), 0
        )

    def spec(self):
        size = int(self.random.choice([0, 1, 100, 1000, 1030, 4000, 9000]))
        tier = self.random.choice([Tier.DEVICE, Tier.PINNED, Tier.MANAGED])
        return BufferSpec(size + int(self.random.integers(0, 30)), "uint8", tier)

    def calls(self, name):
        return 0 if self.controls is None else self.controls.count(name)

    def blocks(self):
        return {(block.address, block.tier): block for block in self.pool._store.blocks}

    def look(self):
        """The keys of all blocks, and what they have beyond their specs. Keeps no block."""
        blocks = self.blocks()
        return set(blocks), sum(block.nbytes - block.spec.size_bytes for block in blocks.values())

    def allocate(self):
        spec, stream = self.spec(), self.streams[self.random.integers(3)]
        # Blocks, not addresses: room may be made by freeing one, and its address is the new one's at once.
        before, waits = weakref.WeakSet(self.blocks().values()), self.calls("cuStreamWaitEvent")
        try:
            entry = self.pool.allocate(spec, stream=stream)
        except TierFullError:
            return
        self.counted["stream_waits"] += self.calls("cuStreamWaitEvent") > waits
        key = (entry.address, spec.tier)
        known = self.blocks()[key] in before
        kind = "misses" if not known else "exact_hits" if self.last[key] == spec else "class_hits"
        self.counted[kind] += 1
        self.counted["allocations"] += 1
        self.counted["allocated_bytes"] += self.blocks()[key].nbytes
        self.last[key] = spec
        self.live.append(entry)

    def release(self):
        if self.live:
            entry = self.live.pop(self.random.integers(len(self.live)))
            entry.release(stream=self.streams[self.random.integers(3)])

    def drop(self):
        if self.live:
            del self.live[self.random.integers(len(self.live))]
            self.counted["lost"] += 1

    def trim(self):
        self.pool.trim(int(self.random.integers(LIMIT)))

    def reserve(self):
        before = weakref.WeakSet(self.blocks().values())
        wanted = [self.spec() for _ in range(2)]
        with contextlib.suppress(TierFullError):
            self.pool.reserve(wanted)
        for key, block in self.blocks().items():
            if block not in before:
                self.last[key] = block.spec

    def limit(self):
        with contextlib.suppress(TierFullError):
            self.pool.limits[Tier.DEVICE] = int(self.random.integers(LIMIT // 2, LIMIT))

    def step(self):
        names = ["allocate"] * 6 + ["release"] * 5 + ["drop", "trim", "reserve", "limit"]
        put_off()
        getattr(self, str(self.random.choice(names)))()
        put_off()


@pytest.mark.parametrize("seed", range(3))
def test_a_random_history_is_told_as_it_was(controls, no_collector, seed, caplog):
    before = controls.live() if controls else None
    with SimpleBufferPool(max_bytes=LIMIT, max_pinned_bytes=LIMIT) as pool:
        history = History(pool, seed, controls)
        for number in range(STEPS):
            history.step()
            found = pool.stats()
            now, waste = history.look()
            assert found.in_use_bytes + found.idle_bytes + found.pending_bytes == found.reserved_bytes, number
            assert found.in_use_count == len(history.live), number
            assert found.reserved_count == len(now) and found.peak_count >= len(now), number
            assert found.waste_bytes == waste, number
            told = {name: getattr(found, name) for name in history.counted if name not in ("freed", "stream_waits")}
            assert told == {name: history.counted[name] for name in told}, number
            if controls:
                assert found.stream_waits == history.counted["stream_waits"], number
                live = controls.live()
                driver = {tier: live[tier.value][1] - before[tier.value][1] for tier in Tier}
                assert driver == found.reserved_by_tier, f"{number}: a block is kept beyond the pool's own account"
        assert found.peak_bytes >= found.reserved_bytes and found.hit_rate == 1 - found.misses / found.allocations
        assert min(history.counted[name] for name in ("exact_hits", "class_hits", "misses", "lost")) > 0
        for entry in history.live:
            entry.release()
    if controls:
        put_off()
        live = controls.live()
        assert all(live[tier.value] == before[tier.value] for tier in Tier)


PROGRAM = """
import threading
import numpy as np
from numba import cuda
from numbabuf import BufferSpec, SimpleBufferPool, _cuda
assert _cuda.PER_THREAD

@cuda.jit
def fill(array, value):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value

@cuda.jit
def copy(source, target):
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        target[i] = source[i]

spec, out = BufferSpec(256), cuda.to_device(np.zeros(256, np.float32))
with SimpleBufferPool() as pool:
    with pool.allocate(spec) as entry:
        fill[1, 32](entry.array, np.float32(1))
        cuda.default_stream().synchronize()  # the read alone is queued
        copy[1, 32](entry.array, out)

    def write():
        with pool.allocate(spec) as entry:
            fill[1, 32](entry.array, np.float32(2))
            cuda.default_stream().synchronize()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    cuda.default_stream().synchronize()
    assert pool.stats().misses == 1, "one buffer, or this shows nothing"
    pool.check()
    print("right" if (out.copy_to_host() == 1).all() else "wrong")
"""


@pytest.mark.stub
@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_switch_that_makes_default_streams_per_thread_is_kept_to(seed):
    """Neither thread names a stream, and each has a default stream of its own."""
    switched = {"CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM": "1", "CUDASTUB_ASYNC": "1", "CUDASTUB_SEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env={**os.environ, **switched}
    )
    assert done.stdout == "right\n", done.stdout + done.stderr
