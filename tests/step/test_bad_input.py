"""Whatever is given to the public surface: a clear error or the right result, and after an error nothing has changed.

Values come from one zoo of wrong ones (wrong types, NaN, huge and negative sizes, odd arrays) mixed with right ones, so
that an argument further on is reached too.
"""

import contextlib
import math
import threading
import warnings

import hypothesis.strategies as st
import kit
import numpy as np
import pytest
from hypothesis import example, given, settings

from numbabuf import (
    BackendError,
    BufferSpec,
    ClosedError,
    InputBufferManager,
    NumbabufError,
    PredictiveBufferManager,
    SimpleBufferPool,
    Tier,
    TierFullError,
    _cuda,
)
from numbabuf._cuda import cuda
from numbabuf.testing import live_buffers
from numbabuf.tiers.pool import HierarchicalBufferPool

CLEAR = (TypeError, ValueError, OverflowError, KeyError, NumbabufError)
"""What a caller may get for a bad argument."""


class Odd(np.ndarray):
    """A subclass of ndarray that changes nothing."""


class Hostile:
    """An object that is no number, no array and no sequence."""

    def __repr__(self):
        return "<hostile>"


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([-(1 << 70), 1 << 31, 1 << 58, 1 << 61, 1 << 63, 1 << 64, 1 << 70]),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 3.0, np.float64("nan"), np.float32(2), 1j]),
    st.sampled_from([True, False, np.bool_(True), np.int8(3), np.uint64(1 << 63), np.array(2), np.array([2])]),
)
THINGS = st.one_of(
    NUMBERS,
    st.sampled_from([None, "", "tokens", "nothing", "3", b"7", Ellipsis, NotImplemented, object, int, Tier.PINNED]),
    st.builds(Hostile),
    st.builds(list),
    st.builds(dict),
    st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from([[[1], [1, 2]], {"a": 1}, {1, 2}, (math.nan,), [None], np.array([1, None], object), np.eye(2)]),
)


def attempt(call, *arguments, **options):
    """(result, None), or (None, the error) if it is a clear one; any other fails the test by itself."""
    try:
        with warnings.catch_warnings():  # NumPy's, about float(np.array([2])) and matrices, which are meant
            warnings.simplefilter("ignore")
            return call(*arguments, **options), None
    except CLEAR as error:
        assert str(error).strip("'\" "), f"{error!r} says nothing"
        return None, error


def shelf(pool):
    """What must be as before after an error: bytes and buffers by what they are doing, and leases."""
    pool.check()
    s = pool.stats()
    return s.reserved_bytes, s.in_use_bytes, s.in_use_count, s.idle_bytes, s.pending_bytes, s.allocations, s.lost


# ------------------------------------------------------------------------------------------------------------- specs

DTYPES = st.one_of(
    st.sampled_from(["f4", "i8", "u1", "c16", "f2", "?", "V5", "S3", "U2", "M8[s]", "m8", "O", "f16", ">i4", "i4,f8"]),
    st.sampled_from(["", ",", "f4,,", "(2,)f4", "float33", "bfloat17", "i3", "f4;", "[", "f4,(", "\0"]),
    st.sampled_from([np.float32, np.dtype("i2"), int, float, object, np.void, [], [("a", "i4")], [("a", "O")], {}, ()]),
    THINGS,
)
SHAPES = st.one_of(
    st.integers(0, 20),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from([(1,) * 32, (1,) * 65, (0, 1 << 40, 1 << 40), (1 << 61, 0), (1 << 31, 1 << 31), (1 << 64,)]),
    THINGS,
    st.lists(THINGS, max_size=3),
)


@settings(max_examples=300)
@given(shape=SHAPES, dtype=DTYPES, tier=st.one_of(st.sampled_from([*Tier, "pinned"]), THINGS))
@example(shape=(0, 1 << 40, 1 << 40), dtype="f4", tier=Tier.PINNED)
@example(shape=1 << 31, dtype="f4", tier=Tier.DEVICE)
@example(shape=(1,) * 65, dtype="u1", tier=Tier.PINNED)
@example(shape=3, dtype="f16", tier=Tier.DEVICE)
@example(shape=3, dtype="m8[ns]", tier=Tier.DEVICE)
def test_a_spec_is_refused_or_can_be_leased(shape, dtype, tier):
    """A spec that was accepted gives an array of its shape and type, or the pool says why it has none."""
    spec, _ = attempt(BufferSpec, shape, dtype, tier)
    if spec is None:
        return
    assert spec.size_bytes == math.prod(spec.shape) * spec.dtype.itemsize
    with SimpleBufferPool(max_bytes=1 << 16, max_pinned_bytes=1 << 16) as pool:
        pool.reserve([BufferSpec(64, "uint8", spec.tier)])  # for it to find a buffer of its size class, too
        before = shelf(pool)
        entry, error = attempt(pool.allocate, spec)
        if isinstance(error, TierFullError):  # which comes when all idle memory was freed in vain
            assert shelf(pool)[1:3] == before[1:3]
            return
        if error is not None:
            assert shelf(pool) == before, error
            return
        assert entry.array.shape == spec.shape and entry.nbytes == spec.size_bytes
        assert entry.array.dtype.itemsize == spec.dtype.itemsize
        _, error = attempt(lambda: entry.device_array)
        assert error is None or isinstance(error, TypeError), "no kernel takes it, and the text says so"
        entry.release()
        pool.check()


# ------------------------------------------------------------------------------------------------------------- pools


@given(
    max_bytes=THINGS, max_pinned_bytes=THINGS, on_oom=THINGS,
    events=st.one_of(st.integers(-1, 8), st.sampled_from([math.nan, 2.5, "3", True, -(1 << 70)])),
)  # fmt: skip
@example(math.nan, None, None, 0)
@example(None, math.inf, None, 0)
def test_a_pool_is_refused_or_works(max_bytes, max_pinned_bytes, on_oom, events):
    pool, _ = attempt(
        SimpleBufferPool, max_bytes=max_bytes, max_pinned_bytes=max_pinned_bytes, events=events,
        on_oom=on_oom if callable(on_oom) and on_oom is not object else None,
    )  # fmt: skip
    if pool is not None:
        works(pool)


@given(device=THINGS, managed=THINGS, pinned=THINGS, policy=st.one_of(st.sampled_from(["lru", "frequency"]), THINGS))
@example(math.nan, 0, 4096, "lru")
@example(4096, math.inf, 4096, "lru")
@example(4096, 0, 1e6, "lru")
def test_a_hierarchy_is_refused_or_works(device, managed, pinned, policy):
    pool, _ = attempt(
        HierarchicalBufferPool, device_bytes=device, managed_bytes=managed, pinned_bytes=pinned, policy=policy
    )
    if pool is not None:
        works(pool)


def works(pool):
    """A pool that was made leases, counts and closes; a limit that was accepted is a number and holds."""
    with pool:
        for tier in Tier:
            entry, _ = attempt(pool.allocate, BufferSpec(16, "uint8", tier))
            if entry is not None:
                entry.release()
        for limit in pool.limits.values():
            assert limit is None or limit == int(limit) >= 0
        pool.check()


@pytest.fixture(scope="module")
def pool():
    with SimpleBufferPool(max_bytes=1 << 16, max_pinned_bytes=1 << 16) as pool:
        pool.reserve([BufferSpec(64, "uint8", tier) for tier in Tier])
        yield pool


@given(method=st.sampled_from(["allocate", "release", "reserve", "trim"]), thing=THINGS, stream=THINGS)
@example("trim", math.nan, None)
@example("trim", 0.5, None)
@example("trim", None, None)
def test_what_a_pool_cannot_do_changes_nothing(pool, method, thing, stream):
    before = shelf(pool)
    options = {"stream": stream} if method in ("allocate", "release") else {}
    _, error = attempt(getattr(pool, method), thing, **options)
    if error is not None:
        assert shelf(pool) == before
    else:
        assert method in ("trim", "reserve"), "a thing was leased, or released"
        pool.reserve([BufferSpec(64, "uint8", tier) for tier in Tier])


@given(method=st.sampled_from(["allocate", "release", "mark_in_use", "record_stream"]), stream=THINGS)
def test_what_is_no_stream_changes_nothing(pool, method, stream):
    spec = BufferSpec(64, "uint8", Tier.PINNED)
    before = shelf(pool)[:4]
    if method == "allocate":
        entry, error = attempt(pool.allocate, spec, stream=stream)
    else:
        entry = pool.allocate(spec)
        call = getattr(entry, method)
        _, error = attempt(call, stream) if method == "record_stream" else attempt(call, stream=stream)
        if method == "release" and error is None:
            entry = None
    if entry is not None:
        entry.release()
    _cuda.synchronize()
    assert shelf(pool)[:4] == before


@pytest.fixture(scope="module")
def tiers():
    with HierarchicalBufferPool(device_bytes=4096, managed_bytes=4096, pinned_bytes=1 << 16) as pool:
        yield pool


@given(
    method=st.sampled_from(["use", "promote", "demote", "prefetch", "allocate", "trim", "reserve"]),
    entries=st.one_of(THINGS, st.sampled_from(["mine", "twice", "dead", "foreign", "and none"])),
    option=THINGS,
)
@example("demote", "mine", "pinned")
@example("demote", "mine", 7)
def test_what_a_hierarchy_cannot_do_changes_nothing(tiers, pool, method, entries, option):
    mine = tiers.allocate(BufferSpec(128, "uint8"), movable=True)
    other = pool.allocate(BufferSpec(64, "uint8", Tier.PINNED))
    dead = tiers.allocate(BufferSpec(128, "uint8"), movable=True)
    dead.release()
    places = {
        "mine": [mine], "twice": [mine, mine], "dead": [mine, dead], "foreign": [mine, other], "and none": [mine, None],
    }  # fmt: skip
    chosen = places.get(entries, entries) if isinstance(entries, str) else entries
    before, where = shelf(tiers)[:3], (mine.tier, mine.movable)

    def call():
        if method == "use":
            with tiers.use(chosen, stream=option) as arrays:
                assert len(arrays) == len(chosen)
        elif method in ("demote", "prefetch"):
            getattr(tiers, method)(chosen, **{"tier" if method == "demote" else "stream": option})
        else:
            getattr(tiers, method)(chosen)

    _, error = attempt(call)
    if error is not None:
        assert (mine.tier, mine.movable) == where, error
        assert shelf(tiers)[:3] == before, error
    assert mine.movable
    mine.release()
    other.release()
    tiers.check()


# ---------------------------------------------------------------------------------------------------------- managers


@given(
    sizes=st.tuples(THINGS, THINGS), ring=THINGS, buckets=st.one_of(THINGS, st.lists(THINGS, max_size=3)),
    overflow=st.one_of(st.just("raise"), THINGS), pool=THINGS, stream=st.one_of(st.none(), THINGS), which=st.booleans(),
)  # fmt: skip
@example((2, 8), 2, {"tokens": None}, "raise", None, None, False)
@example((2, 8), 2, {"tokens": [math.nan]}, "raise", None, None, True)
@example((1 << 30, 1 << 30), 2, None, "raise", None, None, True)
def test_a_manager_is_refused_or_works(sizes, ring, buckets, overflow, pool, stream, which):
    kind = (InputBufferManager, PredictiveBufferManager)[which]
    if isinstance(ring, int) and ring > 64:
        ring = 1 << 58  # what a machine could really allocate is no bad input
    leased = live_buffers()
    m, _ = attempt(kind, pool, *sizes, ring=ring, buckets=buckets, overflow=overflow, stream=stream)
    if m is not None:
        with m:
            _, error = attempt(m.stage_inputs, {}, 0)
            if error is not None:
                m.release_all()
                assert live_buffers() == leased, error


@given(
    name=st.one_of(st.just("new"), THINGS), spec=st.one_of(st.builds(BufferSpec, st.integers(0, 8), st.sampled_from(
        ["f4", "i4", "f2", "c16", "c8", "?", "M8[s]", "V4", "V3", "S2", "f8", "i8"])), THINGS),
    pad=st.one_of(THINGS, st.sampled_from(["keep", "repeat_last", 1e300, -129, "x", np.datetime64("2020")])),
    index=THINGS, source_dtype=st.one_of(st.none(), DTYPES),
    axis=st.one_of(st.sampled_from(["tokens", "seqs", "seqs+1", "seqs+9", "a b", "+1", "1+a", None]), THINGS),
    max_live=st.one_of(st.none(), THINGS),
)  # fmt: skip
@example("new", BufferSpec(8), 0, False, None, "seqs+9", None)
@example("new", BufferSpec(8), None, False, None, "tokens", None)
@example("new", BufferSpec(8), 1e300, False, None, "tokens", None)
@example("new", BufferSpec(8), 1j, False, None, "tokens", None)
@example("new", BufferSpec(8), 0, False, None, "tokens", 2.7)
@example("new", BufferSpec(8), 0, False, None, "tokens", math.inf)
@example("new", BufferSpec(8, "M8[s]"), 0, False, None, "tokens", None)
@example("new", BufferSpec(8, "V4"), 0, False, None, "tokens", None)
@example("new", BufferSpec(8, "f16"), 0, False, None, "tokens", None)
def test_a_slot_is_refused_or_works(name, spec, pad, index, source_dtype, axis, max_live):
    with InputBufferManager(max_batch_size=2, max_seq_len=4) as m:
        m.stage_inputs({"input_ids": [1, 2]}, 2)
        before = m.slots, m.layout, m.stats(), _cuda.address(m.get_slot("input_ids").array)
        options = {"pad": pad, "index": index, "source_dtype": source_dtype, "axis": axis, "max_live": max_live}
        slot, error = attempt(m.register_slot, name, spec, **options)
        if error is not None:
            assert (m.slots, m.layout, m.stats(), _cuda.address(m.get_slot("input_ids").array)) == before, error
        further = dict.fromkeys(m.layout.axes[1:], 0)
        m.stage_inputs({"input_ids": [3]}, 1, **further)  # no slot spoils the steps of the others
        if slot is not None:
            assert m.get_slot(name) is slot and slot.array.shape == slot.spec.shape
        m.check()


# ------------------------------------------------------------------------------------------------------------- steps

SIZE = 12


@st.composite
def arrays(draw):
    """(what is given, what NumPy makes of it): arrays of all kinds, wrong ones among them."""
    rows = draw(st.integers(0, SIZE + 2))
    dtype = draw(st.sampled_from(["i8", "i4", "u1", "?", ">i8", "u8", "f4", "f8", "O", "S3", "M8[s]", "c8"]))
    shape = draw(st.sampled_from([(rows,), (rows,), (rows,), (rows, 1), (1, rows), ()]))
    data = np.array(np.arange(math.prod(shape)).reshape(shape) % 2, dtype)
    how = draw(st.sampled_from(["as it is", "strided", "reversed", "read-only", "odd", "list", "matrix", "unaligned"]))
    if how == "strided":
        data = np.repeat(data, 3, axis=0)[::3] if data.ndim else data
    elif how == "reversed":
        data = data[::-1] if data.ndim else data
    elif how == "read-only":
        data.flags.writeable = False
    elif how == "odd":
        data = data.view(Odd)
    elif how == "list":
        data = data.tolist()
    elif how == "matrix" and data.ndim == 2:
        data = data.view(np.matrix) if data.dtype != object else data
    elif how == "unaligned" and data.dtype != object:
        raw = np.zeros(data.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(data.tobytes(), np.uint8)
        data = np.ndarray(shape, dtype, raw, offset=1)
    return data


@pytest.fixture(scope="module")
def manager():
    with InputBufferManager(max_batch_size=1, max_seq_len=SIZE, buckets=[4, 8], default_slots=False) as m:
        m.register_slot("wide", BufferSpec(SIZE, "int64"), pad=-1)
        m.register_slot("narrow", BufferSpec(SIZE, "int32"), source_dtype="int64", pad=-1)
        m.register_slot("table", BufferSpec((SIZE, 2), "float32"), pad=-1)
        m.capture_buckets(lambda step: step, [4, 8])
        yield m


def expected(slot, data, tokens, bucket):
    """What a slot holds after a good step, shape (bucket, ...)."""
    out = np.full((bucket, *slot.spec.shape[1:]), -1, slot.spec.dtype)
    if data is not None:
        array = np.asarray(data)
        if array.size:
            out[(slice(tokens), *map(slice, array.shape[1:]))] = array
    return out


@settings(max_examples=150 if kit.SIM else 300)
@given(
    inputs=st.one_of(THINGS, st.dictionaries(st.sampled_from(["wide", "narrow", "table", "no slot", 3]), arrays())),
    tokens=st.one_of(st.integers(0, SIZE + 2), NUMBERS),
    how=st.sampled_from(["stage_inputs", "replay"]),
    fit=st.booleans(),
    more=st.sampled_from([{}, {}, {}, {"seqs": 1}]),
)  # fmt: skip
@example(None, 3, "replay", False, {})
@example([1, 2], 3, "stage_inputs", False, {})
@example({"narrow": np.array([1 << 40])}, 1, "replay", False, {})
@example({"wide": np.ma.masked_array([1, 2], [False, True])}, 2, "replay", False, {})
def test_a_step_is_refused_or_right(manager, inputs, tokens, how, fit, more):
    if fit and isinstance(inputs, dict) and inputs:  # else good steps would be rare
        tokens = len(data) if np.ndim(data := next(iter(inputs.values()))) else tokens
    before = kit.contents(manager), manager.stats()
    _, error = attempt(getattr(manager, how), inputs, tokens, **more)
    manager.check()
    after = kit.contents(manager)
    if error is not None:
        for name, held in before[0].items():
            assert held.tobytes() == after[name].tobytes(), (error, name)
        assert manager.stats() == before[1], error
        return
    bucket = 4 if tokens <= 4 else 8
    for slot in manager.slots:
        found = after[slot.name][:bucket]
        assert found.tobytes() == expected(slot, inputs.get(slot.name), tokens, bucket).tobytes(), slot


@given(data=st.one_of(arrays(), THINGS), name=st.sampled_from(["wide", "narrow", "table"]))
def test_set_data_is_refused_or_right(manager, data, name):
    before = kit.contents(manager), manager.stats()
    _, error = attempt(manager.get_slot(name).set_data, data)
    manager.check()
    after = kit.contents(manager)
    for slot in manager.slots:
        if slot.name != name or error is not None:
            assert after[slot.name].tobytes() == before[0][slot.name].tobytes(), (error, slot)
    assert manager.stats() == before[1]
    if error is None:
        rows = len(np.asarray(data))
        wanted = expected(manager.get_slot(name), data, rows, rows)
        assert after[name][:rows].tobytes() == wanted.tobytes()


@given(
    call=st.sampled_from(["stage", "capture", "capture_buckets", "get_slot", "register_slot"]), thing=THINGS,
    more=st.sampled_from([{}, {}, {"seqs": 1}, {"tokens": 3}]),
)  # fmt: skip
@example("capture_buckets", None, {})
@example("capture_buckets", 3, {})
def test_other_calls_of_a_manager_with_nonsense_change_nothing(manager, call, thing, more):
    before = kit.contents(manager), manager.stats(), manager.captured, manager.slots

    def run():
        if call in ("stage", "capture"):
            with getattr(manager, call)(thing, **more) as opened:
                raise KeyError(f"{opened!r} was opened, and is left as if by a user's error")
        elif call == "register_slot":
            manager.register_slot("late", BufferSpec(4), pad=thing)  # a graph is live, so that any is refused
        elif call == "capture_buckets" and callable(thing):
            manager.capture_buckets(thing, [3.5])
        else:
            getattr(manager, call)(thing, **more)

    _, error = attempt(run)
    assert error is not None
    manager.check()
    after = kit.contents(manager)
    assert all(held.tobytes() == after[name].tobytes() for name, held in before[0].items()), error
    assert (manager.stats(), manager.captured, manager.slots) == before[1:], error


@given(
    call=st.sampled_from(["record_usage", "predict_next_sizes", "plan_buckets", "adopt", "start", "prewarm"]),
    thing=THINGS,
)
def test_a_predictive_manager_with_nonsense(call, thing):
    with PredictiveBufferManager(max_batch_size=1, max_seq_len=8) as m:
        m.record_usage(3)
        seen = m.prediction_stats() if hasattr(m, "prediction_stats") else None
        method = getattr(m, call)
        _, error = attempt(method) if call == "prewarm" else attempt(method, thing)
        if error is not None and seen is not None:
            assert m.prediction_stats() == seen
        assert 3 in m.predict_next_sizes(3) or error is None


# ---------------------------------------------------------------------------------------------- closed objects, threads


def public(thing):
    """The public methods and properties of an object, each as a call without arguments."""
    for name in dir(type(thing)):
        if not name.startswith("_"):
            yield name


ARGUMENTS = {
    "allocate": (BufferSpec(4),), "reserve": ([BufferSpec(4)],), "trim": (0,), "register_slot": ("late", BufferSpec(4)),
    "register_output": ("sent", BufferSpec(4)),
    "stage_inputs": ({}, 0), "replay": ({}, 0), "stage": (0,), "capture_buckets": (lambda step: None,),
    "program": (lambda step: None,), "wait_for": (None,),
    "get_slot": ("input_ids",), "record_usage": (3,), "plan_buckets": (2,),
    "promote": ([],), "demote": ([],), "prefetch": ([],),
}  # fmt: skip
REFUSED = {
    "manager": {
        "stage_inputs", "replay", "stage", "capture", "capture_buckets", "register_slot", "get_static_tensors",
        "wait_for", "register_output",
    },
    "pool": {"allocate", "reserve"},
    "hierarchy": {"allocate", "reserve", "use", "promote", "demote", "prefetch"},
}  # fmt: skip
NEEDS_MORE = {"observer", "refusal_observer", "release", "adopt", "demand", "tier_of"}


def made(which):
    if which == "manager":
        return PredictiveBufferManager(max_batch_size=1, max_seq_len=4)
    return SimpleBufferPool() if which == "pool" else HierarchicalBufferPool(device_bytes=4096, pinned_bytes=4096)


def call_of(thing, name):
    """Call a public member with good arguments, entering what is a context manager."""
    if name == "capture":
        with thing.capture(1):
            pass
    elif name == "use":
        with thing.use([], stream=None):
            pass
    else:
        member = getattr(thing, name)
        if callable(member):
            result = member(*ARGUMENTS.get(name, ()))
            if isinstance(result, contextlib.AbstractContextManager) and name in ("stage", "statistics", "allocate"):
                with result:
                    pass


@pytest.mark.parametrize("which", REFUSED)
def test_each_call_on_a_closed_object_is_refused_or_harmless(which):
    thing = made(which)
    if which == "manager":
        thing.stage_inputs({}, 0)
    thing.close()
    for name in public(thing):
        if name in NEEDS_MORE:
            continue
        _, error = attempt(call_of, thing, name)
        if name in REFUSED[which]:
            assert isinstance(error, ClosedError), f"{name} of a closed {which}: {error!r}"
        assert thing.closed
        thing.check()


@pytest.mark.parametrize("which", REFUSED)
def test_each_call_may_come_from_a_thread_that_never_called_the_driver(which):
    with made(which) as thing:
        for name in public(thing):
            if name in NEEDS_MORE or name in ("close", "start", "stop", "events"):
                continue
            if which == "manager" and not thing.captured:
                thing.capture_buckets(lambda step: None, [1, 4])
            failures = []

            def run(name=name, failures=failures):
                try:
                    call_of(thing, name)
                except BaseException as error:
                    failures.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            assert not failures or name in ("register_slot", "register_output"), (name, failures)
        thing.check()


@pytest.mark.parametrize("which", REFUSED)
def test_the_last_call_may_come_from_such_a_thread(which):
    thing = made(which)
    if which == "manager":
        thing.capture_buckets(lambda step: None, [1, 4])
        thing.replay({}, 0)
    else:
        stream = _cuda.as_stream(None)
        for tier in (Tier.DEVICE, Tier.PINNED):
            thing.allocate(BufferSpec(4, "f4", tier), stream=stream).release()
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(thing.close)))
    thread.start()
    thread.join()
    assert results == [(None, None)] and thing.closed


def test_a_lease_may_be_ended_by_another_thread_and_only_once():
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        lease = m.stage(3)
        lease["input_ids"][:] = [1, 2, 3]
        held = lease["input_ids"]
        results = []
        threads = [threading.Thread(target=lambda: results.append(attempt(lease.fill))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [error for _, error in results if error is not None]
        assert len(errors) == 3 and all(isinstance(error, ClosedError) for error in errors)
        with pytest.raises(ValueError, match="read-only"):
            held[:] = 9
        assert kit.contents(m)["input_ids"][:4].tolist() == [1, 2, 3, 0]
        m.check()


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def elsewhere(monkeypatch):
    """A context in which another device is current, as far as numbabuf can tell: most machines have but one."""

    @contextlib.contextmanager
    def other_device():
        with monkeypatch.context() as patch:
            patch.setattr(_cuda, "device_id", lambda: 1)
            yield

    return other_device


def hierarchy():
    return HierarchicalBufferPool(device_bytes=4096, pinned_bytes=4096)


@pytest.mark.parametrize("kind", [SimpleBufferPool, hierarchy])
@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.PINNED])
def test_a_pool_grows_on_no_other_device(kind, tier, elsewhere):
    spec = BufferSpec(64, "uint8", tier)
    with kind() as pool:
        assert pool.device is None
        pool.allocate(spec).release()
        assert pool.device == 0
        before = shelf(pool)
        with elsewhere():
            pool.allocate(spec).release()  # memory that is there already, of its own device
            for call in (lambda: pool.allocate(BufferSpec(2000, "uint8", tier)), lambda: pool.reserve([spec, spec])):
                with pytest.raises(BackendError, match="is on device 0, and device 1 is current in this thread"):
                    call()
        assert shelf(pool)[:5] == before[:5] and pool.device == 0
        pool.reserve([spec, spec])


def test_buffers_are_used_on_no_other_device(elsewhere):
    with hierarchy() as pool:
        entry = pool.allocate(BufferSpec(64, "uint8"), movable=True)
        before = pool.stats()
        with elsewhere(), pytest.raises(BackendError, match="is on device 0, and device 1 is current"):
            pool.use([entry]).__enter__()
        assert pool.stats() == before and entry.movable and entry.use_count == 0
        pool.check()
        with pool.use([entry]):
            pass


def test_a_manager_does_on_no_other_device_what_a_stream_cannot_carry(elsewhere):
    with SimpleBufferPool() as pool, InputBufferManager(pool, 1, 16, buckets=[4, 8, 16]) as m:
        with elsewhere(), pytest.raises(BackendError, match="device 1 is current"):
            m.stage_inputs({"input_ids": [1]}, 1)
        assert pool.stats().allocations == 0
        m.stage_inputs({"input_ids": [1]}, 1)
        m.capture_buckets(lambda step: step.bucket, [4])
        before = kit.contents(m), m.stats()

        def capture():
            with m.capture(8):
                raise AssertionError("the capture was begun")

        refused = {
            "a bucket's first fill": lambda: m.stage_inputs({}, 5),
            "set_data": lambda: m.get_slot("positions").set_data([3]),
            "capture": capture, "capture_buckets": lambda: m.capture_buckets(lambda step: None, [16]),
        }  # fmt: skip
        with elsewhere():
            for name, call in refused.items():
                with pytest.raises(BackendError, match="device 1 is current"):
                    call()
                after = kit.contents(m), m.stats()
                assert before[1] == after[1], name
                assert all((before[0][slot] == after[0][slot]).all() for slot in before[0]), name
            assert m.replay({"input_ids": [7, 8]}, 2) == {"tokens": 4}  # one launch, on the manager's stream
        assert kit.contents(m)["input_ids"][:4].tolist() == [7, 8, 0, 0]
        for name in ("a bucket's first fill", "set_data", "capture_buckets"):
            refused[name]()
        m.check()


@pytest.mark.devices
def test_a_manager_takes_no_pool_of_another_device():
    with SimpleBufferPool() as pool:
        with cuda.gpus[1]:
            pool.reserve([BufferSpec(64, "uint8")])
        with cuda.gpus[0], InputBufferManager(pool, max_batch_size=1, max_seq_len=8) as m:
            with pytest.raises(BackendError, match="on device 0 and its pool's memory on device 1"):
                m.stage_inputs({}, 0)
            assert pool.stats().in_use_count == 0


@pytest.mark.devices
def test_objects_of_two_devices_side_by_side():
    with cuda.gpus[1]:
        stream = cuda.stream()
        second = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8])
    with cuda.gpus[0]:
        pool = SimpleBufferPool()
        first = InputBufferManager(pool, max_batch_size=1, max_seq_len=8, buckets=[8])
        third = InputBufferManager(pool, max_batch_size=1, max_seq_len=8, buckets=[8], stream=stream)
        first.stage_inputs({"input_ids": [1]}, 1)
        with pytest.raises(BackendError, match="is on device 1, and device 0 is current"):
            second.stage_inputs({}, 0)
    with cuda.gpus[1]:
        second.stage_inputs({"input_ids": [2]}, 1)
        with pytest.raises(BackendError, match="pool's memory on device 0"):
            third.stage_inputs({}, 0)
        with pytest.raises(BackendError, match="is on device 0, and device 1 is current"):
            first.get_slot("input_ids").set_data([3])
    for number, manager in enumerate((first, second)):
        with cuda.gpus[number]:
            assert kit.contents(manager)["input_ids"].tolist() == [number + 1] + [0] * 7
            manager.check()
            manager.close()
    third.close()
    pool.close()
