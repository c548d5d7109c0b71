"""HierarchicalBufferPool on the stand-in driver: in lazy mode, where a missing wait shows as wrong data, and with every
driver call failed in turn."""

import contextlib
import gc
import logging
import threading
import weakref

import numpy as np
import pytest
from test_hierarchy_stateful import STEPS, Churn, add_index, bytes_of, may_leave, ramp, random_step, set_index

from numbabuf import _cuda
from numbabuf._cuda import cuda
from numbabuf.errors import BackendError, CaptureError, TierFullError
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.tiers import mover as moves
from numbabuf.tiers.pool import HierarchicalBufferPool

pytestmark = pytest.mark.stub


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, "numbabuf")  # lost buffers are reported, and many are lost here


@pytest.fixture
def lazy(stub):
    """Work runs only when something waits for it, in an order that the seed decides; (seed) -> None."""

    def begin(seed):
        stub.set_async(1)
        stub.set_seed(seed)

    yield begin
    _cuda.synchronize()
    stub.set_async(0)


# -------------------------------------------------------------------------------------------------------- lazy mode


@pytest.mark.parametrize("seed", range(1, 7))
def test_random_steps_in_lazy_mode(lazy, seed):
    """Only reads synchronise, and each only its own stream: all other order must come from the pool's waits."""
    rng = np.random.default_rng(seed)
    churn = Churn()
    lazy(seed)
    for number in range(400):
        name, arguments = random_step(churn, rng)
        if may_leave(churn, name, arguments):
            churn.step(name, *arguments)
            churn.check(contents=number % 100 == 99)
    assert churn.pool.stats().promotions > 20
    churn.close()


@pytest.mark.parametrize("seed", range(1, 5))
def test_two_streams_take_turns_with_one_buffer(lazy, seed):
    """A lease on one stream, pressure that sends the buffer down, a lease on the other: each sees what came before."""
    churn = Churn(device_bytes=1200, policy="lru")
    lazy(seed)
    for _ in range(3):
        churn.step("allocate", 6, Tier.DEVICE)
    for turn in range(30):
        churn.step("write", turn % 3, turn % 2)
    churn.check()
    churn.close()


@cuda.jit
def add_to_all(array, amount):
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] += amount


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("seed", range(1, 5))
def test_no_stream_is_the_default_stream(lazy, seed, named):
    """Copies and launches without a stream, which Numba puts on the default one, see and leave the right bytes."""
    size, options = 1024, {"stream": 0} if named else {}
    with HierarchicalBufferPool(device_bytes=2 * size, pinned_bytes=16 * size) as pool:
        entries = [pool.allocate(BufferSpec(size, "uint8"), movable=True) for _ in range(6)]
        lazy(seed)
        for number, entry in enumerate(entries):
            with pool.use([entry], in_place=False, **options) as (array,):
                array.copy_to_device(np.full(size, number, np.uint8))
        for turn in range(3):
            for number, entry in enumerate(entries):
                pool.prefetch([entries[number - turn]], **options)
                with pool.use([entry], in_place=False, **options) as (array,):
                    add_to_all[1, 32](array, 10)
        for number, entry in enumerate(entries):
            with pool.use([entry], in_place=False, write=False, **options) as (array,):
                assert (array.copy_to_host() == number + 30).all()
            entry.release()


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_use_follows_what_was_queued_on_a_stream_named_in_an_earlier_one(lazy, seed):
    churn = Churn()
    lazy(seed)
    churn.step("allocate", 6, Tier.DEVICE)
    (entry,) = churn.shadow
    one, two = churn.streams
    for _ in range(5):
        with churn.pool.use([entry], stream=one) as (array,):
            two.synchronize()  # the caller's own order between the two
            one.synchronize()
            entry.record_stream(two)
            _cuda.launch(add_index, 1, 32, two, array, 5)
        churn.shadow[entry] = churn.shadow[entry] * 3 + ramp(entry.nbytes, 5)
        churn.write(0, 0)
    churn.demote(0, Tier.PINNED)
    churn.read(0, 1)
    churn.close()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("seed", range(1, 7))
def test_a_writer_waits_for_readers_on_every_stream(lazy, seed, first):
    """Two leases overlap on two streams; whichever ends last, the next writer is behind the work of both."""
    churn = Churn()
    churn.step("allocate", 6, Tier.DEVICE)
    (entry,) = churn.shadow
    outs = [_cuda.device_view(_cuda.empty_device(entry.nbytes), 0, (entry.nbytes,), np.dtype(np.uint8)) for _ in "ab"]
    _cuda.synchronize()
    lazy(seed)
    leases = [churn.pool.use([entry], stream=stream, write=False) for stream in churn.streams]
    for lease, stream, out in zip(leases, churn.streams, outs, strict=True):
        (array,) = lease.__enter__()
        for _ in range(10 if stream is churn.streams[first] else 0):  # the lease that ends first has much to do
            _cuda.launch(set_index, 1, 32, stream, out, 0)
        _cuda.copy(out, array, stream)
    for lease in (leases[first], leases[1 - first]):
        lease.__exit__(None, None, None)
    wanted = churn.shadow[entry]
    churn.write(0, 1 - first)
    _cuda.synchronize()
    assert all(out.copy_to_host().tobytes() == wanted.tobytes() for out in outs)
    churn.close()


@pytest.mark.parametrize("seed", range(1, 5))
def test_what_comes_next_waits_for_a_use_that_could_not_be_marked(lazy, seed, monkeypatch):
    churn = Churn(device_bytes=0, managed_bytes=0)
    churn.step("allocate", 6, Tier.PINNED)
    (entry,) = churn.shadow
    lazy(seed)
    with monkeypatch.context() as patch:
        patch.setattr(churn.pool._store.fences, "behind", lambda *_: (_ for _ in ()).throw(RuntimeError("no event")))
        churn.write(0, 1)
    assert entry.record.fence is None
    churn.read(0, 0)
    churn.close()


# -------------------------------------------------------------------------------------------------------- batches


def test_one_launch_moves_a_whole_batch(stub):
    pool = HierarchicalBufferPool(device_bytes=1 << 20, pinned_bytes=1 << 20)
    entries = [pool.allocate(BufferSpec(1000, "uint8"), movable=True) for _ in range(100)]
    for _ in range(3):  # memory, tables and events are there, and the kernel is compiled
        pool.demote(entries)
        pool.promote(entries)
        pool._traffic.mover.synchronize()
    for entry in entries:
        pool._residents.drop_copy(entry.record)
    pool.stats()
    stub.reset_counts()
    pool.demote(entries)
    counts = stub.counts()
    assert sum(n for name, n in counts.items() if name.startswith("cuLaunchKernel")) == 1
    assert not [
        name for name in counts if name.startswith(("cuMemcpy", "cuMemAlloc", "cuMemFree", "cuStreamSynchronize"))
    ]
    for entry in entries:
        entry.release()
    pool.close()


# ---------------------------------------------------------------------------------------------------------- faults

# Not the frees: Numba makes them from finalisers, where an error reaches nobody.
CALLS = (
    "cuMemAlloc", "cuMemHostAlloc", "cuMemAllocManaged", "cuLaunchKernel", "cuLaunchKernelEx", "cuEventCreate",
    "cuEventRecord", "cuEventQuery", "cuEventSynchronize", "cuStreamWaitEvent", "cuStreamCreate",
    "cuStreamCreateWithPriority", "cuStreamSynchronize", "cuMemGetInfo",
)  # fmt: skip


def scenario():
    """Moves of each kind: (pool, steps), each step a function; the first steps make what the others move."""
    pool = HierarchicalBufferPool(device_bytes=3072, managed_bytes=1024, pinned_bytes=8192, policy="lru")
    stream = _cuda.as_stream(None)
    entries = {}

    def allocate(name, tier):
        entry = pool.allocate(BufferSpec(1024, "uint8", tier), movable=True)
        try:  # filled without a kernel of the test's own, so that a failed launch is always the pool's
            with pool.use([entry], stream=stream) as (array,):
                array.copy_to_device(ramp(1024, ord(name)), stream=stream.numba)
                stream.synchronize()
        except BaseException:
            entry.release()
            raise
        entries[name] = entry

    def use(*names, **options):
        with pool.use([entries[name] for name in names if name in entries], stream=stream, **options):
            pass

    def call(method, *names, **options):
        getattr(pool, method)([entries[name] for name in names if name in entries], **options)

    steps = [
        *(lambda name=name: allocate(name, Tier.DEVICE) for name in "abc"),
        lambda: allocate("d", Tier.PINNED),
        lambda: allocate("e", Tier.DEVICE),
        lambda: use("a", "b", in_place=False),
        lambda: call("demote", "a", "b"),
        lambda: use("a", write=False, in_place=False),
        lambda: call("demote", "a"),
        lambda: call("prefetch", "d", "c"),
        lambda: call("promote", "d", "e"),
        lambda: pool.allocate(BufferSpec(512, "uint8")).release(stream=stream),
        lambda: pool.allocate(BufferSpec(2048, "uint8"), movable=True).release(stream=stream),
        lambda: use("a", "c", "d"),
        lambda: pool.trim(0),
    ]  # fmt: skip
    return pool, entries, steps


def run_with(stub, fault):
    """The scenario with one driver call failed: how many steps failed. After each, everything must hold."""
    pool, entries, steps = scenario()
    failed = 0
    stub.fail(fault)
    try:
        for step in steps:
            places = {name: (entry.tier, len(entry.record.users)) for name, entry in entries.items()}
            try:
                step()
            except BackendError:
                raise
            except Exception as error:
                assert not isinstance(error, (AssertionError, AttributeError, KeyError, TypeError)), repr(error)
                failed += 1
                if step in (steps[6], steps[8]):  # a demotion is all or nothing
                    assert {n: (e.tier, len(e.record.users)) for n, e in entries.items()} == places
            pool.check()
    finally:
        stub.fail("")
    _cuda.synchronize()
    for name, entry in entries.items():
        assert len(entry.record.users) == 0
        assert bytes_of(entry.handle.block, 1024).tobytes() == ramp(1024, ord(name)).tobytes(), f"{fault}: {name}"
        if entry.record.copy is not None:
            assert bytes_of(entry.record.copy.block, 1024).tobytes() == ramp(1024, ord(name)).tobytes(), (
                f"{fault}: {name}"
            )
    for step in steps[5:]:  # nothing is stuck
        step()
        pool.check()
    for entry in entries.values():
        entry.release()
    pool.close()
    pool.check()
    assert pool.stats().reserved_bytes == 0
    return failed


@pytest.mark.parametrize("call", CALLS)
def test_every_driver_call_failed_once(stub, call):
    run_with(stub, "")  # compiles, and says how many calls there are
    stub.reset_counts()
    run_with(stub, "")
    count = sum(
        n for name, n in stub.counts().items() if name in (call, call + "_v2", call + "_ptsz", call + "_v2_ptsz")
    )
    failures = [run_with(stub, f"{call}:{number}") for number in range(1, count + 1)]
    if call == "cuLaunchKernelEx":  # of memory another tier has some, and without an event the host waits
        assert sum(map(bool, failures)) > 0, f"{count} calls were failed, and no step noticed"


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_among_random_steps(stub, seed):
    """Each step may fail on its first allocation, launch, record or wait; contents hold all the same."""
    rng = np.random.default_rng(seed)
    churn = Churn()
    churn.refusals = (Exception,)
    names = [
        name
        for name in STEPS
        if name in ("read", "promote", "demote", "prefetch", "release", "pressure", "trim", "unplain")
    ]
    while len(churn.shadow) < 6:
        churn.step("allocate", int(rng.integers(8)), list(Tier)[rng.integers(3)])
    for _ in range(300):
        name, arguments = random_step(churn, rng, names)
        fault = str(
            rng.choice(["cuMemAlloc", "cuMemHostAlloc", "cuLaunchKernelEx", "cuEventRecord", "cuStreamWaitEvent"])
        )
        stub.fail(f"{fault}:{rng.integers(1, 4)}")
        before = len(churn.shadow)
        churn.step(name, *arguments)
        stub.fail("")
        assert name == "release" or len(churn.shadow) == before
        churn.check()
        if len(churn.shadow) < 4:
            churn.step("allocate", int(rng.integers(8)), list(Tier)[rng.integers(3)])
    churn.close()


def test_nothing_is_left_behind(no_leaks, stub):
    churn = Churn()
    rng = np.random.default_rng(0)
    for _ in range(150):
        name, arguments = random_step(churn, rng, [name for name in STEPS if name != "bind"])
        churn.step(name, *arguments)
    churn.close()


def test_managed_memory_stays_on_the_host_where_the_driver_offers_it(stub):
    with HierarchicalBufferPool(device_bytes=1024, managed_bytes=4096, pinned_bytes=4096) as pool:
        stub.reset_counts()
        entry = pool.allocate(BufferSpec(512, "uint8", Tier.MANAGED), movable=True)
        assert stub.count("cuMemAdvise") == 2 and stub.count("cuMemPrefetchAsync") == 1
        assert pool.stats().settled == 1
        stub.fail("cuMemAdvise:1+")
        other = pool.allocate(BufferSpec(1024, "uint8", Tier.MANAGED), movable=True)
        stub.fail()
        assert other.tier is Tier.MANAGED and pool.stats().settled == 1, "a driver without advice migrates by itself"
        entry.release()
        other.release()
        pool.check()


def test_a_thread_that_never_called_the_driver_may_use_a_moved_buffer(stub):
    pool, stream, failed = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=4096), _cuda.as_stream(None), []
    entry = pool.allocate(BufferSpec(64, "uint8"), movable=True)
    pool.demote([entry])
    pool.promote([entry])

    def take():
        try:
            with pool.use([entry], stream=stream):
                pass
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert not failed
    entry.release()
    pool.close()


# --------------------------------------------------------------------------------------------- somebody else's capture


def test_a_stream_that_another_library_captures_is_refused_and_harms_nothing(stub):
    with HierarchicalBufferPool(device_bytes=2048, pinned_bytes=8192) as pool:
        entries = [pool.allocate(BufferSpec(1024, "uint8"), movable=True) for _ in range(3)]
        stream = _cuda.as_stream(None)
        builder = stream.core.create_graph_builder()
        builder.begin_building("thread_local")
        try:
            for call in (
                lambda: pool.use(entries[:1], stream=stream).__enter__(),
                lambda: pool.prefetch(entries[:1], stream=stream),
                lambda: pool.allocate(BufferSpec(64, "uint8"), stream=stream, movable=True),
            ):
                with pytest.raises(CaptureError, match="keep them, unreleased, as long"):
                    call()
        finally:
            builder.end_building()
            builder.close()
        for entry in entries:
            with pool.use([entry], stream=stream, in_place=False):
                pass
            entry.release()
        pool.check()


# ------------------------------------------------------------------------------------------------ what the driver holds


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_driver_never_holds_more_than_the_budget(stub, no_collector):
    """Groups of two sizes take turns, so that every turn frees idle blocks; no error, no cycle keeps any of them."""
    mib, budget = 1 << 20, 8 << 20
    with HierarchicalBufferPool(device_bytes=budget, pinned_bytes=8 * budget) as pool:
        before = stub.live()["device"][1]
        groups = [
            [pool.allocate(BufferSpec(size + 1000 * i, "uint8"), movable=True) for i in range(8 * mib // size - 1)]
            for size in (mib, 2 * mib)
        ]
        for turn in range(6):
            with pool.use(groups[turn % 2], in_place=False):
                held = stub.live()["device"][1] - before
                assert held == pool._store.ledger.reserved[Tier.DEVICE] <= budget, turn
            with pytest.raises(TierFullError):
                pool.use([*groups[0], *groups[1]], in_place=False).__enter__()
        for entry in (*groups[0], *groups[1]):
            entry.release()
    _cuda.flush_pending_frees()
    assert stub.live()["device"][1] == before


def test_a_callers_locals_end_with_the_caller(stub, no_collector, monkeypatch):
    """A kernel that is compiled, a move that makes room, a request that is refused: none keeps a frame."""
    monkeypatch.setattr(moves, "_compiled", set())
    pool = HierarchicalBufferPool(device_bytes=4096, pinned_bytes=8192)
    entries = [pool.allocate(BufferSpec(size, "uint8"), movable=True) for size in (4096, 2048, 1024)]

    class Mine:
        pass

    def caller(call):
        mine = Mine()
        seen.append(weakref.ref(mine))
        with contextlib.suppress(TierFullError):
            call()

    seen = []
    for entry in (*entries, *entries):
        caller(lambda entry=entry: pool.use([entry], in_place=False).__enter__())
        caller(lambda: pool.promote(entries))
        caller(lambda: pool.allocate(BufferSpec(1 << 20, "uint8"), movable=True))
    assert not [ref for ref in seen if ref() is not None]


# --------------------------------------------------------------------------------------------------------- two devices


@pytest.fixture
def two():
    """A pool of device 0, with a buffer in each of two tiers, and device 1 current when the test runs."""
    with cuda.gpus[0]:
        pool = HierarchicalBufferPool(device_bytes=2048, pinned_bytes=16384)
        entries = [pool.allocate(BufferSpec(1024, "uint8"), movable=True) for _ in range(3)]
        for number, entry in enumerate(entries):
            with pool.use([entry], in_place=False) as (array,):
                array.copy_to_device(np.full(1024, number, np.uint8))
    yield pool, entries
    with cuda.gpus[0]:
        for number, entry in enumerate(entries):
            with pool.use([entry], in_place=False, write=False) as (array,):
                assert (array.copy_to_host() == number).all()
            entry.release()
        pool.check()
        pool.close()


@pytest.mark.devices
def test_moves_run_on_the_pools_device_whichever_is_current(two):
    pool, entries = two
    with cuda.gpus[1]:
        pool.demote([entry for entry in entries if entry.tier is Tier.DEVICE])
        pool.promote(entries[:1])
        pool.prefetch(entries[1:2])
        more = pool.allocate(BufferSpec(1024, "uint8"), movable=True)
        assert cuda.current_context().device.id == 1
        more.release()
        pool.reserve([BufferSpec(512, "uint8", Tier.PINNED)])
        pool.trim(0)
        pool.check()
    assert pool.stats().promotions > 1


@pytest.mark.devices
def test_a_use_with_another_device_current_is_refused_and_changes_nothing(two):
    pool, entries = two
    before = [entry.tier for entry in entries]
    with cuda.gpus[1], pytest.raises(BackendError, match="device 1 is current"):
        pool.use(entries[:1]).__enter__()
    assert [entry.tier for entry in entries] == before and all(entry.movable for entry in entries)


@pytest.mark.devices
@pytest.mark.parametrize("where", ["device 1", "a new thread", "after a with"])
def test_the_end_of_a_use_leaves_events_of_the_pools_device_alone(two, where):
    pool, entries = two

    def end(lease):
        if where == "a new thread":
            thread = threading.Thread(target=lease.__exit__, args=(None, None, None))
            thread.start()
            thread.join()
        else:
            with cuda.gpus[1]:
                if where == "device 1":
                    lease.__exit__(None, None, None)
            lease.__exit__(None, None, None) if where == "after a with" else None

    for entry in (*entries, *entries):
        with cuda.gpus[0]:
            lease = pool.use([entry], stream=_cuda.as_stream(None), in_place=False)
            lease.__enter__()
        end(lease)
    with cuda.gpus[0]:
        for entry in entries:
            with pool.use([entry], stream=_cuda.as_stream(None), in_place=False):
                pass


@pytest.mark.devices
def test_a_pool_on_the_second_device_works_from_threads_without_one():
    with cuda.gpus[1]:
        pool = HierarchicalBufferPool(device_bytes=1024, pinned_bytes=16384)
        entries = [pool.allocate(BufferSpec(1024, "uint8"), movable=True) for _ in range(3)]
    failed = []

    def work():
        try:
            for entry in entries:
                pool.promote([entry])
            entries.pop().release()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    with cuda.gpus[1]:
        for entry in entries:
            with pool.use([entry], in_place=False) as (array,):
                array.copy_to_host()
            entry.release()
        pool.check()
        pool.close()
