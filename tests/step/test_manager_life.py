"""A manager in a program that has more: steps within steps, other threads' captures, contexts that come and go."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from numba import cuda

from numbabuf import (
    BackendError,
    BufferSpec,
    BusyError,
    CaptureError,
    ClosedError,
    InputBufferManager,
    PredictiveBufferManager,
    SimpleBufferPool,
)

KINDS = [InputBufferManager, PredictiveBufferManager]


@cuda.jit
def copy(x, out):
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        out[i] = x[i]


@cuda.jit
def count(x, steps, row):
    if cuda.grid(1) == 0:
        steps[0] += 1
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        row[x[i]] = -1


def make(kind=InputBufferManager, pool=None, **more):
    manager = kind(pool, 1, 8, default_slots=False, buckets=[4, 8], **more)
    manager.register_slot("x", BufferSpec(8, "int64"))
    return manager


def capture(manager, sizes=(4, 8)):
    out = cuda.to_device(np.zeros(8, np.int64))
    cuda.synchronize()
    manager.capture_buckets(lambda step: copy[1, 4, step.stream](step["x"], out), sizes)
    return out


def steps(manager, out):
    manager.replay({"x": np.arange(1, 4)}, 3)
    manager.synchronize()
    return out.copy_to_host()[:4].tolist()


# ---------------------------------------------------------------------------------------------- captures and the data


@pytest.mark.parametrize("how", ["capture_buckets", "capture", "prewarm"])
def test_a_capture_changes_no_data(how):
    counter, row = cuda.to_device(np.array([100])), cuda.to_device(np.arange(8) + 50)
    cuda.synchronize()

    def fn(step):
        count[1, 4, step.stream](step["x"], counter, row)

    with make(PredictiveBufferManager if how == "prewarm" else InputBufferManager) as manager:
        if how == "capture":
            count[1, 4](cuda.to_device(np.zeros(1, np.int64)), counter, row)  # compiles, and counts
            cuda.synchronize()
            counter.copy_to_device(np.array([100]))
            row.copy_to_device(np.arange(8) + 50)
            with manager.capture(4) as step:
                fn(step)
        else:
            getattr(manager, how)(fn)
        manager.synchronize()
        assert counter.copy_to_host()[0] == 100 and row.copy_to_host().tolist() == list(range(50, 58))
        assert manager.get_slot("x").array.copy_to_host().tolist() == [0] * 8
        manager.replay({"x": np.array([1, 2])}, 2)
        manager.synchronize()
        assert counter.copy_to_host()[0] == 101
        assert row.copy_to_host()[1:4].tolist() == [-1, -1, 53]


def test_a_run_before_the_capture_is_had_by_asking_for_it():
    counter, row = cuda.to_device(np.array([100])), cuda.to_device(np.zeros(8, np.int64))
    cuda.synchronize()
    with make() as manager:
        manager.capture_buckets(lambda step: count[1, 4, step.stream](step["x"], counter, row), warm_up="run")
        manager.synchronize()
        assert counter.copy_to_host()[0] == 102


async def later(step):
    pass


def by_pieces(step):
    yield step


class Later:
    async def __call__(self, step):
        pass


@pytest.mark.parametrize("fn", [later, by_pieces, Later()])
def test_a_function_whose_call_runs_nothing_is_refused(fn):
    with make() as manager, pytest.raises(TypeError, match="without async or yield"):
        manager.capture_buckets(fn)


# ---------------------------------------------------------------------------------------------------- within each other

ACTS = {
    "replay": lambda m: m.replay({"x": np.full(4, 9)}, 4),
    "stage_inputs": lambda m: m.stage_inputs({"x": np.full(4, 9)}, 4),
    "set_data": lambda m: m.get_slot("x").set_data(np.full(4, 9)),
    "stage": lambda m: m.stage(4),
    "register_slot": lambda m: m.register_slot("y", BufferSpec(8)),
    "capture": lambda m: m.capture(4).__enter__(),
    "capture_buckets": lambda m: m.capture_buckets(lambda step: None),
    "prewarm": lambda m: m.prewarm(lambda step: None) if isinstance(m, PredictiveBufferManager) else m.close(),
    "close_graphs": lambda m: m.close_graphs(),
    "release_all": lambda m: m.release_all(),
    "close": lambda m: m.close(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["replay", "stage_inputs", "set_data"])
@pytest.mark.parametrize("act", ACTS)
def test_a_call_from_within_a_step_is_refused_and_the_step_is_right(kind, step, act):
    with make(kind) as manager:
        out, refused = capture(manager), []

        class Input:
            def __array__(self, dtype=None, copy=None):
                try:
                    ACTS[act](manager)
                except BusyError as error:
                    refused.append(error)
                return np.array([1, 2, 3, 4])

            def __len__(self):
                return 4

        if step == "set_data":
            manager.get_slot("x").set_data(Input())
        else:
            getattr(manager, step)({"x": Input()}, 4)
        manager.synchronize()
        assert refused and "from within another call" in str(refused[0])
        assert manager.get_slot("x").array.copy_to_host()[:4].tolist() == [1, 2, 3, 4]
        assert steps(manager, out) == [1, 2, 3, 0]
        manager.check()


def test_the_snapshot_may_be_taken_from_within_a_step():
    with make() as manager:
        capture(manager)

        class Inputs(dict):
            def get(self, name, default=None):
                manager.stats(), repr(manager)
                return super().get(name, default)

        manager.replay(Inputs(x=np.arange(3)), 3)
        assert manager.stats().steps == 1


# ------------------------------------------------------------------------------------------ other threads' captures


def held(manager, out):
    """A capture as a generator, to be begun in one thread and ended in another."""
    with manager.capture(4) as step:
        copy[1, 4, step.stream](step["x"], out)
        yield


@pytest.mark.parametrize("how", ["next", "throw", "drop"])
def test_a_capture_ended_in_another_thread_leaves_nothing_behind(how):
    manager, pool = make(), SimpleBufferPool()
    out = capture(manager)
    generator = held(manager, out)
    thread = threading.Thread(target=next, args=(generator,))
    thread.start()
    thread.join()
    if how == "next":
        with pytest.raises(CaptureError, match="another thread"):
            next(generator)
    elif how == "throw":
        with pytest.raises(ValueError, match="mine"):
            generator.throw(ValueError("mine"))
    else:
        del generator
    assert steps(manager, out) == [1, 2, 3, 0]
    manager.capture_buckets(lambda step: copy[1, 4, step.stream](step["x"], out))
    assert steps(manager, out) == [1, 2, 3, 0]
    pool.allocate(BufferSpec(1000)).release()
    pool.close()
    manager.close()


def in_another_thread(act):
    found = []

    def run():
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_manager_is_closed_while_another_captures_in_another_thread():
    one, other = make(), make()
    out = capture(one)
    capture(other)
    with one.capture(8) as step:
        copy[1, 4, step.stream](step["x"], out)
        assert in_another_thread(other.close) is None
    assert other.closed and steps(one, out) == [1, 2, 3, 0]
    one.close()


def test_a_manager_is_not_closed_inside_a_capture_of_another():
    pool = SimpleBufferPool()
    one, other = make(), make(pool=pool)
    out, others = capture(one), capture(other)
    with one.capture(8) as step:
        with pytest.raises(CaptureError, match="inside a captured function"):
            other.close()
        copy[1, 4, step.stream](step["x"], out)
    assert steps(one, out) == [1, 2, 3, 0]
    assert not other.closed and steps(other, others) == [1, 2, 3, 0]
    other.close()
    assert pool.stats().in_use_count == 0
    pool.close()
    one.close()


def test_another_thread_makes_its_first_step_while_one_captures():
    one = make()
    out = capture(one)

    def first():
        with make() as other:
            other.stage_inputs({"x": np.arange(3)}, 3)
            other.synchronize()
            return other.get_slot("x").array.copy_to_host()[:4].tolist()

    with one.capture(8) as step:
        copy[1, 4, step.stream](step["x"], out)
        assert in_another_thread(first) == [0, 1, 2, 0]
    one.close()


# ------------------------------------------------------------------------------------------- contexts, devices, streams


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_a_manager_whose_context_was_closed_says_so(kind):
    """In a process of its own, as a context is the whole process's."""
    program = f"""
import numpy as np, threading
from numba import cuda
from numbabuf import BufferSpec, ClosedError, SimpleBufferPool, {kind}
def make(pool=None):
    m = {kind}(pool, 1, 8, default_slots=False, buckets=[8])
    m.register_slot("x", BufferSpec(8, "int64"))
    m.capture_buckets(lambda step: None)
    m.replay({{"x": np.arange(3)}}, 3)
    m.synchronize()
    return m
old = make()
lease = old.stage(3)
lease.discard()
pool = SimpleBufferPool()
bare, lent = {kind}(None, 1, 8), make(pool)
try:
    cuda.close()
except Exception:  # Numba's own frees come behind the end of the context
    pass
for call in (lambda: old.replay({{"x": np.arange(3)}}, 3), lambda: old.stage_inputs({{}}, 0), lambda: old.stage(3),
             old.synchronize, lambda: old.capture_buckets(lambda step: None), lambda: old.get_slot("x").array,
             old.close_graphs, old.release_all, old.check, lambda: old.register_slot("y", BufferSpec(8)),
             lambda: old.capture(8).__enter__(), lambda: bare.stage_inputs({{}}, 0), bare.get_static_tensors):
    try:
        call()
    except ClosedError as error:
        assert "context" in str(error), error
    else:
        raise AssertionError("not refused")
assert "closed" in old._repr_html_() and "staged" not in lent._repr_html_(), "pinned memory is read no more"
assert old.stats().steps == 1
for manager in (old, bare, lent):
    manager.close()
new = make()
assert new.get_slot("x").array.copy_to_host()[:4].tolist() == [0, 1, 2, 0]
new.close()
print("right")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stdout + done.stderr
    assert "released" not in done.stderr, done.stderr


@pytest.mark.real
@pytest.mark.parametrize("ring", [1, 4])  # 1: it has to wait for a block, too
def test_a_thread_that_left_its_device_goes_on_stepping(ring):
    manager = make(ring=ring)
    out = capture(manager)

    def run():
        found = []
        for act in (lambda: manager.replay({"x": np.arange(1, 4)}, 3), lambda: manager.stage_inputs({}, 0)):
            with cuda.gpus[0]:
                manager.replay({"x": np.arange(1, 4)}, 3)
            act()
            manager.synchronize()
            found.append(out.copy_to_host()[:4].tolist())
        return found

    assert in_another_thread(run) == 2 * [[1, 2, 3, 0]]
    manager.close()


@pytest.mark.real
def test_the_per_thread_default_stream_is_refused():
    with pytest.raises(ValueError, match="per-thread default stream"):
        make(stream=cuda.per_thread_default_stream())


@pytest.mark.real
@pytest.mark.parametrize("act", ["stage_inputs", "stage", "capture", "capture_buckets", "prewarm"])
def test_what_is_refused_on_another_device_changes_nothing(act):
    if len(cuda.gpus) < 2:
        pytest.skip("fewer than two devices")
    with cuda.gpus[0]:
        manager = make(PredictiveBufferManager)
        assert manager.get_slot("x").array.size == 8
        out = cuda.to_device(np.zeros(8, np.int64))

    def fn(step):
        copy[1, 4, step.stream](step["x"], out)

    def attempt():
        if act == "stage_inputs":
            manager.stage_inputs({"x": np.arange(3)}, 3)
        elif act == "stage":
            with manager.stage(3) as lease:
                lease["x"][:] = 1
        elif act == "capture":
            with manager.capture(4):
                pass
        else:
            getattr(manager, act)(fn)

    with cuda.gpus[1], pytest.raises(BackendError, match="device"):
        attempt()
    with cuda.gpus[0]:
        manager.capture_buckets(fn)
        assert steps(manager, out) == [1, 2, 3, 0]
        attempt()
        manager.synchronize()
        manager.close()


@pytest.mark.real
@pytest.mark.parametrize("act", ["close_graphs", "release_all", "synchronize", "check", "close"])
def test_what_a_manager_ends_it_ends_on_its_own_device(act):
    if len(cuda.gpus) < 2:
        pytest.skip("fewer than two devices")
    with cuda.gpus[0]:
        manager = make()
        out = capture(manager)
        assert steps(manager, out) == [1, 2, 3, 0]
        manager.stage_inputs({}, 0)
    with cuda.gpus[1]:
        getattr(manager, act)()
        assert cuda.get_current_device().id == 1
    with cuda.gpus[0]:
        if act != "close":
            out = capture(manager)
            assert steps(manager, out) == [1, 2, 3, 0]
            manager.check()
        manager.close()


@pytest.mark.real
def test_a_lease_that_another_device_refuses_stays_open():
    if len(cuda.gpus) < 2:
        pytest.skip("fewer than two devices")
    with cuda.gpus[0]:
        manager = make()
        lease = manager.stage(3)
        lease["x"][:] = [4, 5, 6]
    with cuda.gpus[1], pytest.raises(BackendError, match="device"):
        lease.fill()
    with cuda.gpus[0]:
        lease.fill()
        manager.synchronize()
        assert manager.get_slot("x").array.copy_to_host()[:4].tolist() == [4, 5, 6, 0]
        manager.close()


@pytest.mark.real
def test_a_close_that_a_foreign_capture_refuses_leaves_the_manager_open():
    from cuda.core import Device

    manager = make()
    out = capture(manager)
    assert steps(manager, out) == [1, 2, 3, 0]
    builder = Device().create_stream().create_graph_builder()
    builder.begin_building("thread_local")
    try:
        with pytest.raises(CaptureError, match="still open"):
            manager.close()
    finally:
        with contextlib.suppress(Exception):  # the wait has ended it, as it ends any capture of its thread
            builder.end_building()
        with contextlib.suppress(Exception):
            builder.close()
    assert not manager.closed and steps(manager, out) == [1, 2, 3, 0]
    manager.close()
    assert manager.closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_leaves_a_capture_by_its_exit():
    """In a process of its own, as a child of the test process would go on with the tests."""
    program = """
import os, sys
from numbabuf import InputBufferManager
manager = InputBufferManager(None, 1, 8)
manager.stage_inputs({}, 0)
with manager.capture(8):
    child = os.fork()
    if child == 0:
        sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
manager.replay({}, 1)
manager.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "RuntimeError" not in done.stderr, done.stderr


def test_a_closed_manager_says_so():
    manager = make()
    manager.close()
    manager.close()
    with pytest.raises(ClosedError, match="make a new one"):
        manager.stage(1)
