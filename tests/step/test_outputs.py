"""Outputs: what each step sends back, read as users read it: at once, late, from other threads, held, awaited."""

import asyncio
import os
import subprocess
import sys
import threading

import kit
import numpy as np
import pytest

from numbabuf import (
    BufferSpec,
    BusyError,
    CaptureError,
    ClosedError,
    InputBufferManager,
    Outputs,
    SimpleBufferPool,
    StaleBufferError,
    Tier,
    _cuda,
)
from numbabuf._cuda import cuda

ROOM = 40
BUCKETS = [4, 16, ROOM]


@cuda.jit
def square_and_sum(x, live, squares, total):
    """squares[:live[0]] = x ** 2; total[0] = sum(x), by one thread."""
    for i in range(cuda.grid(1), live[0], cuda.gridsize(1)):
        squares[i] = x[i] * x[i]
    if cuda.grid(1) == 0:
        total[0] = 0
        for i in range(live[0]):
            total[0] += x[i]


@cuda.jit
def copy_rows(x, out):
    """out = x, of two dimensions."""
    for i in range(cuda.grid(1), x.shape[0], cuda.gridsize(1)):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j]


def both(step):
    kit.run(square_and_sum, step.stream, step["x"], step.live["tokens"], step["squares"], step["total"])
    return "ran"


def make(*, ring=2, returns=None, pool=None, fn=both, sizes=None, **options):
    options = {"default_slots": False, "buckets": BUCKETS, **options}
    m = InputBufferManager(pool, max_batch_size=1, max_seq_len=ROOM, ring=ring, returns=returns, **options)
    m.register_slot("x", BufferSpec(ROOM, "int64"))
    m.register_output("squares", BufferSpec(ROOM, "int64"))
    m.register_output("total", BufferSpec(1, "int64"), axis=None)
    m.capture_buckets(fn, sizes)
    return m


@pytest.fixture
def manager():
    with make() as m:
        yield m
        m.check()


@pytest.fixture
def lazy(stub):
    """Work that is queued runs when something waits for it, from here to the end of the test."""
    _cuda.synchronize()
    stub.set_async(1)
    stub.set_seed(0)
    yield stub
    _cuda.synchronize()
    stub.set_async(kit.lazy_by_environment())


def steps(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(-99, 99, rng.integers(0, ROOM + 1)) for _ in range(count)]


def is_right(outputs, x):
    return (outputs["squares"] == x * x).all() and outputs["squares"].shape == x.shape and outputs["total"] == [x.sum()]


@pytest.mark.parametrize("ring, returns", [(1, 1), (1, 2), (2, 1), (4, 4), (3, 8)])
@pytest.mark.parametrize("late", [0, 1, 5])
def test_every_step_gets_its_own_values_however_late_it_is_read(ring, returns, late):
    with make(ring=ring, returns=returns) as m:
        waiting = []
        for x in steps(12 if kit.SIM else 60, seed=ring * 10 + late):
            waiting.append((x, m.replay({"x": x}, len(x))))
            if len(waiting) > late:
                x, outputs = waiting.pop(0)
                assert is_right(outputs, x)
        assert all(is_right(outputs, x) for x, outputs in waiting)
        assert m.stats().late_reads == 0 if late < returns else m.stats().late_reads > 0
        m.check()


def test_outputs_are_a_mapping_with_the_functions_result(manager):
    outputs = manager.replay({"x": [3, 4]}, 2)
    assert isinstance(outputs, Outputs) and outputs.result == "ran"
    assert list(outputs) == ["squares", "total"] and len(outputs) == 2 and "squares" in outputs and "x" not in outputs
    assert {name: array.tolist() for name, array in outputs.items()} == {"squares": [9, 16], "total": [7]}
    with pytest.raises(KeyError, match="was not sent by this step; it sent squares, total"):
        outputs["x"]
    outputs["squares"][:] = 0
    assert outputs["squares"].tolist() == [9, 16], "the copy is the caller's"
    assert repr(outputs) == "Outputs(squares, total)" and "squares" in outputs._repr_html_()
    with pytest.raises(TypeError, match="cannot be copied"):
        outputs.__reduce__()


def test_what_a_function_does_not_ask_for_is_not_sent():
    def one(step):
        kit.run(kit.widen, step.stream, step["x"], step["squares"])

    with make(fn=one) as m:
        assert list(m.replay({"x": [5]}, 1)) == ["squares"]
        assert m.program(lambda step: step.bucket["tokens"]).capture_buckets() is not None
        assert m.programs["<lambda>"].replay({"x": [5]}, 1) == 4
        assert m.programs["<lambda>"].stats().steps == 1


def test_steps_that_send_nothing_take_no_block(manager):
    first = manager.replay({"x": [2]}, 1)
    for _ in range(7):
        manager.get_slot("x").set_data(np.array([9]))
        manager.stage_inputs({"x": [8]}, 1)
    assert manager.stats().late_reads == 0
    assert is_right(first, np.array([2]))
    assert is_right(manager.replay({"x": [6, 7]}, 2), np.array([6, 7]))


def test_conversions_rows_and_offsets_on_the_way_back():
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets={"tokens": [8], "seqs": [2, 4]}) as m:
        m.register_slot("wide", BufferSpec((8, 3), "float32"))
        m.register_slot("starts", BufferSpec(5, "int32"), axis="seqs+1")
        m.register_output("half", BufferSpec((8, 3), "float32"), result_dtype="float16")
        m.register_output("ends", BufferSpec(5, "int32"), axis="seqs+1", result_dtype="int64")

        def fn(step):
            kit.run(copy_rows, step.stream, step["wide"], step["half"])
            kit.run(kit.widen, step.stream, step["starts"], step["ends"])

        m.capture_buckets(fn)
        rng = np.random.default_rng(1)
        for n, seqs in ((0, 0), (3, 1), (8, 4), (5, 2)):
            wide, starts = rng.normal(size=(n, 3)).astype("f4"), np.arange(seqs + 1, dtype="i4") - 2
            outputs = m.replay({"wide": wide, "starts": starts}, n, seqs=seqs)
            assert outputs["half"].dtype == "float16" and (outputs["half"] == wide.astype("f2")).all()
            assert outputs["half"].shape == (n, 3)
            assert outputs["ends"].dtype == "int64" and (outputs["ends"] == starts).all()
        m.check()


@cuda.jit
def note(live, out):
    """out[()] = live[0]"""
    if cuda.grid(1) == 0:
        out[()] = live[0]


def test_an_output_without_dimensions_is_a_number():
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as m:
        m.register_output("count", BufferSpec((), "int64"), axis=None)
        m.capture_buckets(lambda step: kit.run(note, step.stream, step.live["tokens"], step["count"]))
        count = m.replay({}, 5)["count"]
        assert count.shape == () and count == 5
        m.check()


def test_an_axis_that_only_an_output_follows():
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], default_slots=False) as m:
        m.register_output("rows", BufferSpec(6, "int64"), axis="rows")
        m.register_slot("x", BufferSpec(8, "int64"))
        m.register_slot("y", BufferSpec(4, "int64"), axis="seqs")
        m.capture_buckets(lambda step: kit.run(kit.widen, step.stream, step["x"], step["rows"]), [{"tokens": 5}])
        assert m.layout.axes == ("tokens", "rows", "seqs")
        outputs = m.replay({"x": [1, 2, 3]}, 3, rows=2, seqs=1)
        assert outputs["rows"].tolist() == [1, 2]


def test_the_live_size_is_on_the_device(manager):
    @cuda.jit
    def note(live, out):
        if cuda.grid(1) == 0:
            out[0] = live[0]

    with manager.program(lambda step: kit.run(note, step.stream, step.live["tokens"], step["total"])) as program:
        program.capture_buckets()
        for n in (0, 3, 17, ROOM):
            assert program.replay({}, n)["total"].tolist() == [n]
            with program.stage(n) as lease:
                assert lease.replay()["total"].tolist() == [n]
        manager.replay({"x": [1, 2, 3]}, 3)
        manager.get_slot("x").set_data(np.arange(9))
        manager.synchronize()
        with manager.program(lambda step: step.live["tokens"]) as other:
            other.capture_buckets([4])
            live = other.replay({}, 2)
        manager.get_slot("x").set_data(np.arange(9))
        assert kit.to_host(live, manager.stream).tolist() == [2], "set_data is no step"


def test_leases_eager_and_split_steps_send_too():
    for overflow in ("eager", "split"):
        with make(overflow=overflow, sizes=[4, 16], returns=2) as m:
            if overflow == "split":  # of a total, every piece would make another
                with pytest.raises(ValueError, match="'total', which follows nothing"):
                    m.replay({"x": np.arange(20)}, 20)
            else:
                with pytest.warns(RuntimeWarning, match="without a graph"):
                    outputs = m.replay({"x": np.arange(20)}, 20)
                assert is_right(outputs, np.arange(20))
            with m.stage(3) as lease:
                lease["x"][:] = [1, 2, 3]
                outputs = lease.replay()
            assert is_right(outputs, np.array([1, 2, 3]))


def test_a_split_step_has_one_mapping_over_all_its_pieces():
    with InputBufferManager(max_batch_size=1, max_seq_len=ROOM, overflow="split", default_slots=False, returns=2) as m:
        m.register_slot("x", BufferSpec(ROOM, "int64"))
        m.register_output("squares", BufferSpec(ROOM, "int64"))
        m.register_output("unused", BufferSpec(ROOM, "int64"))

        def fn(step):
            kit.run(kit.widen, step.stream, step["x"], step["squares"])

        m.capture_buckets(fn, [4])
        seen = []
        outputs = m.replay({"x": np.arange(30)}, 30, each=lambda piece, start, stop: seen.append((piece, start, stop)))
        assert outputs["squares"].tolist() == list(range(30)) and list(outputs) == ["squares"] and len(outputs) == 1
        assert [piece["squares"].tolist() for piece, _, _ in seen] == [list(range(a, b)) for _, a, b in seen]
        outputs.wait()
        assert outputs.done() and outputs.result is None and "unused" not in outputs
        with outputs.hold() as arrays:
            assert arrays["squares"].tolist() == list(range(30))


# ------------------------------------------------------------------------------------------------------------- holds


def test_a_held_block_is_never_written(manager):
    held = manager.replay({"x": [5]}, 1)
    with held.hold() as arrays:
        other = manager.replay({"x": [6]}, 1)
        with pytest.raises(BusyError, match="leave `with outputs.hold"):
            manager.replay({"x": [7]}, 1)
        assert arrays["squares"].tolist() == [25] and is_right(other, np.array([6]))
    assert is_right(manager.replay({"x": [7]}, 1), np.array([7]))
    assert is_right(held, np.array([5]))
    with pytest.raises(StaleBufferError, match="read outputs"), held.hold():
        pass


def test_a_lease_that_finds_its_block_held_stays_open():
    with make(returns=1) as m:
        held = m.replay({"x": [5]}, 1)
        with m.stage(1) as lease:
            lease["x"][:] = 7
            with held.hold() as arrays:
                with pytest.raises(BusyError, match="leave `with outputs.hold"):
                    lease.replay()
                assert lease.open and arrays["squares"].tolist() == [25]
            assert is_right(lease.replay(), np.array([7]))
        assert is_right(held, np.array([5]))


def test_a_step_waits_for_another_threads_hold_with_the_lock_let_go():
    with make(returns=1) as m:
        held = m.replay({"x": [5]}, 1)
        inside, leave, results = threading.Event(), threading.Event(), []

        def reader():
            with held.hold() as arrays:
                inside.set()
                leave.wait(10)
                m.stage_inputs({"x": [1]}, 1)  # wants the lock
                results.append(arrays["squares"].tolist())

        def stepper():
            results.append(m.replay({"x": [7]}, 1)["squares"].tolist())

        threads = [threading.Thread(target=reader), threading.Thread(target=stepper)]
        threads[0].start()
        assert inside.wait(10)
        threads[1].start()
        leave.set()
        for thread in threads:
            thread.join(30)
        assert results == [[25], [49]]


def test_a_hold_outlives_the_manager_and_its_memory_goes_back_at_its_end():
    with SimpleBufferPool() as pool:
        m = make(pool=pool)
        outputs = m.replay({"x": [5]}, 1)
        with outputs.hold() as arrays:
            m.close()
            assert arrays["squares"].tolist() == [25]
            assert pool.stats().in_use_count == 1
            with pytest.raises(ClosedError, match="the manager is closed"):
                outputs["squares"]
        assert pool.stats().in_use_count == 0
        for use in (outputs.done, outputs.wait, lambda: outputs["total"], lambda: outputs.hold().__enter__()):
            with pytest.raises(ClosedError, match="the manager is closed"):
                use()


def test_values_outlive_the_memory_of_the_slots(manager):
    outputs = manager.replay({"x": [5]}, 1)
    manager.close_graphs()
    manager.register_slot("late", BufferSpec(3))
    manager.capture_buckets(both)
    assert is_right(manager.replay({"x": [6]}, 1), np.array([6]))
    assert is_right(outputs, np.array([5]))
    manager.release_all()
    assert is_right(outputs, np.array([5]))


# ------------------------------------------------------------------------------------------------- threads and waits


def test_threads_get_the_results_of_their_own_steps():
    with make(returns=2) as m:
        wrong, rounds = [], 6 if kit.SIM else 50

        def work(seed):
            last = None
            for x in steps(rounds, seed):
                outputs = m.replay({"x": x}, len(x))
                if last is not None and not is_right(last[1], last[0]):
                    wrong.append(seed)
                last = x, outputs

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        m.check()


@pytest.mark.parametrize("ring, returns", [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_reads_and_holds_in_any_order_from_four_threads(ring, returns):
    wrong, rounds = [], 5 if kit.SIM else 40

    def read(x, outputs, hold):
        if hold:
            try:
                with outputs.hold() as arrays:
                    if (arrays["squares"] != x * x).any():
                        wrong.append("held")
            except StaleBufferError:  # it was copied out before
                pass
        if not is_right(outputs, x):
            wrong.append("read")

    def work(m, seed):
        random, waiting = np.random.default_rng(seed), []
        for x in steps(rounds, seed):
            waiting.append((x, m.replay({"x": x}, len(x))))
            if random.random() < 0.1:
                m.get_slot("x").set_data(np.arange(3))
            while len(waiting) > random.integers(0, 8):
                read(*waiting.pop(random.integers(0, len(waiting))), hold=random.random() < 0.2)
        for x, outputs in waiting:
            read(x, outputs, hold=False)

    with make(ring=ring, returns=returns) as m:
        threads = [threading.Thread(target=work, args=(m, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong and not any(thread.is_alive() for thread in threads)
        m.check()


def test_waiting_and_asking(manager):
    outputs = manager.replay({"x": [1, 2]}, 2)
    outputs.wait(30)
    assert outputs.done()

    async def main():
        return (await manager.replay({"x": [4]}, 1))["squares"].tolist()

    assert asyncio.run(main()) == [16]


@pytest.mark.stub
def test_a_wait_has_an_end_and_a_loop_on_done_too(lazy):
    with make() as m:
        outputs = m.replay({"x": [3]}, 1)
        assert not outputs.done()
        with pytest.raises(TimeoutError, match="not there after 0 s"):
            outputs.wait(0)
        while not outputs.done():
            pass
        assert is_right(outputs, np.array([3]))


@pytest.mark.stub
def test_an_output_is_not_waited_for_inside_a_capture(lazy):
    with make() as m, make() as other:
        outputs = other.replay({"x": [3]}, 1)
        with pytest.raises(CaptureError, match="read them before or after"), m.capture(4):
            outputs["squares"]
        assert is_right(outputs, np.array([3]))


# ------------------------------------------------------------------------------------------------- calls and failures


@pytest.mark.stub
def test_a_step_is_one_driver_call_inputs_and_outputs_included(stub):
    with make(ring=4) as m:
        last = None
        stub.reset_counts()
        for x in steps(40):
            outputs = m.replay({"x": x}, len(x))
            if last is not None:
                assert is_right(last[1], last[0])
            last = x, outputs
        counts = {name: n for name, n in stub.counts().items() if n}
        for asked in ("cuStreamQuery", "cuCtxGetDevice"):  # by a read that came before the step had run
            counts.pop(asked, 0)
        assert counts == {"cuGraphLaunch": 40}


@pytest.mark.stub
def test_a_failed_launch_burns_its_number(stub):
    with make() as m:
        before = m.replay({"x": [2]}, 1)
        stub.fail("cuGraphLaunch:1")
        with pytest.raises(Exception, match="CUDA"):
            m.replay({"x": [3]}, 1)
        stub.fail("")
        after = [m.replay({"x": [x]}, 1) for x in (4, 5, 6)]
        assert is_right(before, np.array([2]))
        assert all(is_right(outputs, np.array([x])) for outputs, x in zip(after, (4, 5, 6), strict=True))
        m.check()


def test_a_bad_step_takes_no_block(manager):
    first = manager.replay({"x": [5]}, 1)
    for inputs, n in (({"x": [1, 2]}, 1), ({"y": [1]}, 1), ({"x": [1.5]}, 1), ({"x": [1]}, -1)):
        for _ in range(3):
            with pytest.raises((TypeError, ValueError)):
                manager.replay(inputs, n)
    assert manager.stats().late_reads == 0 and is_right(first, np.array([5]))


PROGRAM = """
import os
import numpy as np
from numba import cuda
from numbabuf import BufferSpec, ClosedError, InputBufferManager
m = InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8], returns=2)
m.register_output("y", BufferSpec(8, "int64"))
m.capture_buckets(lambda step: step["y"].shape)
earlier, late, last = [m.replay({}, 3) for _ in range(3)]  # the first was copied out
m.synchronize()
def refused(what):
    for outputs in (earlier, late, last):
        for read in (outputs.done, outputs.wait, lambda: outputs["y"], lambda: outputs.hold().__enter__()):
            try:
                read()
            except ClosedError as error:
                assert what in str(error), error
            else:
                raise AssertionError("not refused")
"""


def in_a_process(program):
    done = subprocess.run([sys.executable, "-c", PROGRAM + program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stdout + done.stderr


@pytest.mark.real
def test_memory_that_went_with_its_context_is_not_read():
    in_a_process("""
try:
    cuda.close()
except Exception:  # Numba's own frees come behind the end of the context
    pass
refused("context")
m.close()
refused("context")
print("right")
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
def test_a_forked_child_reads_nothing():
    in_a_process("""
hold = last.hold()
hold.__enter__()
child = os.fork()
if child == 0:
    refused("the manager is closed")
    hold.__exit__(None, None, None)
    os._exit(3)
hold.__exit__(None, None, None)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert all(outputs["y"].shape == (3,) for outputs in (earlier, late, last))
m.close()
refused("the manager is closed")
print("right")
""")


# ------------------------------------------------------------------------------------------------------- registering


def test_bad_outputs_are_refused(manager):
    before = [slot.name for slot in manager.slots]
    manager.close_graphs()
    spec = BufferSpec(4)
    for error, text, call in (
        (ValueError, "registered already", lambda: manager.register_output("x", spec)),
        (ValueError, "registered already", lambda: manager.register_output("squares", spec)),
        (ValueError, "registered already", lambda: manager.register_slot("squares", spec)),
        (TypeError, "non-empty string", lambda: manager.register_output("", spec)),
        (TypeError, "give a BufferSpec", lambda: manager.register_output("a", (4,))),
        (ValueError, "holds no elements", lambda: manager.register_output("a", BufferSpec(0))),
        (ValueError, "no dimension to follow", lambda: manager.register_output("a", BufferSpec(()))),
        (ValueError, "axis 'each' is taken", lambda: manager.register_output("a", spec, axis="each")),
        (ValueError, "adds 4 rows", lambda: manager.register_output("a", spec, axis="n+4")),
        (ValueError, "max_live is 5", lambda: manager.register_output("a", spec, max_live=5)),
        (TypeError, "no conversion", lambda: manager.register_output("a", spec, result_dtype="int8")),
        (ValueError, "returns", lambda: InputBufferManager(returns=0)),
    ):
        with pytest.raises(error, match=text):
            call()
    assert [slot.name for slot in manager.slots] == before
    manager.capture_buckets(both)
    with pytest.raises(BusyError, match="output 'late' cannot be added"):
        manager.register_output("late", spec)
    assert manager.get_slot("total").spec.shape == (1,)
    assert repr(manager.get_slot("squares")).startswith("OutputSlot('squares'")
    assert "squares" in manager.get_slot("squares")._repr_html_()


def test_an_output_bounds_the_steps_and_max_live_what_is_sent():
    with InputBufferManager(max_batch_size=1, max_seq_len=64, default_slots=False) as m:
        m.register_slot("x", BufferSpec(64, "int64"))
        m.register_output("y", BufferSpec(16, "int64"), max_live=6)
        m.capture_buckets(lambda step: kit.run(kit.widen, step.stream, step["x"], step["y"]), [8])
        assert m.layout.limits == (16,)
        assert m.replay({"x": np.arange(6)}, 6)["y"].tolist() == list(range(6))
        with pytest.raises(ValueError, match="max_live=6 elements a step; this one has 7"):
            m.replay({"x": np.arange(7)}, 7)
        assert m.replay({"x": np.arange(2)}, 2)["y"].tolist() == [0, 1]
        m.check()


def test_the_return_ring_is_pinned_and_given_back():
    with SimpleBufferPool() as pool:
        with make(pool=pool):
            assert pool.stats().reserved_by_tier[Tier.PINNED] > 0
        assert pool.stats().in_use_count == 0
    assert _cuda.capturing() is False
