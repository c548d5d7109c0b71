"""Every driver call of each public operation, failed in turn: what the sweeps of first steps and of moves leave out.

An operation runs in a world of its own, a manager with a captured graph over a pool, or a hierarchy. After each fault
the error has come out or nothing was wrong; invariants hold, no memory is lost, and the same operation, the steps after
it and the end of the world are as good as before.
"""

import contextlib
import functools
import logging
import warnings

import kit
import numpy as np
import pytest
from test_faults import failing, ids, sweep

from numbabuf import (
    BufferSpec,
    InputBufferManager,
    PredictiveBufferManager,
    SimpleBufferPool,
    Tier,
    _cuda,
    from_dlpack,
)
from numbabuf.tiers.pool import HierarchicalBufferPool

pytestmark = pytest.mark.stub


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "numbabuf")


class World:
    """A manager over a pool of its own, and a graph that adds up its inputs."""

    kind = InputBufferManager

    def __init__(self, captured=True, **options):
        self.pool = self.make_pool()
        self.m = self.kind(self.pool, **{"max_batch_size": 4, "max_seq_len": 8, "buckets": [8, 16], **options})
        self.total = kit.to_device(np.zeros(1, np.int64))
        self.kept = [self.pool.allocate(BufferSpec(64, "uint8", tier)) for tier in Tier]
        self.late = 0
        self.m.stage_inputs({}, 0)
        self.read()
        if captured:
            self.m.capture_buckets(self.fn, [8])

    def make_pool(self):
        return SimpleBufferPool()

    def fn(self, step):
        kit.run(kit.add_up, step.stream, step["input_ids"], self.total)

    def read(self):
        return int(kit.to_host(self.total, self.m.stream)[0])

    def good(self):
        """Later steps are right, and everything adds up."""
        self.m.check()
        self.pool.check()
        others = dict.fromkeys({slot.axis for slot in self.m.slots} - {"tokens", None}, 0)
        self.m.stage_inputs({"input_ids": ids(3)}, 3, **others)
        assert kit.contents(self.m)["input_ids"][:8].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
        if self.m.stats().graphs:
            before = self.read()
            self.m.replay({"input_ids": ids(4)}, 4, **others)
            assert self.read() == before + 10
        self.m.check()
        assert not _cuda.capturing()

    def close(self):
        for entry in self.kept:
            entry.release()
        self.kept = []
        self.m.close()
        assert self.m.closed
        self.m = None
        if self.pool.stats().in_use_count:  # of a manager whose first end failed: it goes with the manager
            kit.collect()
        self.pool.close()
        self.pool.check()
        assert self.pool.stats().reserved_bytes == 0


class Tiered(World):
    """The same over a hierarchy."""

    def make_pool(self):
        pool = HierarchicalBufferPool(device_bytes=1 << 14, managed_bytes=1 << 12, pinned_bytes=1 << 16)
        self.moving = pool.allocate(BufferSpec(64, "uint8"), movable=True)
        return pool

    def close(self):
        self.moving.release()
        super().close()


class Predictive(World):
    """The same, and a demand to prewarm for."""

    kind = PredictiveBufferManager

    def __init__(self):
        super().__init__(max_graphs=3, specs=lambda tokens: [BufferSpec(max(1, tokens))])
        for size in [5, 5, 12] * 20:
            self.m.record_usage(size)


def lease(how):
    def act(w):
        with w.m.stage(2) as lease:
            lease["input_ids"][:] = 9
            if how != "leave":
                getattr(lease, how)()

    return act


def many_buckets():
    return World(max_seq_len=100, buckets=[8, *range(16, 400)])


def first_of_a_bucket(w):
    w.late += 1
    w.m.stage_inputs({}, 16 + w.late)


def capture(w):
    with w.m.capture(12) as step:
        kit.run(kit.add_up, step.stream, step["input_ids"], w.total)


def eager(w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        w.m.replay({"input_ids": ids(20)}, 20)


def register(w):
    w.m.close_graphs()
    w.late += 1
    w.m.register_slot(f"late{w.late}", BufferSpec(8, "int32"))
    w.m.stage_inputs({"input_ids": ids(2)}, 2)


def again(w):
    w.m.release_all()
    w.m.stage_inputs({"input_ids": ids(2)}, 2)
    w.m.capture_buckets(w.fn, [8])


def entry_life(w):
    """Every call of an entry, on two streams."""
    one, two = _cuda.as_stream(None), _cuda.as_stream(None)
    for tier in Tier:
        with w.pool.allocate(BufferSpec(32, "int32", tier), stream=one) as entry:
            entry.mark_in_use(stream=two)
            entry.record_stream(two)
            assert entry.device_array.shape == entry.array.shape
            if tier is Tier.DEVICE:
                assert from_dlpack(entry).size == 32


def statistics(w):
    with w.pool.statistics() as scope:
        w.pool.allocate(BufferSpec(48, "uint8", Tier.PINNED)).release()
    assert scope.stats().current_bytes == 0


def pool_reserve(w):
    w.pool.reserve([BufferSpec(900, "uint8", tier) for tier in Tier])
    w.pool.clear()


def demote_and_use(w):
    entry = w.moving
    w.pool.demote([entry], tier=Tier.PINNED)
    with w.pool.use([entry], stream=None, write=False, in_place=False):
        pass


OPERATIONS = {
    "stage_inputs": (World, lambda w: w.m.stage_inputs({"input_ids": ids(5)}, 5)),
    "stage_inputs, the first of its bucket": (many_buckets, first_of_a_bucket),
    "stage_inputs, no graph": (lambda: World(overflow="eager"), lambda w: quietly(w.m.stage_inputs, {}, 30)),
    "replay": (World, lambda w: w.m.replay({"input_ids": ids(5)}, 5)),
    "replay, eager": (lambda: World(overflow="eager"), eager),
    "replay, split": (lambda: World(overflow="split"), lambda w: w.m.replay({"input_ids": ids(20)}, 20)),
    "lease, left": (World, lease("leave")),
    "lease, filled": (World, lease("fill")),
    "lease, replayed": (World, lease("replay")),
    "lease, discarded": (World, lease("discard")),
    "set_data": (World, lambda w: w.m.get_slot("positions").set_data([1, 2])),
    "capture": (World, capture),
    "capture_buckets": (World, lambda w: w.m.capture_buckets(w.fn, [8])),
    "register_slot": (lambda: World(captured=False), register),
    "release_all": (World, again),
    "close_graphs": (World, lambda w: (w.m.close_graphs(), w.m.capture_buckets(w.fn, [8]))),
    "get_static_tensors": (World, lambda w: w.m.get_static_tensors()),
    "synchronize": (World, lambda w: w.m.synchronize()),
    "stats": (World, lambda w: (w.m.stats(), w.pool.stats())),
    "prewarm": (Predictive, lambda w: (w.m.close_graphs(), w.m.prewarm(w.fn), w.m.capture_buckets(w.fn, [8]))),
    "entry": (World, entry_life),
    "statistics": (World, statistics),
    "reserve and clear": (World, pool_reserve),
    "replay over a hierarchy": (Tiered, lambda w: w.m.replay({"input_ids": ids(5)}, 5)),
    "release_all over a hierarchy": (Tiered, again),
    "entry of a hierarchy": (Tiered, entry_life),
    "reserve and clear of a hierarchy": (Tiered, pool_reserve),
    "demote, use": (Tiered, demote_and_use),
}  # fmt: skip
COUNTED = {name for name in OPERATIONS if name.startswith(("stage_inputs", "lease, filled", "set_data"))} | {"replay"}
"""Operations that are one step, or none."""


def quietly(call, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return call(*arguments)


def live(stub):
    kit.collect()
    _cuda.synchronize()
    _cuda.flush_pending_frees()
    return {kind: stub.live()[kind] for kind in ("device", "managed", "pinned")}


def calls_nobody_hears(spec):
    """Frees and the like, made where an error reaches nobody; what stays allocated is the driver's leak."""
    return any(word in spec for word in ("Free", "Destroy", "Unload"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_call_of_an_operation_fails_once(stub, name):
    make, act = OPERATIONS[name]
    world = make()
    act(world)
    specs = [spec for spec in sweep_or_none(stub, lambda: act(world)) if not calls_nobody_hears(spec)]
    world.good()
    raised = 0
    for spec in specs:
        before, leased = world.m.stats(), world.pool.stats().in_use_count
        with failing(stub, spec):
            try:
                act(world)
            except AssertionError:
                raise
            except Exception as error:
                assert not isinstance(error, (AttributeError, UnboundLocalError, IndexError)), (spec, error)
                raised += 1
                if name in COUNTED:
                    after = world.m.stats()
                    assert (after.steps, after.live_tokens) == (before.steps, before.live_tokens), spec
        stub.clear_errors()
        quietly(world.good)  # which a lease left open would refuse
        quietly(act, world)  # the same again, and now it works
        quietly(world.good)
        if world.pool.stats().in_use_count != leased:  # what was lost with the error is taken back by the collector
            kit.collect()
        assert world.pool.stats().in_use_count == leased, f"{spec}: a buffer stayed leased"
    world.close()
    assert raised or not specs or name in ("stats", "statistics", "prewarm"), f"nobody noticed any of {specs}"


def sweep_or_none(stub, action):
    """The sweep's specs; none where the operation calls no driver."""
    try:
        return sweep(stub, action)
    except AssertionError:
        return []


CLOSERS = {
    "manager": (World, lambda w: w.m.close()),
    "pool": (World, lambda w: (w.m.release_all(), w.pool.close())),
    "clear": (World, lambda w: (w.m.release_all(), w.pool.clear())),
    "trim": (World, lambda w: (w.m.release_all(), w.pool.trim(0))),
    "hierarchy": (Tiered, lambda w: (w.m.release_all(), w.pool.close())),
    "predictive manager": (Predictive, lambda w: w.m.close()),
}


@pytest.mark.parametrize("name", CLOSERS)
def test_each_call_of_an_end_fails_once(stub, name):
    """After an end that failed the thing is closed, or closes when asked again; all memory goes back either way.

    A manager that could not wait for its work keeps its memory, which that work may still use, for as long as it lives.
    """
    make, act = CLOSERS[name]

    def busy():
        world = make()
        stream = _cuda.as_stream(None)
        for tier in Tier:  # released with work queued behind them
            world.pool.allocate(BufferSpec(256, "uint8", tier), stream=stream).release()
        return world

    world = busy()
    specs = [spec for spec in sweep(stub, functools.partial(act, world)) if not calls_nobody_hears(spec)]
    world.close()
    world = None
    before = live(stub)
    for spec in specs:
        world = busy()
        with failing(stub, spec), contextlib.suppress(Exception):
            act(world)
        stub.clear_errors()
        world.pool.check()
        world.close()
        assert world.pool.closed
        world = None
        assert live(stub) == before, spec
