"""SimpleBufferPool over numba-cuda's own host path: driver faults, true memory shortage, and order of queued work.

All of it on the stand-in driver, whose calls can be counted, failed in turn and delayed until something waits.
"""

import gc
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import cuda

from numbabuf import _cuda
from numbabuf.errors import TierFullError
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier

pytestmark = pytest.mark.stub

MB = 1 << 20


@cuda.jit
def put(array, value):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


@cuda.jit
def add(total, array):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        total[i] += array[i]


def spec_of(nbytes, tier=Tier.DEVICE):
    return BufferSpec(nbytes // 4, "int32", tier)


@pytest.fixture
def drained(stub):
    """The stand-in's live memory is comparable: nothing waits to be freed, by Numba or by the collector."""

    def live():
        gc.collect()
        _cuda.synchronize()
        _cuda.flush_pending_frees()
        return {kind: stub.live()[kind] for kind in ("device", "managed", "pinned")}

    live()
    return live


ALLOCATORS = {Tier.DEVICE: "cuMemAlloc", Tier.MANAGED: "cuMemAllocManaged", Tier.PINNED: "cuMemHostAlloc"}


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("code", ["2", "999"])
def test_a_failed_allocation_call_changes_nothing(stub, drained, tier, code):
    with SimpleBufferPool() as pool:
        held = pool.allocate(spec_of(4096, tier))
        before, memory = pool.stats(), drained()
        stub.fail(f"{ALLOCATORS[tier]}:1+:{code}")
        error = TierFullError if code == "2" else Exception
        with pytest.raises(error):
            pool.allocate(spec_of(8192, tier))
        with pytest.raises(error):
            pool.reserve([spec_of(8192, tier), spec_of(64, tier)])
        stub.fail("")
        after = pool.stats()
        for name in ("reserved_bytes", "in_use_bytes", "idle_bytes", "reserved_count", "in_use_count", "allocations"):
            assert getattr(after, name) == getattr(before, name), name
        assert drained() == memory
        pool.check()
        pool.allocate(spec_of(8192, tier)).release()
        held.release()


def steps(pool, streams, log):
    """A life with every kind of driver call in it; each step can fail and be taken again."""
    one, two = streams
    held = []

    def lease(nbytes, tier, stream):
        return lambda: held.append(pool.allocate(spec_of(nbytes, tier), stream=stream))

    def release(stream=None):
        def run():
            held[-1].release(stream=stream)
            held.pop()

        return run

    yield from (
        lease(4096, Tier.DEVICE, one), release(), lease(4096, Tier.DEVICE, two), release(one),
        lease(4096, Tier.DEVICE, None), release(), lease(4096, Tier.DEVICE, two), release(),
        lease(1024, Tier.PINNED, one), release(), lease(1024, Tier.PINNED, two), release(two),
        lease(2048, Tier.MANAGED, None), release(one), lease(2048, Tier.MANAGED, None), release(),
        lambda: pool.reserve([spec_of(256), spec_of(512, Tier.PINNED)]),
        lambda: pool.trim(4096),
        lease(8192, Tier.DEVICE, one), release(two),
        lambda: pool.clear(),
    )  # fmt: skip


def run_steps(pool, streams, retry):
    """Take the steps; a step that fails must leave the pool right, and succeed when it is taken again."""
    failures = 0
    for step in steps(pool, streams, None):
        before = pool.stats() if retry else None
        try:
            step()
        except Exception:
            if not retry:
                raise
            failures += 1
            pool.check()
            after = pool.stats()
            assert (after.in_use_bytes, after.in_use_count) == (before.in_use_bytes, before.in_use_count)
            step()
        pool.check()
    return failures


CALLS = (
    "cuMemAlloc", "cuMemAllocManaged", "cuMemHostAlloc", "cuEventCreate", "cuEventRecord", "cuEventQuery",
    "cuEventSynchronize", "cuStreamWaitEvent", "cuStreamSynchronize", "cuStreamQuery", "cuMemFree", "cuMemFreeHost",
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_each_driver_call_failed_in_turn(stub, drained, call):
    streams = [_cuda.as_stream(None) for _ in range(2)]
    memory = drained()
    stub.reset_counts()
    with SimpleBufferPool() as pool:
        run_steps(pool, streams, retry=False)
    total = stub.count(call) or stub.count(call + "_v2")
    for turn in range(1, total + 1):
        pool = SimpleBufferPool()
        stub.fail(f"{call}:{turn}:{2 if 'Alloc' in call else 719 if turn % 2 else 999}")
        try:
            run_steps(pool, streams, retry=True)
            assert pool.stats().in_use_count == 0
        finally:
            stub.fail("")
        pool.check()
        pool.close()
        assert pool.stats().reserved_bytes == 0
        del pool
        if "Free" not in call:  # a failed free is the driver's leak
            assert drained() == memory, f"{call} number {turn}"
    stub.clear_errors()


def test_a_true_shortage_climbs_the_ladder_and_recovers(stub, drained):
    drained()
    base = stub.live()["device"][1]
    free, total = _cuda.memory_info()
    stub.set_total_mb(64)
    try:
        room = _cuda.memory_info()[0] // MB * MB
        with SimpleBufferPool() as pool:
            third = room // 3 // MB * MB
            for _ in range(3):
                pool.allocate(spec_of(third)).release()  # one block, again and again
            assert pool.stats().misses == 1
            with pool.allocate(spec_of(third)):  # or the next would get it
                pool.allocate(spec_of(third - MB)).release()
            large = pool.allocate(spec_of(2 * third))  # fits only once both are gone
            assert pool.stats().oom.trim == 1 and pool.stats().freed == 2
            with pytest.raises(TierFullError, match=r"the device has \d+ of 67108864 bytes free"):
                pool.allocate(spec_of(2 * third))
            large.release()
            pool.allocate(spec_of(2 * third)).release()
            cycle = [pool.allocate(spec_of(2 * third))]
            cycle.append(cycle)
            del cycle, large
            pool.allocate(spec_of(room - 8 * MB)).release()
            assert pool.stats().lost == 1
            pool.check()
        assert drained()["device"][1] == base
    finally:
        stub.set_total_mb(total // MB)
    assert _cuda.memory_info()[1] == total


def test_pinned_shortage_frees_what_numba_has_put_off(stub, drained):
    """Numba counts dropped pinned arrays as no bytes and never retries for pinned memory; the ladder's flush does."""
    drained()
    with SimpleBufferPool() as pool:
        _cuda.empty_pinned(MB)  # dropped: its free is put off
        stub.fail("cuMemHostAlloc:1-3:2")
        entry = pool.allocate(spec_of(MB, Tier.PINNED))
        assert pool.stats().oom.trim == pool.stats().oom.collect == 1
        entry.release()


@pytest.fixture
def lazy(stub):
    _cuda.synchronize()
    yield stub
    _cuda.synchronize()
    stub.set_async(0)
    stub.set_seed(0)


def wait_scenario(pool, one, two, totals, rounds=6):
    """Work on two streams through one buffer at a time: each fills it and adds it to a total of its own."""
    for turn in range(rounds):
        stream = (one, two)[turn % 2]
        entry = pool.allocate(spec_of(1024), stream=stream)
        _cuda.launch(put, 1, 32, stream, entry.array, turn + 1)
        _cuda.launch(add, 1, 32, stream, totals[turn % 2], entry.array)
        entry.release()
    one.synchronize()
    two.synchronize()
    return [int(total.copy_to_host()[0]) for total in totals]


def scenario(stub, seed):
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    totals = [cuda.to_device(np.zeros(256, np.int32)) for _ in range(2)]
    _cuda.synchronize()
    stub.set_seed(seed)
    stub.set_async(1)
    with SimpleBufferPool() as pool:
        got = wait_scenario(pool, one, two, totals)
        assert pool.stats().reserved_count == 1, "the test needs the streams to share one buffer"
    return got


SEEDS = range(1, 13)


def test_another_streams_reuse_is_ordered(lazy):
    for seed in SEEDS:
        assert scenario(lazy, seed) == [1 + 3 + 5, 2 + 4 + 6], f"seed {seed}"


def test_without_the_wait_the_same_scenario_fails(lazy, monkeypatch):
    monkeypatch.setattr(_cuda.Event, "wait", lambda self, stream: None)
    assert any(scenario(lazy, seed) != [1 + 3 + 5, 2 + 4 + 6] for seed in SEEDS)


def test_work_on_the_default_stream_is_ordered_too(lazy):
    for seed in SEEDS:
        one = _cuda.as_stream(None)
        out = cuda.to_device(np.zeros(256, np.int32))
        _cuda.synchronize()
        lazy.set_seed(seed)
        lazy.set_async(1)
        with SimpleBufferPool() as pool:
            entry = pool.allocate(spec_of(1024))
            put[1, 32](entry.array, 7)
            add[1, 32](out, entry.array)
            entry.release()
            entry = pool.allocate(spec_of(1024), stream=one)
            _cuda.launch(put, 1, 32, one, entry.array, 100)
            entry.release()
            one.synchronize()
            assert pool.stats().reserved_count == 1
            assert set(out.copy_to_host()) == {7}, f"seed {seed}"


def test_the_cpu_gets_pinned_memory_only_when_its_reader_is_done(lazy):
    one = _cuda.as_stream(None)
    out = cuda.to_device(np.zeros(256, np.int32))
    _cuda.synchronize()
    lazy.set_async(1)
    with SimpleBufferPool() as pool:
        expected = 0
        for turn in range(8):
            entry = pool.allocate(spec_of(1024, Tier.PINNED), stream=one)
            entry.array[:] = turn
            expected += turn
            _cuda.launch(add, 1, 32, one, out, entry.device_array)
            entry.release()
        one.synchronize()
        assert pool.stats().pending_count == 0
        assert set(out.copy_to_host()) == {expected}


def test_record_stream_orders_a_further_user(lazy):
    for seed in SEEDS:
        one, two = _cuda.as_stream(None), _cuda.as_stream(None)
        out = cuda.to_device(np.zeros(256, np.int32))
        _cuda.synchronize()
        lazy.set_seed(seed)
        lazy.set_async(1)
        with SimpleBufferPool() as pool:
            entry = pool.allocate(spec_of(1024), stream=one)
            _cuda.launch(put, 1, 32, one, entry.array, 3)
            one.synchronize()
            _cuda.launch(add, 1, 32, two, out, entry.array[:128])  # a reader of a part of it, elsewhere
            entry.record_stream(two)
            entry.release()
            entry = pool.allocate(spec_of(1024), stream=one)
            _cuda.launch(put, 1, 32, one, entry.array, 50)
            entry.release()
            _cuda.synchronize()
            assert out.copy_to_host()[0] == 3, f"seed {seed}"


def test_the_host_never_waits_under_wait(lazy):
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    with SimpleBufferPool() as pool:
        pool.reserve([spec_of(1024)])
        pool.allocate(spec_of(1024), stream=one).release()
        scratch = cuda.to_device(np.zeros(256, np.int32))
        _cuda.launch(put, 1, 32, one, scratch, 1)
        _cuda.synchronize()
        lazy.set_async(1)
        _cuda.launch(put, 1, 32, one, scratch, 2)
        queued = lazy.pending()
        assert queued > 0
        lazy.reset_counts()
        for stream in (two, one, two, None, one):
            pool.allocate(spec_of(1024), stream=stream).release()
        assert lazy.pending() > queued  # nothing was made to run
        counts = lazy.counts()
        assert not {name for name in counts if "Synchronize" in name or "Query" in name or "Alloc" in name}
        one.synchronize()


def test_a_stream_destroyed_with_work_on_it(lazy):
    from cuda.core import Device

    stream = Device(0).create_stream()
    wrapped = _cuda.as_stream(stream)
    with SimpleBufferPool() as pool:
        entry = pool.allocate(spec_of(1024), stream=stream)
        _cuda.launch(put, 1, 32, wrapped, entry.array, 9)
        address = entry.address
        stream.close()
        entry.release()
        assert pool.stats().lost_streams == 1
        again = pool.allocate(spec_of(1024), stream=_cuda.as_stream(None))
        assert again.address == address
        again.release()
        pool.check()


def test_one_event_serves_for_ever(stub):
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    with SimpleBufferPool() as pool:
        stub.reset_counts()
        for turn in range(50):
            pool.allocate(spec_of(1024), stream=(one, two)[turn % 2]).release()
        assert stub.count("cuEventCreate") == 1
        assert stub.count("cuStreamWaitEvent") == 49
        assert stub.count("cuEventRecord") == 50


def test_a_hit_makes_no_driver_call(stub):
    specs = [spec_of(1024, tier) for tier in Tier]
    with SimpleBufferPool() as pool:
        pool.reserve(specs)
        stub.reset_counts()
        for _ in range(20):
            for spec in specs:
                pool.allocate(spec).release()
        assert not [name for name, count in stub.counts().items() if count]


def test_fifty_entries_die_in_a_capture(stub, drained):
    stream = _cuda.as_stream(None)
    with SimpleBufferPool() as pool:
        target = pool.allocate(spec_of(1024))
        _cuda.launch(put, 1, 32, stream, target.array, 1)
        specs = [spec_of(256)] * 25 + [spec_of(256, Tier.PINNED)] * 25
        pool.reserve(specs)
        capture = _cuda.Capture(stream)
        capture.begin()
        stub.reset_counts()
        for spec in specs:
            pool.allocate(spec)
        gc.collect()
        _cuda.launch(put, 1, 32, stream, target.array, 2)
        assert not {name for name in stub.counts() if "Free" in name or "Alloc" in name or "Event" in name}
        graph = capture.end()
        assert pool.stats().lost == 50
        graph.launch_on(stream.core)
        stream.synchronize()
        assert target.array.copy_to_host()[0] == 2
        graph.close()
        target.release()


@pytest.mark.parametrize("call", ["clear", "close", "release", "allocate", "stats"])
def test_a_thread_that_never_called_the_driver_may_call_the_pool(stub, drained, call):
    memory = drained()
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    pool = SimpleBufferPool()
    for tier in Tier:
        entries = [pool.allocate(spec_of(1024, tier), stream=one) for _ in range(15)]
        while entries:
            entries.pop().release()  # with an event each
    held = pool.allocate(spec_of(2048), stream=one)
    calls = {
        "clear": pool.clear,
        "close": pool.close,
        "release": held.release,
        "allocate": lambda: pool.allocate(spec_of(1024), stream=two).release(),
        "stats": pool.stats,
    }
    failures = []

    def run():
        try:
            calls[call]()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
    if call == "stats":
        assert pool.stats().pending_count == 0
    if call != "release":
        held.release()
    pool.close()
    pool = held = calls = None
    assert drained() == memory


def test_a_pool_leaves_nothing_behind(stub, drained):
    memory = drained()
    for _ in range(3):
        with SimpleBufferPool() as pool:
            entries = [pool.allocate(spec_of(4096, tier)) for tier in Tier for _ in range(5)]
            for entry in entries[::2]:
                entry.release()
            del entries, entry
        del pool
    assert drained() == memory


EXTERNAL = """
import warnings, weakref
warnings.simplefilter("ignore")
import numpy as np
from numba import cuda
from numba.cuda.cudadrv.driver import driver

class Manager(cuda.HostOnlyCUDAMemoryManager):
    interface_version = 1
    live = 0

    def initialize(self):
        pass

    def memalloc(self, size):
        pointer = driver.cuMemAlloc(size)
        Manager.live += 1

        def free():
            Manager.live -= 1
            driver.cuMemFree(pointer)

        return cuda.cudadrv.driver.AutoFreePointer(weakref.proxy(self.context), pointer, size, finalizer=free)

    def get_ipc_handle(self, memory):
        raise NotImplementedError

    def get_memory_info(self):
        raise NotImplementedError

cuda.set_memory_manager(Manager)

from numbabuf.errors import TierFullError
from numbabuf.pool import SimpleBufferPool
from numbabuf import BufferSpec, Tier

with SimpleBufferPool(max_bytes=1 << 16) as pool:
    for tier in Tier:
        spec = BufferSpec(1024, "float32", tier)
        for stream in (None, cuda.stream(), cuda.stream()):
            with pool.allocate(spec, stream=stream) as entry:
                array = np.asarray(entry.array.copy_to_host() if tier is Tier.DEVICE else entry.array)
                assert array.shape == (1024,)
    assert Manager.live == 1, Manager.live
    try:
        pool.allocate(BufferSpec(1 << 20, "uint8"))
    except TierFullError as error:
        assert "does not say" in str(error)
    else:
        raise AssertionError("no error")
    pool.check()
assert Manager.live == 0, Manager.live
"""


def test_an_external_memory_manager_changes_nothing():
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", EXTERNAL], capture_output=True, text=True, timeout=120, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
