"""A pool that is called in the middle of its own call, in the same thread: refused whole, releases put off."""

import gc
import logging

import pytest

from numbabuf import BufferSpec, BusyError, HierarchicalBufferPool, SimpleBufferPool, Tier, _cuda

SPEC = BufferSpec(64, "uint8", Tier.PINNED)
OTHER = BufferSpec(4000, "uint8", Tier.PINNED)


def simple():
    return SimpleBufferPool(max_pinned_bytes=1 << 16)


def tiered():
    return HierarchicalBufferPool(device_bytes=1 << 16, pinned_bytes=1 << 16)


@pytest.fixture(params=[simple, tiered])
def pool(request):
    with request.param() as pool:
        yield pool
        pool.check()


class Within(logging.Handler):
    """Calls a function in the middle of the pool's report of a lost buffer, which is anybody's code."""

    def __init__(self, call):
        super().__init__()
        self.call, self.found = call, []

    def emit(self, record):
        try:
            self.found.append(self.call())
        except Exception as error:
            self.found.append(error)


def lose(pool):
    pool.allocate(BufferSpec(128, "uint8", Tier.PINNED))
    gc.collect()


def in_the_middle(pool, call, step):
    """Do `call` in the middle of `step`; return what it returned or raised."""
    handler, log = Within(call), logging.getLogger("numbabuf")
    log.addHandler(handler)
    try:
        lose(pool)
        step()
    finally:
        log.removeHandler(handler)
    assert handler.found, "the step reported nothing: this shows nothing"
    return handler.found[0]


STEPS = {
    "stats": lambda pool: pool.stats(),
    "trim": lambda pool: pool.trim(1 << 20),
    "reserve": lambda pool: pool.reserve([SPEC]),
    "limits": lambda pool: pool.limits.update({Tier.PINNED: 64}),
    "allocate": lambda pool: pool.allocate(OTHER).release(),
    "close": lambda pool: pool.close(),
}
CALLS = {
    **STEPS,
    "allocate": lambda pool: pool.allocate(OTHER),
    "allocate with stream": lambda pool: pool.allocate(SPEC, stream=0),
    "check": lambda pool: pool.check(),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_and_changes_nothing(pool, step, call):
    limit = pool.limits[Tier.PINNED]
    found = in_the_middle(pool, lambda: CALLS[call](pool), lambda: STEPS[step](pool))
    assert isinstance(found, BusyError) and "in the middle of another call" in str(found)
    if step != "close":
        assert not pool.closed
        assert pool.stats().in_use_count == 0 and pool.limits[Tier.PINNED] == (64 if step == "limits" else limit)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_release_is_taken_and_done_when_the_call_has_returned(pool, step, stream):
    entry = pool.allocate(SPEC)
    stream = _cuda.as_stream(None) if stream else None
    if stream:
        entry.mark_in_use(stream=stream)
    assert in_the_middle(pool, lambda: entry.release(stream=stream), lambda: STEPS[step](pool)) is None
    assert entry.state.value == "free"
    if stream:
        stream.synchronize()
    found = pool.stats()
    assert found.in_use_count == 0 and found.lost == 1
    assert found.reserved_count == 0 if step == "close" else found.idle_count == found.reserved_count


def test_a_limit_is_never_passed_by_what_runs_within_its_change(pool):
    """The call within would grow between the look at what is reserved and the new limit."""
    found = in_the_middle(
        pool, lambda: pool.allocate(BufferSpec(30_000, "uint8", Tier.PINNED)), lambda: STEPS["limits"](pool)
    )
    assert isinstance(found, BusyError)
    assert pool.stats().reserved_by_tier[Tier.PINNED] <= pool.limits[Tier.PINNED]


def test_a_release_while_the_pool_waits_for_its_buffers_is_put_off(monkeypatch):
    """A signal handler that releases an entry comes in the middle of the wait, which goes through those released."""
    stream = _cuda.as_stream(None)
    pool = simple()
    entries = [pool.allocate(SPEC) for _ in range(4)]
    for entry in entries:
        entry.mark_in_use(stream=stream)
    waited, query, synchronize = [], _cuda.Event.query, _cuda.Event.synchronize

    def wait(event):
        if not waited:
            entries.pop().release()
        waited.append(event)
        synchronize(event)

    monkeypatch.setattr(_cuda.Event, "query", lambda event: event in waited and query(event))
    monkeypatch.setattr(_cuda.Event, "synchronize", wait)
    for entry in entries[:3]:
        entry.release()
    pool.close()
    monkeypatch.undo()
    assert len(waited) == 4 and pool.stats().reserved_count == 0
    pool.check()
