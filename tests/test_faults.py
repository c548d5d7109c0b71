"""Driver calls made to fail by the stand-in driver: the error comes out, nothing leaks, later steps are right."""

import contextlib

import kit
import numpy as np
import pytest

from numbabuf import BufferSpec, CaptureError, InputBufferManager, SimpleBufferPool, _cuda

pytestmark = pytest.mark.stub


@pytest.fixture(params=["eager", "lazy"])
def mode(request, stub):
    stub.set_async(request.param == "lazy")
    yield request.param
    stub.fail("")
    stub.set_async(kit.lazy_by_environment())


def ids(n):
    return np.arange(1, n + 1)


def slot_address(manager):
    """Where the manager's slots lie, in its one allocation of device memory."""
    return _cuda.address(manager.get_slot("input_ids").array)


@contextlib.contextmanager
def failing(stub, spec):
    """Let a driver call fail; gives a function that says whether it did."""
    name = spec.split(":")[0]
    at = int(spec.split(":")[1])
    before = stub.count(name)
    stub.fail(spec)
    try:
        yield lambda: stub.count(name) - before >= at
    finally:
        stub.fail("")


# -------------------------------------------------------------------------------------------------------- failed steps


@pytest.mark.parametrize("ring", [1, 2, 4])
def test_a_failed_launch_counts_for_nothing(mode, stub, ring):
    """Host and device count steps apart: after a launch that never ran they must agree again."""
    log = kit.Log(60, ring=ring)
    random = np.random.default_rng(ring)
    for number in range(40):
        if number in (0, 3, 4, 17):
            before = log.manager.stats()
            with failing(stub, "cuGraphLaunch:1"), pytest.raises(Exception, match="LAUNCH_FAILED"):
                log.manager.replay({"ids": ids(3), "other": ids(3)}, 3)
            after = log.manager.stats()
            assert (after.steps, after.live_tokens, after.buckets) == (before.steps, before.live_tokens, before.buckets)
        log.step(random)
    assert log.wrong() == []
    log.manager.check()
    log.manager.close()


def test_each_way_of_staging_survives_a_failed_launch(mode, stub):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="eager") as m:
        out = kit.to_device(np.zeros(1, np.int64))
        m.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, step["input_ids"], out))
        m.stage_inputs({"input_ids": ids(3)}, 3)

        def lease():
            with m.stage(2) as lease:
                lease["input_ids"][:] = 9

        ways = {
            "cuGraphLaunch": [lambda: m.stage_inputs({}, 0), lambda: m.replay({}, 0), lease],
            "cuLaunchKernelEx": [lambda: m.get_slot("input_ids").set_data([1])],
        }
        for call, attempts in ways.items():
            for attempt in attempts:
                with failing(stub, f"{call}:1") as failed, pytest.raises(Exception, match="LAUNCH_FAILED"):
                    attempt()
                assert failed()
                m.stage_inputs({"input_ids": ids(5)}, 5)
                assert kit.contents(m)["input_ids"][:8].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
                m.check()
        steps = m.stats()
        with (
            failing(stub, "cuLaunchKernelEx:1"),
            pytest.raises(Exception, match="LAUNCH_FAILED"),
            pytest.warns(RuntimeWarning),
        ):
            m.replay({"input_ids": ids(20)}, 20)
        assert m.stats() == steps, "an eager step that was not queued is not counted"
        m.replay({"input_ids": ids(20)}, 20)
        assert kit.contents(m)["input_ids"][:20].tolist() == ids(20).tolist()
        m.check()


def test_a_split_that_fails_half_way(mode, stub):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="split") as m:
        total = kit.to_device(np.zeros(1, np.int64))
        m.capture_buckets(lambda step: kit.run(kit.add_up, step.stream, step["input_ids"], total))
        with failing(stub, "cuGraphLaunch:2"), pytest.raises(Exception, match="LAUNCH_FAILED"):
            m.replay({"input_ids": ids(20)}, 20)
        assert kit.to_host(total, m.stream).tolist() == [36], "the first piece ran"
        m.replay({"input_ids": ids(20)}, 20)
        assert kit.to_host(total, m.stream).tolist() == [36 + 210]
        m.check()


# ------------------------------------------------------------------------------------------------- every call in turn


def calls_of(stub, action):
    """The driver calls that `action` makes: name -> count."""
    before = stub.counts()
    action()
    return {name: n - before.get(name, 0) for name, n in stub.counts().items() if n > before.get(name, 0)}


HARMLESS = ("cuGetProcAddress", "cuGetErrorName", "cuGetErrorString", "cuDriverGetVersion", "cuInit")
NOT_OURS = ("cuCtxPopCurrent", "cuCtxPushCurrent", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuCtxGetDevice",
            "cuDeviceGet", "cuDevicePrimaryCtxRetain")  # fmt: skip


def sweep(stub, action):
    """Specs that let each driver call of `action` fail in turn; the first two and the last of each kind."""
    calls = calls_of(stub, action)
    assert calls
    return [
        f"{name}:{at}:2"
        for name, count in sorted(calls.items())
        if name.removesuffix("_v2") not in HARMLESS + NOT_OURS
        for at in sorted({1, 2, count} & set(range(1, count + 1)))
    ]


def test_every_call_of_the_first_step_fails_once(stub):
    """Whatever fails while the memory is made: the error comes out, all memory goes back, the next try is good."""

    def first_step(pool):
        m = InputBufferManager(pool, max_batch_size=1, max_seq_len=8, buckets=[8])
        try:
            m.stage_inputs({"input_ids": ids(3)}, 3)
        except BaseException:
            assert pool.stats().in_use_count in (0, 2), "half of the memory was kept"
            raise
        return m

    with SimpleBufferPool() as pool:
        first_step(pool).close()
        pool.clear()
        specs = sweep(stub, lambda: (first_step(pool).close(), pool.clear()))
        swallowed = []
        for spec in specs:
            with failing(stub, spec) as failed:
                try:
                    first_step(pool).close()
                    pool.clear()
                    if failed():
                        swallowed.append(spec)
                except Exception:
                    pass
            stub.clear_errors()
            m = first_step(pool)
            assert kit.contents(m)["input_ids"].tolist() == [1, 2, 3, 0, 0, 0, 0, 0], spec
            m.check()
            m.close()
            pool.check()
            kit.collect()
        kinds = {spec.split(":")[0].removesuffix("_v2") for spec in swallowed}
        assert not {kind for kind in kinds if "Alloc" in kind or "Launch" in kind or "Memcpy" in kind}, swallowed


def test_every_call_of_a_capture_fails_once(stub):
    """A capture that fails anywhere leaves the earlier graph in service, and no capture open."""
    with InputBufferManager(max_batch_size=1, max_seq_len=16, buckets=[8, 16]) as m:
        total = kit.to_device(np.zeros(1, np.int64))

        def fn(step):
            kit.run(kit.add_up, step.stream, step["input_ids"], total)

        m.capture_buckets(fn)
        m.synchronize()
        specs = sweep(stub, lambda: (m.capture_buckets(fn), m.synchronize()))
        assert any("Capture" in spec for spec in specs) and any("Instantiate" in spec for spec in specs)
        sums = int(kit.to_host(total, m.stream)[0])
        raised = 0
        for spec in specs:
            with failing(stub, spec):
                try:
                    m.capture_buckets(fn)
                except Exception:
                    raised += 1
            assert not _cuda.capturing(), spec
            stub.clear_errors()
            m.replay({"input_ids": ids(4)}, 4)
            sums += 10
            assert int(kit.to_host(total, m.stream)[0]) == sums, spec
            m.check()
        assert raised > 4
        assert m.stats().graphs == 2


def test_a_synchronisation_in_a_capture_is_explained(stub):
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        m.capture_buckets(lambda step: None)
        with pytest.raises(CaptureError, match="synchronis"), m.capture(8) as step:
            step.stream.synchronize()
        with pytest.raises(CaptureError), m.capture(8):
            kit.to_device(ids(3))
        m.replay({"input_ids": ids(3)}, 3)
        with m.capture(8) as step:
            step.result = "usable"
        assert m.replay({"input_ids": ids(3)}, 3) == "usable"
        m.check()


# -------------------------------------------------------------------------------------------------------- kernel faults


def test_a_faulting_kernel_raises_and_does_not_hang(stub):
    """The step's kernels write out of bounds: the next wait says so, and a full ring does not wait for ever."""
    for lazy in (0, 1):
        m = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], ring=2)
        out = kit.to_device(np.zeros(4, np.int64))
        m.capture_buckets(lambda step, out=out: kit.run(kit.fault_if, step.stream, step["input_ids"], out))
        m.replay({"input_ids": np.zeros(3, np.int64)}, 3)
        m.synchronize()
        stub.set_async(lazy)
        try:
            with pytest.raises(Exception, match="ILLEGAL_ADDRESS"):
                m.replay({"input_ids": ids(3)}, 3)
                m.synchronize()
            with pytest.raises(Exception, match="ILLEGAL_ADDRESS"):
                for _ in range(5):
                    m.replay({"input_ids": ids(3)}, 3)
        finally:
            stub.set_async(kit.lazy_by_environment())
            stub.clear_errors()
        m.close()
        assert m.closed


def test_a_full_ring_notices_a_fault(stub):
    """The wait for a block asks the stream, so that it ends with the fault that keeps the block from being read."""
    m = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], ring=1)
    m.register_slot("extra", BufferSpec(8))
    out = kit.to_device(np.zeros(4, np.int64))
    m.capture_buckets(lambda step: kit.run(kit.fault_if, step.stream, step["input_ids"], out))
    stub.set_async(1)
    try:
        with pytest.raises(Exception, match="ILLEGAL_ADDRESS"):
            for _ in range(4):
                m.replay({"input_ids": ids(3)}, 3)
            m.synchronize()
    finally:
        stub.set_async(kit.lazy_by_environment())
        stub.clear_errors()
    m.close()


def test_a_manager_closes_once_its_context_is_gone(stub):
    """The fault is told by the first close, and by nothing after it."""
    m = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8])
    out = kit.to_device(np.zeros(4, np.int64))
    m.capture_buckets(lambda step: kit.run(kit.fault_if, step.stream, step["input_ids"], out))
    try:
        with pytest.raises(Exception, match="ILLEGAL_ADDRESS"), m:
            m.replay({"input_ids": ids(3)}, 3)
        assert m.closed
        m.close()
    finally:
        stub.clear_errors()


# ------------------------------------------------------------------------------------------------------ found by attack


def test_a_reset_that_fails_as_well_is_made_up_for(stub, mode):
    """Two faults in a row: no step may run while host and device do not count alike."""
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8, 16], ring=3) as m:
        m.capture_buckets(lambda step: None)
        for _ in range(2):
            m.replay({"input_ids": ids(3)}, 3)
        m.synchronize()
        with failing(stub, "cuMemcpyHtoDAsync:1") as reset_failed:
            stub.fail("cuGraphLaunch:1,cuMemcpyHtoDAsync:1-2")
            with pytest.raises(Exception, match="cuGraphLaunch|UNKNOWN|LAUNCH"):
                m.replay({"input_ids": ids(3)}, 3)
            assert reset_failed()
            assert "staged" in kit.html(m)
            with pytest.raises(Exception, match="cuMemcpyHtoDAsync"):
                m.replay({"input_ids": ids(3)}, 3)
        for n in range(1, 8):
            m.replay({"input_ids": np.full(n, n)}, n)
            assert kit.contents(m)["input_ids"][:8].tolist() == [n] * n + [0] * (8 - n)
        m.check()


def test_graphs_that_cannot_enter_service_leave_the_function_too(stub, mode):
    with InputBufferManager(max_batch_size=4, max_seq_len=8, buckets=[8], overflow="eager") as m:
        m.capture_buckets(lambda step: "old")
        with failing(stub, "cuCtxSynchronize:1"):
            stub.fail("cuEventRecord:1,cuCtxSynchronize:1")
            with pytest.raises(Exception, match="cuCtxSynchronize"):
                m.capture_buckets(lambda step: "new")
        with pytest.warns(RuntimeWarning, match="fits no bucket"):
            assert (m.replay({}, 8), m.replay({}, 9)) == ("old", "old")
        with failing(stub, "cuEventRecord:1"):  # the host waits in place of the event
            m.capture_buckets(lambda step: "new")
        assert (m.replay({}, 8), m.replay({}, 9)) == ("new", "new")
        m.check()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_slots_on_memory_that_the_default_stream_still_writes(stub, seed):
    """A buffer goes back with work queued on the default stream; the manager's own stream has to wait for it."""
    stub.set_async(1)
    stub.set_seed(seed)
    try:
        pool = SimpleBufferPool()
        with InputBufferManager(pool, 4, 8, buckets=[8, 16]) as m:
            m.stage_inputs({}, 0)
            words = m.stats().arena_bytes // 8
        pool.clear()
        source, weights = kit.to_device(np.full(words, 5)), kit.to_device(np.array([3, 1]))
        entry = pool.allocate(BufferSpec(words, "int64"))
        address = entry.address
        kit.run(kit.affine, 0, source, weights, entry.array)
        entry.release()
        with InputBufferManager(pool, 4, 8, buckets=[8, 16]) as m:
            m.stage_inputs({"input_ids": ids(5)}, 5)
            assert 0 <= slot_address(m) - address < words * 8, "other memory: the test shows nothing"
            _cuda.synchronize()
            assert kit.contents(m)["input_ids"][:8].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
            m.check()
        pool.close()
    finally:
        stub.set_seed(0)
        stub.set_async(kit.lazy_by_environment())


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_memory_of_a_dropped_manager_waits_for_its_steps(stub, seed, caplog):
    """Nobody closed it, and its steps are queued: who gets the memory next must come after them."""
    stub.set_async(1)
    stub.set_seed(seed)
    try:
        pool = SimpleBufferPool()
        m = InputBufferManager(pool, 4, 8, buckets=[8, 16], ring=8)
        m.stage_inputs({}, 8)
        nbytes, stream, address = m.stats().arena_bytes, _cuda.as_stream(m.stream), slot_address(m)
        m.synchronize()
        for _ in range(4):
            m.stage_inputs({"input_ids": ids(8)}, 8)
        del m
        kit.collect()
        other = _cuda.as_stream(None)
        entry = pool.allocate(BufferSpec(nbytes, "uint8"), stream=other)
        assert 0 <= address - entry.address < nbytes, "other memory: the test shows nothing"
        entry.array.copy_to_device(np.full(nbytes, 7, np.uint8), stream=other.numba)
        other.synchronize()
        stream.synchronize()
        assert (kit.to_host(entry.array, other.numba) == 7).all()
        entry.release()
        pool.close()
    finally:
        stub.set_seed(0)
        stub.set_async(kit.lazy_by_environment())


@pytest.mark.parametrize("call", ["release_all", "close"])
@pytest.mark.parametrize("which", [1, 2])
def test_memory_that_cannot_be_given_back_is_not_used_again(stub, mode, call, which):
    """The pool marks the end of each of the two allocations by an event, which may fail between them."""
    pool = SimpleBufferPool()
    m = InputBufferManager(pool, 4, 8, buckets=[8])
    m.stage_inputs({}, 8)
    m.synchronize()
    nbytes = m.stats().arena_bytes
    with failing(stub, "cuCtxSynchronize:1") as failed:
        stub.fail(f"cuEventRecord:{which},cuCtxSynchronize:1")  # the pool's second way, where the first fails
        with pytest.raises(Exception, match="cuCtxSynchronize"):
            getattr(m, call)()
        assert failed()
    if call == "release_all":
        taken = pool.allocate(BufferSpec(nbytes, "uint8"))  # by somebody else, who may get what did go back
        m.stage_inputs({"input_ids": ids(3)}, 3)
        assert not 0 <= slot_address(m) - taken.address < nbytes
        taken.release()
        assert kit.contents(m)["input_ids"][:4].tolist() == [1, 2, 3, 0]
        m.check()
    m.close()
    del m
    kit.collect()
    pool.clear()
    pool.check()
    assert pool.stats().in_use_bytes == 0
    pool.close()
