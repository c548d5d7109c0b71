"""The staging ring under the stand-in driver's lazy mode, where queued work runs only when something waits for it.

A host that writes a block before its fill has read it shows as wrong data in a log that the captured graph itself
writes, one row per step, compared in full. Seeds give each run another, repeatable order of work.
"""

import contextlib
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import kit
import numpy as np
import pytest

from numbabuf import BusyError, SimpleBufferPool, _cuda
from numbabuf._cuda import cuda

pytestmark = pytest.mark.stub

STEPS = 1112
"""Of each run of the sweep: with its seeds and rings, ten thousand for each kind of streams and number of threads."""


@pytest.fixture(params=[1, 2, 3])
def lazy(request, stub):
    """The stand-in driver in its lazy mode, with a seed."""
    stub.set_async(1)
    stub.set_seed(request.param)
    yield request.param
    stub.set_seed(0)
    stub.set_async(kit.lazy_by_environment())


@functools.cache
def user_stream():
    """A Numba stream, made once: Numba destroys it in whatever thread the collector finds it, with a context or not."""
    return cuda.stream()


@contextlib.contextmanager
def logs_on(streams, steps, ring):
    """Managers with their logs; at the end, each log is compared in full."""
    with contextlib.ExitStack() as stack:
        user = user_stream()
        if streams == "own":
            logs = [kit.Log(steps, ring=ring)]
        elif streams == "user":
            logs = [kit.Log(steps, ring=ring, stream=user)]
        else:
            pool = stack.enter_context(SimpleBufferPool())
            logs = [kit.Log(steps, ring=ring, stream=stream, pool=pool) for stream in (None, user, user)]
        for log in logs:
            stack.callback(log.manager.close)
        yield logs
        for log in logs:
            assert log.wrong() == []
            log.manager.check()


def write(logs, step, *, threads, steps, seed):
    """Let `threads` writers do `steps` steps in all, each step on any of the logs."""
    barrier = threading.Barrier(threads)

    def work(writer):
        random = np.random.default_rng([seed, writer])
        barrier.wait()
        for _ in range(steps // threads):
            step(logs[random.integers(len(logs))], random, writer)

    kit.collect()  # Numba would destroy what others left behind in a thread that has no context yet, and fail
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads then change places inside steps, too
    try:
        with ThreadPoolExecutor(threads, initializer=_cuda.require) as workers:
            list(workers.map(work, range(threads)))  # raises what a writer raised
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("streams", ["own", "user", "several, one pool"])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_every_step_sees_its_own_inputs(lazy, ring, streams, threads):
    with logs_on(streams, STEPS, ring) as logs:
        write(logs, kit.Log.step, threads=threads, steps=STEPS, seed=lazy)
    stats = [log.manager.stats() for log in logs]
    assert sum(s.steps for s in stats) == STEPS
    assert all(s.ring_waits > 0 for s in stats), "nothing was ever queued: the run was not lazy, and shows nothing"


class Mixed:
    """A step of any kind. What shuts others out has the lock meanwhile, and those who are shut out wait for it."""

    KINDS = {"replay": 50, "stage": 10, "set_data": 10, "lease": 20, "discard": 4, "capture": 4, "capture_all": 2}
    """Of a hundred steps."""

    def __init__(self):
        self.alone = threading.Lock()
        self.done = dict.fromkeys(self.KINDS, 0)

    def __call__(self, log, random, writer):
        kind = str(random.choice(list(self.KINDS), p=[weight / 100 for weight in self.KINDS.values()]))
        while True:
            try:
                getattr(self, kind)(log, random, writer)
                self.done[kind] += 1  # by one thread at a time, or inexact, which will do
                return
            except BusyError:
                with self.alone:
                    pass

    def replay(self, log, random, writer):
        log.step(random, writer)

    def stage(self, log, random, writer):
        tokens = int(random.integers(0, kit.WIDTH + 1))
        log.manager.stage_inputs({"ids": random.integers(0, 9, tokens)}, tokens)

    def set_data(self, log, random, writer):
        log.manager.get_slot("other").set_data(random.integers(0, 9, 3))

    def lease(self, log, random, writer):
        tokens = int(random.integers(0, kit.WIDTH + 1))
        inputs = {slot: random.integers(0, 1 << 60, tokens) for slot in log.logs}
        with self.alone, log.manager.stage(tokens) as lease:
            for slot, data in inputs.items():
                lease[slot][:] = data
            if random.integers(4):
                lease.replay()
                log.expect(inputs, kit.bucket_of(tokens), writer)

    def discard(self, log, random, writer):
        with self.alone, log.manager.stage(3) as lease:
            lease["ids"][:] = 77
            lease.discard()

    def capture(self, log, random, writer):
        with self.alone, log.manager.capture(int(random.choice(kit.BUCKETS))) as step:
            log(step)

    def capture_all(self, log, random, writer):
        with self.alone:
            log.capture()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_steps_of_every_kind_share_the_ring(lazy, ring, threads):
    """Fills, leases, single slots and new captures, while graphs that they replace are queued."""
    mixed = Mixed()
    with logs_on("several, one pool", 600, ring) as logs:
        write(logs, mixed, threads=threads, steps=400, seed=lazy)
    assert all(mixed.done.values()), mixed.done


def test_memory_goes_from_one_manager_to_another(lazy):
    """Through a pool, whose blocks keep no work of their last user."""
    random = np.random.default_rng(lazy)
    with logs_on("several, one pool", 600, 2) as logs:
        for _ in range(30):
            leaving = [log for log in logs if random.integers(2)]
            for log in leaving:
                log.step(random)
                log.manager.release_all()
            for log in reversed(leaving):
                log.capture()
            for log in logs:
                log.step(random)


def test_a_wait_is_counted_only_where_the_ring_is_full(stub):
    stub.set_async(0)
    log = kit.Log(70, ring=2)
    random = np.random.default_rng(0)
    for _ in range(50):
        log.step(random)
    assert log.manager.stats().ring_waits == 0, "every fill ran at once"
    stub.set_async(1)
    try:
        waits = []
        for _ in range(3):
            log.manager.synchronize()
            before = log.manager.stats().ring_waits
            log.step(random)
            log.step(random)
            waits.append(log.manager.stats().ring_waits - before)
        assert waits == [0, 0, 0], "two steps fit a ring of two"
        log.step(random)
        assert log.manager.stats().ring_waits == 1
    finally:
        stub.set_async(kit.lazy_by_environment())
    log.manager.close()


def test_a_wait_takes_no_more_than_one_block(lazy, stub):
    """The host goes on as soon as the oldest fill is done; it does not drain the queue."""
    random = np.random.default_rng(lazy)
    still_queued = 0
    with logs_on("own", 200, 4) as [log]:
        for _ in range(200):
            log.step(random)
            still_queued += stub.pending() > 1
    assert still_queued > 50
