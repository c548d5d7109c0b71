"""PredictiveBufferManager: plans follow the demand, budgets hold, and no failure costs what was there."""

import gc
import itertools
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from numbabuf import BufferSpec, PredictiveBufferManager, SimpleBufferPool, Tier, _cuda
from numbabuf._cuda import cuda, launch_shape
from numbabuf.demand.buckets import Refitter
from numbabuf.demand.model import DemandModel
from numbabuf.errors import BucketOverflowError, BusyError, CaptureError, ClosedError
from numbabuf.predict import Budgets, Prewarmer
from numbabuf.predict.usage import Usage
from numbabuf.step.graphs import Graphs
from numbabuf.step.program import Program

CAPACITY = 256
ROOT = pathlib.Path(__file__).resolve().parents[2]


@cuda.jit
def _double(out, ids):
    for i in range(cuda.grid(1), ids.size, cuda.gridsize(1)):
        out[i] = 2 * ids[i]


class Doubler:
    """A captured function that can be told to fail, and says which sizes it was captured for."""

    def __init__(self):
        self.out = cuda.to_device(np.zeros(CAPACITY, np.int64))
        self.refuse = ()
        self.sizes = []
        self.called = threading.Event()

    def __call__(self, step):
        self.sizes.append(step.bucket["tokens"])
        if step.bucket["tokens"] in self.refuse:
            raise RuntimeError("refused")
        _double[(*launch_shape(1), step.stream)](self.out, step["input_ids"])
        self.called.set()
        return self.out


@pytest.fixture
def make():
    managers = []

    def make(**options):
        options = {"max_batch_size": 4, "max_seq_len": CAPACITY // 4, "max_graphs": 4} | options
        managers.append(PredictiveBufferManager(**options))
        return managers[-1]

    yield make
    for manager in managers:
        manager.close()


def run(manager, sizes, seed=0):
    """Replay a step of each size and compare it with NumPy."""
    random = np.random.default_rng(seed)
    for size in sizes:
        ids = random.integers(0, 1000, size)
        out = manager.replay({"input_ids": ids}, size)
        manager.synchronize()
        np.testing.assert_array_equal(out.copy_to_host()[:size], 2 * ids)


def in_service(manager):
    return [graph.num_tokens for graph in manager.captured]


def test_the_plan_serves_what_was_recorded_and_always_the_largest(make):
    manager = make()
    for size in [5, 5, 30] * 50:
        manager.record_usage(size)
    assert manager.plan_buckets(3) == (5, 30, CAPACITY)
    forecast = manager.predict_next_sizes(2)
    assert len(forecast) == 2 and any(5 <= size < 8 for size in forecast)


@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), True, None, "3", CAPACITY + 1, 1 << 70])
def test_record_usage_refuses_what_is_no_size(make, bad):
    manager = make()
    with pytest.raises((TypeError, ValueError)):
        manager.record_usage(bad)
    assert len(manager.demand) == 0


@pytest.mark.parametrize("bad", [{"max_size": 0}, {"max_size": CAPACITY + 1}, {"max_graphs": 0},
                                 {"prewarm_bytes": -1}, {"prewarm_seconds": float("nan")}])  # fmt: skip
def test_bad_budgets_are_refused(make, bad):
    with pytest.raises((TypeError, ValueError)):
        make(**bad)


def test_own_steps_are_counted_and_not_learned_on_the_hot_path(make, monkeypatch):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    with monkeypatch.context() as patch:
        patch.setattr(DemandModel, "observe", lambda *_: pytest.fail("a step fed the model"))
        run(manager, [7, 7, 9])
    assert len(manager.demand) == 3
    assert dict(zip(*map(np.ndarray.tolist, manager.demand.histogram()), strict=True)) == {7: 2, 9: 1}


def test_capture_buckets_without_sizes_takes_the_plan(make):
    manager, fn = make(), Doubler()
    for size in [3, 3, 17] * 40:
        manager.record_usage(size)
    captured = [sizes["tokens"] for sizes in manager.capture_buckets(fn)]
    assert captured == in_service(manager) and {3, 17, CAPACITY} <= set(captured) and len(captured) <= 4


def test_prewarm_follows_the_demand_and_results_stay_right(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    assert set(manager.prewarm()) <= {3, 5, 40} and {3, 5, 40} <= set(in_service(manager))
    assert CAPACITY in in_service(manager)
    before = manager.stats().padded_tokens
    run(manager, [3, 5, 40] * 5, seed=1)
    assert manager.stats().padded_tokens - before == 5 * 48, "each step ran in a graph of its own size"
    run(manager, [100, 120, 7] * 150, seed=2)
    manager.prewarm()
    assert {7, 120} <= set(in_service(manager)) and len(in_service(manager)) <= 4
    run(manager, [1, 7, 100, 120, 200, 256], seed=3)
    score = manager.prediction()
    assert score.closed >= 3 and score.warmed >= 4 and score.failures == 0 and score.refits >= 2
    assert score.capture_seconds > 0 and score.model_seconds > 0
    manager.check()


def test_prewarm_without_a_function_or_inside_a_capture_does_nothing(make):
    manager, fn = make(), Doubler()
    assert manager.prewarm() == () and in_service(manager) == []
    manager.stage_inputs({}, 1)
    fn.out = manager.get_slot("positions").array  # compiled below; what it writes to does not matter here
    _double[(*launch_shape(1), manager.stream)](fn.out, manager.get_slot("input_ids").array)
    with manager.capture(8) as step:
        assert manager.prewarm(fn) == ()
        fn(step)
    assert in_service(manager) == [8]


def test_never_more_graphs_than_the_budget_and_the_largest_always(make):
    manager, fn = make(max_graphs=3), Doubler()
    manager.capture_buckets(fn)
    random = np.random.default_rng(1)
    for phase in range(4):
        run(manager, random.integers(1 + 50 * phase, 50 + 50 * phase, 60).tolist(), seed=phase)
        manager.prewarm()
        assert len(in_service(manager)) <= 3 and in_service(manager)[-1] == CAPACITY


def test_a_capture_that_fails_leaves_the_graphs_in_service(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    there = in_service(manager)
    run(manager, [3, 5, 40] * 40)
    fn.refuse = (3, 5, 40)
    assert manager.prewarm() == () and in_service(manager) == there
    assert manager.prediction().failures == 1
    run(manager, [3, 5, 40], seed=1)
    fn.refuse = ()
    assert manager.prewarm() and manager.prediction().failures == 1
    run(manager, [3, 5, 40], seed=2)


def test_the_time_budget_spreads_captures_over_calls(make):
    now = iter(range(1, 100_000))
    manager, fn = make(prewarm_seconds=0, clock=lambda: float(next(now))), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    calls = [manager.prewarm() for _ in range(3)]
    assert all(len(captured) == 1 for captured in calls)
    assert {size for captured in calls for size in captured} == {3, 5, 40}
    assert calls[0] == (40,), "the size that saves the most padding comes first"


def test_buffers_are_reserved_for_the_forecast_within_the_byte_budget(make):
    with SimpleBufferPool() as pool:
        manager = make(pool=pool, specs=lambda n: [BufferSpec(n, "float64")], prewarm_bytes=8 * 40)
        for size in [8, 32] * 100:
            manager.record_usage(size)
        manager.prewarm()
        reserved = manager.prediction().reserved_bytes
        assert 0 < reserved <= 8 * 40
        misses = pool.stats().misses
        with pool.allocate(BufferSpec(32, "float64")):
            assert pool.stats().misses == misses, "the buffer was ready"
        manager.close()


def test_reserved_buffers_stay_within_the_byte_budget_as_demand_drifts(make):
    with SimpleBufferPool() as pool:
        manager = make(pool=pool, specs=lambda n: [BufferSpec(n, "float64", Tier.PINNED)], prewarm_bytes=8 * 200)
        for low in (20, 70, 110, 50):
            for size in [low, low + 60] * 100:
                manager.record_usage(size)
            manager.prewarm()
            assert 0 < pool.stats().reserved_bytes - pool.stats().waste_bytes <= 8 * 200
            assert 0 < manager.prediction().reserved_bytes <= 8 * 200
            misses = pool.stats().misses
            with pool.allocate(BufferSpec(manager.predict_next_sizes(1)[0], "float64", Tier.PINNED)):
                assert pool.stats().misses == misses, "what is asked for now takes the place of what was"
        manager.close()


def test_a_pool_without_room_is_a_counted_failure(make):
    with SimpleBufferPool(max_bytes=1 << 16) as pool:
        manager, fn = make(pool=pool, specs=lambda n: [BufferSpec(1 << 20)]), Doubler()
        manager.capture_buckets(fn)
        run(manager, [3] * 40)
        manager.prewarm()
        score = manager.prediction()
        assert score.failures == 1 and score.reserved_bytes == 0
        run(manager, [3, 9], seed=1)
        manager.close()


def test_forecasts_are_scored(make):
    manager = make()
    for size in [8] * 200:
        manager.record_usage(size)
    manager.predict_next_sizes(1)
    for size in [8, 8, 8, 100]:
        manager.record_usage(size)
    score = manager.prediction()
    assert (score.hits, score.misses) == (3, 1)


def test_a_step_without_tokens_is_no_demand(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    manager.replay({}, 0)
    assert len(manager.demand) == 0


def test_the_background_thread_prewarms_while_steps_run_and_ends(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    fn.called.clear()
    manager.start(1e-3)
    manager.start(1e-3)
    workers = [thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm"]
    assert len(workers) == 1
    run(manager, [3, 5, 40, 200] * 10, seed=1)
    assert fn.called.wait(60)
    manager.stop()
    manager.stop()
    assert not workers[0].is_alive()
    assert manager.prediction().warmed >= 1 and manager.prediction().failures == 0
    run(manager, [3, 5, 40], seed=2)
    manager.check()


def test_close_ends_the_thread(make):
    manager = make()
    manager.start(60)
    (worker,) = [thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm"]
    manager.close()
    assert not worker.is_alive()
    with pytest.raises(ValueError, match="positive"):
        make().start(0)


def test_an_earlier_model_is_gone_on_with(make, tmp_path):
    first = make()
    for size in [5, 60] * 100:
        first.record_usage(size)
    first.demand.save(tmp_path / "demand.json")
    second = make(demand=DemandModel.load(tmp_path / "demand.json"))
    assert second.plan_buckets(3) == first.plan_buckets(3) == (5, 60, CAPACITY)


def test_a_forecast_names_a_size_once_and_hits_count_beyond_the_capacity_too(make):
    manager = make(max_batch_size=1, max_seq_len=100)
    for size in [100] * 200:
        manager.record_usage(size)
    assert manager.predict_next_sizes(1) == [100]
    for _ in range(5):
        manager.record_usage(100)
    assert (manager.prediction().hits, manager.prediction().misses) == (5, 0)
    sizes = manager.predict_next_sizes(50)
    assert len(sizes) == len(set(sizes))


def test_only_graphs_captured_ahead_count_as_warmed_in_vain_closed_ones_included(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    assert len(manager.prewarm()) == 3
    assert (manager.prediction().warmed, manager.prediction().warmed_unused) == (3, 3)
    manager.close_graphs()
    assert (manager.prediction().warmed, manager.prediction().warmed_unused) == (3, 3)


def test_a_model_serves_one_manager(make):
    model, other = DemandModel(64), DemandModel(64)
    pool = SimpleBufferPool()
    one, two = make(demand=model), make(demand=other)
    with pytest.raises(BusyError, match="close that one first"):
        make(pool=pool, demand=model)
    assert pool.stats().reserved_bytes == 0
    pool.close()
    with pytest.raises(BusyError, match="close that one first"):
        two.adopt(model)
    assert two.demand is other
    one.adopt(one.demand)  # its own already
    one.adopt(DemandModel(64))
    two.adopt(model)  # let go by the first
    two.close()
    third = make(demand=model)  # let go at the end
    third.record_usage(3)
    assert third.demand is model and len(model) == 1


def test_what_is_no_function_and_no_demand_is_refused(make):
    manager = make()
    with pytest.raises(TypeError, match="give a function"):
        manager.prewarm(5)
    assert manager.prediction().failures == 0
    with pytest.raises(TypeError, match="DemandModel"):
        make(demand={})


def test_a_closed_manager_prewarms_nothing(make):
    with SimpleBufferPool() as pool:
        manager = make(pool=pool, specs=lambda n: [BufferSpec(n)])
        for _ in range(40):
            manager.record_usage(3)
        manager.close()
        assert manager.prewarm() == () and pool.stats().reserved_bytes == 0


def test_prewarming_ends_when_the_graphs_are_captured_anew_meanwhile(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    other = Doubler()

    def old(step):
        manager.programs["main"].function = other  # as capture_buckets of another thread does
        return fn(step)

    assert len(manager.prewarm(old)) == 1
    assert manager.prediction().failures == 0


@pytest.mark.parametrize("ask", ["demand", "close", "stop"])
def test_a_capture_may_ask_while_the_thread_prewarms(make, ask):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    began = threading.Event()
    with manager.capture(8) as step:

        def prewarm():
            began.set()
            manager.prewarm()

        other = threading.Thread(target=prewarm, daemon=True)
        other.start()
        assert began.wait(60)
        other.join(60)
        assert not other.is_alive(), "it waits for the capture, and would hold what the capture may ask for"
        if ask == "close":
            with pytest.raises(CaptureError):
                manager.close()
        elif ask == "stop":
            manager.stop()
        else:
            assert len(manager.demand) == 120
        step.result = fn(step)
    run(manager, [3, 8])


def test_a_captured_function_may_ask_and_stop_its_own_thread(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    asked = threading.Event()

    def curious(step):
        manager.prediction()
        manager.stop()
        asked.set()
        return fn(step)

    manager.programs["main"].function = curious
    manager.start(1e-3)
    (worker,) = [thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm"]
    assert asked.wait(60)
    worker.join(60)
    assert not worker.is_alive() and manager.prediction().failures == 0


FORKED = """
import os, threading
from numbabuf import PredictiveBufferManager
from numbabuf.demand import DemandModel
holding, go = threading.Event(), threading.Event()
def clock():  # of the model, which is being taught
    holding.set()
    go.wait(60)
    return 0.0
manager = PredictiveBufferManager(max_batch_size=1, max_seq_len=16, demand=DemandModel(clock=clock))
manager.record_usage(3)
other = threading.Thread(target=manager.prediction)
other.start()
assert holding.wait(60)
child = os.fork()
go.set()
if child == 0:
    manager.prediction()  # the thread that learned does not go on here
    os._exit(7 if manager.closed else 1)
other.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_leaves_no_lock_taken():
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_a_call_in_the_middle_of_a_step_is_refused(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    refused = []

    class Asks:
        def __array__(self, dtype=None, copy=None):
            with pytest.raises(BusyError, match="nothing has changed"):
                manager.prewarm()
            manager.stop()  # without waiting
            refused.append(self)
            return np.arange(3)

    manager.replay({"input_ids": Asks()}, 3)
    assert len(refused) == 1


def test_one_thread_prewarms_at_a_time_and_the_others_do_not_wait(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    meanwhile = []

    def slow(step):
        if not meanwhile:
            other = threading.Thread(target=lambda: meanwhile.append(manager.prewarm()))
            other.start()
            other.join(60)
        return fn(step)

    assert len(manager.prewarm(slow)) == 3
    assert meanwhile == [()]


# ------------------------------------------------------------------------------------------------ programs of their own


def test_each_program_has_a_prewarmer_and_a_model_of_its_own(make):
    manager, fn, other = make(), Doubler(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    budgets = Budgets(max_size=64, max_graphs=3)
    with (
        manager.program(other, name="other") as program,
        Prewarmer(program, manager.pool, DemandModel(), budgets, specs=lambda n: [BufferSpec(n)]) as prewarmer,
    ):
        for size in [5, 5, 30] * 40:
            prewarmer.record_usage(size)
        assert sorted(prewarmer.prewarm()) == [5, 30, 64] == [graph.num_tokens for graph in program.captured]
        assert in_service(manager) == [CAPACITY] and set(fn.sizes) == {CAPACITY}
        for size in (4, 30):
            program.replay({"input_ids": np.arange(size)}, size)
        manager.replay({"input_ids": np.arange(100)}, 100)
        with pytest.raises(BucketOverflowError):
            program.replay({}, 65)
        manager.synchronize()
        assert len(prewarmer.demand) == 122 and [size for _, size in manager.demand.seen] == [100]
        found = prewarmer.prediction()
        assert (found.warmed, found.warmed_unused, found.unserved) == (3, 1, 1)
        assert found.padding == program.stats().padding and found.reserved_bytes > 0
        assert manager.prediction().unserved == 0
        with pytest.raises(BusyError, match="close that one first"):
            make(demand=prewarmer.demand)
        model = prewarmer.demand
    assert prewarmer.closed and prewarmer.prewarm() == () and make(demand=model).demand is model
    with pytest.raises(ClosedError, match="closed"):
        prewarmer.start()


def test_steps_and_refusals_of_other_programs_are_not_the_managers_demand(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    with manager.program(fn) as program:
        program.capture_buckets([8])
        program.replay({"input_ids": np.arange(5)}, 5)
        with pytest.raises(BucketOverflowError):
            program.replay({}, 9)
        manager.replay({"input_ids": np.arange(7)}, 7)
        manager.synchronize()
        assert [size for _, size in manager.demand.seen] == [7] and manager.prediction().unserved == 0


def test_a_graph_that_was_used_and_then_replaced_by_others_was_used(make):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    assert len(manager.prewarm()) == 3
    run(manager, [3, 40])
    manager.capture_buckets(Doubler(), [CAPACITY])  # another function: all graphs of the first are replaced
    manager.synchronize()
    score = manager.prediction()
    assert (score.warmed, score.warmed_unused, score.graph_bytes) == (3, 1, 0)


@pytest.mark.parametrize(
    "bad", [{"max_size": 0}, {"max_graphs": True}, {"prewarm_bytes": -1}, {"prewarm_seconds": float("nan")}], ids=str
)
def test_budgets_are_checked_when_they_are_made(bad):
    (name,) = bad
    with pytest.raises((TypeError, ValueError), match=f"^{name} is "):
        Budgets(**({"max_size": 8} | bad))


# --------------------------------------------------------------------------------------------------- the byte budget


@pytest.fixture
def graphs_take(monkeypatch):
    """Let the driver say that each capture takes so many bytes."""

    def graphs_take(nbytes):
        readings = itertools.count()  # one before each capture, one after it
        monkeypatch.setattr(_cuda, "memory_info", lambda: ((1 << 40) - nbytes * (next(readings) % 2), 1 << 40))

    return graphs_take


def test_a_graph_out_of_plan_makes_room_in_the_byte_budget(make, graphs_take):
    manager, fn = make(max_graphs=4, prewarm_bytes=200), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    graphs_take(100)
    run(manager, [3, 5, 40] * 40)
    assert len(manager.prewarm()) == 2 and len(in_service(manager)) == 3, "the budget is spent"
    old = set(in_service(manager)) - {CAPACITY}
    for size in [100, 120, 160] * 1000:
        manager.record_usage(size)
    for _ in range(4):
        manager.prewarm()
        assert manager.prediction().graph_bytes <= 200 and in_service(manager)[-1] == CAPACITY
    assert not old & set(in_service(manager)) and len(in_service(manager)) == 3
    assert set(in_service(manager)) < {100, 120, 160, CAPACITY}
    run(manager, [1, 3, 100, 120, 200, CAPACITY], seed=1)
    manager.check()


def test_what_is_not_yet_closed_still_counts_and_one_at_a_time_makes_room(make, graphs_take, monkeypatch):
    manager, fn = make(max_graphs=4, prewarm_bytes=200), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    graphs_take(100)
    run(manager, [3, 5, 40] * 40)
    manager.prewarm()
    for size in [100, 120, 160] * 1000:
        manager.record_usage(size)
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "reap", lambda graphs: None)  # the last replays are not done yet
        assert manager.prewarm() == () and len(in_service(manager)) == 2
        assert manager.prediction().graph_bytes == 200
        assert manager.prewarm() == () and len(in_service(manager)) == 2
    manager.synchronize()
    assert len(manager.prewarm()) >= 1 and manager.prediction().graph_bytes <= 200


@pytest.fixture
def plan(monkeypatch):
    """Make the sizes that are planned these, and the largest, from the next step on that is learned."""

    def plan(*sizes):
        monkeypatch.setattr(Refitter, "observe", lambda self, _: setattr(self, "sizes", np.array([*sizes, CAPACITY])))

    return plan


def test_the_least_missed_graph_makes_room_first(make, graphs_take, monkeypatch, plan):
    manager, fn = make(max_graphs=4, prewarm_bytes=200), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    graphs_take(100)
    plan(8, 20)
    manager.record_usage(20)
    assert set(manager.prewarm()) == {8, 20}
    run(manager, [20] * 40)  # used more than the other, but not lately
    manager.adopt(DemandModel(64, buckets=[8, 20, 50]))
    plan(50)
    for size in [8] * 30 + [50] * 3:
        manager.record_usage(size)
    program, dropped = manager.programs["main"], []
    drop = program.drop
    monkeypatch.setattr(program, "drop", lambda size: (dropped.append((size["tokens"], len(fn.sizes))), drop(size)))
    before = len(fn.sizes)
    captured = manager.prewarm()
    if not captured:  # the device had not said yet that the last replay of what made room is done
        manager.synchronize()
        captured = manager.prewarm()
    assert captured == (50,)
    assert dropped == [(20, before), (8, before + 2)], "one for room, one as all that is planned is there"


def test_a_planned_graph_gives_way_to_one_that_is_worth_more(make, graphs_take, plan):
    """The plan has room for four sizes, and the byte budget for two; the demand moves within the plan."""
    manager, fn = make(max_graphs=4, prewarm_bytes=100, window=64), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    graphs_take(100)
    plan(8, 50, 100)

    def demand(*shares):
        for size, count in zip((8, 50, 100), shares, strict=True):
            for _ in range(count):
                manager.record_usage(size)

    demand(60, 2, 2)
    assert manager.prewarm() == (8,)
    demand(0, 30, 31)
    manager.prewarm()
    manager.synchronize()
    manager.prewarm()
    assert in_service(manager) == [100, CAPACITY] and manager.prediction().graph_bytes == 100
    before = manager.prediction().closed
    demand(0, 31, 32)  # nearly as before: nothing changes any more
    for _ in range(3):
        assert manager.prewarm() == ()
    assert manager.prediction().closed == before and in_service(manager) == [100, CAPACITY]
    run(manager, [3, 70, 200])


def test_the_first_graph_keeps_to_the_budget_too_and_is_tried_once_a_plan(make, graphs_take):
    manager, fn = make(prewarm_bytes=99), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    graphs_take(100)
    run(manager, [3, 5, 40] * 40)
    assert manager.prewarm() == () and manager.prewarm() == ()
    score = manager.prediction()
    assert (score.failures, score.warmed, score.graph_bytes) == (1, 0, 0) and in_service(manager) == [CAPACITY]
    assert manager.programs["main"].leaving == (), "it is closed"
    run(manager, [3, 5, 40])
    for size in [100, 120] * 300:
        manager.record_usage(size)
    assert manager.prewarm() == () and manager.prediction().failures == 2, "another plan, another attempt"


def test_reserves_of_sizes_no_longer_forecast_give_way(make):
    with SimpleBufferPool() as pool:
        manager = make(pool=pool, max_graphs=2, prewarm_bytes=8 * 300, specs=lambda n: [BufferSpec(n, "float64")])
        others = pool.stats().reserved_bytes
        for size in (8, 60, 120, 200):
            for _ in range(1500):
                manager.record_usage(size)
            manager.prewarm()
            assert 0 < manager.prediction().reserved_bytes <= 8 * 300
            assert pool.stats().reserved_bytes - others <= 8 * 300 * 9 // 8, "size classes may round up by an eighth"
        assert manager.prediction().failures == 0
        manager.close()


@pytest.mark.parametrize("bad", [lambda n: 1 / 0, lambda n: [5], lambda n: 5])
def test_a_bad_list_of_buffers_is_a_counted_failure(make, bad):
    manager, fn = make(specs=bad), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    assert manager.prewarm()
    assert manager.prediction().failures == 1


# ------------------------------------------------------------------------------------------------- counts and axes


def test_graphs_of_other_axes_count_and_stay(make):
    manager, fn = make(max_graphs=3), Doubler()
    manager.register_slot("lengths", BufferSpec(8, "int64"), axis="seqs")
    manager.capture_buckets(fn, [{"tokens": 64, "seqs": 2}, {"tokens": 64, "seqs": 4}])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    assert manager.prewarm() == (CAPACITY,), "the largest must be there"
    assert [tuple(graph.sizes.values()) for graph in manager.captured] == [(64, 2), (64, 4), (CAPACITY, 8)]
    assert manager.prewarm() == ()


def test_no_size_that_was_served_is_left_without_a_graph(make):
    manager, fn = make(max_size=64), Doubler()
    manager.capture_buckets(fn, [16, 32, 200])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    manager.prewarm()
    assert in_service(manager)[-2:] == [64, 200] and not {16, 32} & set(in_service(manager))
    run(manager, [150, 200])


@pytest.mark.parametrize("bad", [{"specs": 5}, {"cost": 5}, {"clock": 5}, {"max_graphs": 2.0}, {"max_size": "8"}])
def test_what_can_be_no_option_is_refused(make, bad):
    (name,) = bad
    with pytest.raises(TypeError, match=f"^{name} is "):
        make(**bad)


# -------------------------------------------------------------------------------------------------------- threads


def test_a_captured_function_may_ask_and_stop_a_thread_that_waits_for_it(make):
    """The thread waits for the lock that `capture_buckets` holds, and holds nothing that the function asks for."""
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    run(manager, [3, 5, 40] * 40)
    workers, planning = [], threading.Event()
    clock = type(manager.prewarmer.demand).histogram

    def stopping(step):
        if not workers:
            manager.start(1e-3)
            assert planning.wait(60)  # from here the thread goes on to ask which graphs there are, and waits
            manager.prediction()
            workers.extend(thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm")
            manager.stop()
        return fn(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemandModel, "histogram", lambda model: (planning.set(), clock(model))[1])
        capturing = threading.Thread(target=manager.capture_buckets, args=(stopping, [8, CAPACITY]), daemon=True)
        capturing.start()
        capturing.join(60)
    assert not capturing.is_alive() and len(workers) == 1
    manager.stop()
    assert not workers[0].is_alive(), "who stops it from outside waits for its end"
    run(manager, [3, 8])


def prewarmers():
    return [thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm"]


def test_a_thread_that_was_stopped_without_waiting_can_be_started_again(make):
    manager, fn = make(), Doubler()
    workers = []

    def restarting(step):
        manager.start(3600)
        workers.extend(thread for thread in prewarmers() if thread not in workers)
        manager.stop()
        return fn(step)

    manager.capture_buckets(restarting, [CAPACITY])
    manager.start(3600)
    (going,) = [thread for thread in prewarmers() if thread not in workers]
    manager.stop()
    for worker in (going, *workers):
        worker.join(60)
        assert not worker.is_alive()


def test_a_clock_may_stop_the_thread_that_waits_for_its_own_to_learn(make, monkeypatch):
    """The thread waits for the turn to learn, which this one has while the model's clock runs."""
    stopped, prewarming = [], threading.Event()
    device = Program.device.fget

    def clock():
        if not stopped:
            stopped.append(None)
            manager.start(1e-6)
            assert prewarming.wait(60)  # next, the thread asks for what was learned
            stopped[:] = prewarmers()
            manager.stop()
        return 0.0

    manager = make(demand=DemandModel(clock=clock))
    manager.capture_buckets(Doubler())
    monkeypatch.setattr(Program, "device", property(lambda self: (prewarming.set(), device(self))[1]))
    manager.record_usage(3)
    assert len(manager.demand) == 1
    manager.stop()
    assert len(stopped) == 1 and not stopped[0].is_alive()


def test_a_snapshot_taken_while_a_graph_is_made_does_not_lose_it(make, monkeypatch):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn, [CAPACITY])
    for size in [3, 5, 40] * 40:
        manager.record_usage(size)
    program = manager.programs["main"]
    whole = type(program).leaving

    def leaving(self):  # read after which graphs there are, and before what was made is settled
        if not prewarming:
            prewarming.append(threading.Thread(target=lambda: prewarmed.extend(manager.prewarm())))
            prewarming[0].start()
            prewarming[0].join(60)
        return whole.fget(self)

    prewarming, prewarmed = [], []
    monkeypatch.setattr(type(program), "leaving", property(leaving))
    manager.prediction()
    assert len(prewarmed) == 3
    assert manager.prediction().warmed_unused == 3
    run(manager, [3, 5, 40])
    assert manager.prediction().warmed_unused == 0


def test_steps_that_are_never_learned_take_no_more_memory_as_they_go_on():
    usage = Usage("main", 64, keep=8)
    for _ in range(200):
        usage.note(3)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(20_000):
        usage.note(5)
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    assert usage.take_older().total() + len(list(usage.take_recent())) == 20_200


def test_steps_that_come_while_it_learns_do_not_keep_it_learning(make, monkeypatch):
    manager = make()
    observe, calls = DemandModel.observe, itertools.count()

    def busy(model, size):
        assert next(calls) < 20, "it would never end"
        manager.record_usage(size)
        observe(model, size)

    monkeypatch.setattr(DemandModel, "observe", busy)
    for _ in range(10):
        manager.record_usage(5)
    assert manager.plan_buckets(2) == (5, CAPACITY)
    monkeypatch.undo()


LEFT_RUNNING = """
import atexit, threading
atexit.register(lambda: print(*(thread.name for thread in threading.enumerate())))  # the last to be called
import numpy as np
from numbabuf import PredictiveBufferManager
manager = PredictiveBufferManager(max_batch_size=1, max_seq_len=256, max_graphs=4)
manager.capture_buckets(lambda step: None)
manager.start(1e-4)
for size in list(range(3, 200)) * 4:
    manager.replay({"input_ids": np.zeros(size, np.int64)}, size)
manager.synchronize()
"""


def test_a_program_may_end_while_the_thread_runs():
    done = subprocess.run([sys.executable, "-c", LEFT_RUNNING], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "MainThread\n", "")


@pytest.mark.parametrize("sizes", [[40], [3, 40], [CAPACITY], [3, CAPACITY, 40]], ids=str)
def test_a_demand_that_stays_the_same_is_captured_once(make, sizes):
    manager, fn = make(), Doubler()
    manager.capture_buckets(fn)
    for _ in range(1200):
        for size in sizes:
            manager.record_usage(size)
    manager.prewarm()
    warmed = manager.prediction().warmed
    for _ in range(20):
        for size in sizes * 100:
            manager.record_usage(size)
        assert manager.prewarm() == ()
    assert manager.prediction().warmed == warmed <= 4
