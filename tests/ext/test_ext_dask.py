"""A fleet on a Dask cluster of two processes of this machine, a worker killed in mid-run included.

The cluster talks over 127.0.0.1 alone. What a worker holds is tested first, without Dask.
"""

import asyncio
import json
import logging
import os
import pickle
import sys
import threading
import types

import kit
import numpy as np
import pytest
from kit import LAUNCH, log_row, to_device, to_host

from numbabuf import _cuda
from numbabuf.demand.model import DemandModel
from numbabuf.errors import BucketOverflowError, BusyError, ClosedError
from numbabuf.ext import _worker
from numbabuf.ext import dask as ext
from numbabuf.ext.dask import Fleet, worker_manager
from numbabuf.pool.pool import SimpleBufferPool
from numbabuf.pool.spec import BufferSpec, Tier
from numbabuf.predict.manager import PredictiveBufferManager
from numbabuf.step.manager import InputBufferManager
from numbabuf.testing import live_buffers

CAPACITY = 64


def make(pool):
    """A worker's manager: its step copies the tokens to where `serve` reads them; a thread of it runs as well."""
    manager = PredictiveBufferManager(
        pool, max_batch_size=1, max_seq_len=CAPACITY, max_graphs=3, demand=DemandModel(window=256)
    )
    log, row = to_device(np.zeros((1, CAPACITY), np.int64)), to_device(np.zeros(1, np.int64))

    def step(s):
        log_row[(*LAUNCH, s.stream)](s["input_ids"], log, row)
        return log

    manager.capture_buckets(step, [CAPACITY])
    manager.start(3600)
    return manager


def packed(model):
    """A model as it is sent."""
    return _worker.pack(model.settings, model.seen)


def replay(manager, size):
    """One step of `size` ones; the sum that the device made of it."""
    result = manager.replay({"input_ids": np.ones(size, np.int64)}, size)
    manager.synchronize()
    return int(to_host(result, manager.stream)[0, :size].sum())


# --------------------------------------------------------------------------------------------------- without a cluster


@pytest.fixture
def held():
    held = _worker.Held(make, SimpleBufferPool)
    yield held
    held.close()


def test_own_steps_are_kept_apart(held):
    for size in (3, 5, 3):
        replay(held.manager, size)
    held.adopt(packed(_model([40] * 10)))
    replay(held.manager, 7)
    assert [size for _, size in DemandModel(**held.own_demand()).seen] == [3, 5, 3, 7]
    assert sorted(size for _, size in held.manager.demand.seen) == [7] + [40] * 10


def test_steps_of_further_programs_are_not_shared(held):
    with held.manager.program(lambda step: None) as program:
        program.capture_buckets([8])
        program.replay({"input_ids": np.arange(5)}, 5)
        replay(held.manager, 3)
    assert [size for _, size in DemandModel(**held.own_demand()).seen] == [3]


def test_a_refused_step_is_shared_and_survives_the_exchange():
    def small(pool):
        manager = PredictiveBufferManager(pool, 1, CAPACITY, max_graphs=3, demand=DemandModel(window=256))
        manager.capture_buckets(lambda step: None, [4])
        return manager

    held = _worker.Held(small, SimpleBufferPool)
    for _ in range(40):
        with pytest.raises(BucketOverflowError):
            held.manager.replay({"input_ids": np.ones(9, np.int64)}, 9)
    own = held.own_demand()
    assert [size for _, size in DemandModel(**own).seen] == [9] * 40
    assert 9 in held.adopt(own)
    held.manager.replay({"input_ids": np.ones(9, np.int64)}, 9)
    held.close()


def test_a_step_of_no_tokens_is_no_demand(held):
    held.manager.stage_inputs({}, 0)
    assert len(DemandModel(**held.own_demand())) == 0


def test_adopting_prewarms(held):
    assert 40 in held.adopt(packed(_model([40] * 200)))
    assert held.manager.stats().graphs == 3
    assert replay(held.manager, 40) == 40
    assert held.manager.stats().buckets[40] == 1


def test_a_manager_that_predicts_nothing_is_counted():
    held = _worker.Held(lambda pool: InputBufferManager(pool, 1, CAPACITY), SimpleBufferPool)
    held.manager.stage_inputs({"input_ids": np.arange(9)}, 9)
    assert [size for _, size in DemandModel(**held.own_demand()).seen] == [9]
    assert held.adopt(packed(_model([40]))) == ()
    assert held.stats().prediction is None
    held.close()


def test_an_observer_from_before_goes_on_observing():
    seen = []

    def observed(pool):
        manager = InputBufferManager(pool, 1, CAPACITY)
        manager.observer = lambda size, program: seen.append(size)
        return manager

    held = _worker.Held(observed, SimpleBufferPool)
    held.manager.stage_inputs({"input_ids": np.arange(9)}, 9)
    held.close()
    assert seen == [9]


def test_the_end_leaves_nothing(no_leaks):
    before = live_buffers()
    held = _worker.Held(make, SimpleBufferPool)
    assert live_buffers() == before + 2
    held.close()
    assert live_buffers() == before
    assert held.pool.closed
    with pytest.raises(ClosedError):
        replay(held.manager, 3)


def test_what_is_leased_at_the_end_is_told(caplog):
    held = _worker.Held(make, SimpleBufferPool)
    entry = held.pool.allocate(BufferSpec(4, "float32", Tier.PINNED))
    held.close()
    assert "1 buffer(s) of a worker's pool are still leased at its end" in caplog.text
    entry.release()


@pytest.mark.parametrize("answer", [3, ZeroDivisionError])
def test_a_bad_make_leaves_nothing(answer):
    pools = []

    def pool():
        pools.append(SimpleBufferPool())
        return pools[-1]

    def make_badly(pool):
        if answer == 3:
            return 3
        raise answer

    with pytest.raises((TypeError, ZeroDivisionError)):
        _worker.Held(make_badly, pool)
    assert pools[0].closed


def test_a_set_up_that_fails_at_the_demand_leaves_nothing(monkeypatch, no_leaks):
    class Scheduler:
        async def get_metadata(self, keys, default):
            return {"window": 256, "damaged": True}

    monkeypatch.setitem(sys.modules, "distributed", types.SimpleNamespace(WorkerPlugin=object))
    _worker.plugin_class.cache_clear()
    before = live_buffers()
    try:
        plugin = _worker.plugin(make, SimpleBufferPool, "numbabuf")
        with pytest.raises(TypeError, match="damaged"):
            asyncio.run(plugin.setup(types.SimpleNamespace(scheduler=Scheduler())))
    finally:
        _worker.plugin_class.cache_clear()
    assert plugin.held is None and live_buffers() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "numbabuf-prewarm"]


def test_statistics_travel(held):
    replay(held.manager, 3)
    stats = held.stats()
    assert pickle.loads(pickle.dumps(stats)) == stats


def test_a_model_travels_whole():
    model = _model([3, 1000, 40])
    fixed = DemandModel(window=4, buckets=[8, 16], warm_steps=3)
    fixed.observe(9)
    for one in (model, fixed):
        again = DemandModel(**json.loads(json.dumps(packed(one))))
        assert (again.settings, again.seen, again.forecast(3)) == (one.settings, one.seen, one.forecast(3))


def _model(sizes):
    model = DemandModel(window=256, clock=iter(range(len(sizes))).__next__)
    for size in sizes:
        model.observe(size)
    return model


@pytest.fixture
def inside(held, monkeypatch):
    """This process as a worker that holds a manager."""
    held.worker = types.SimpleNamespace(
        plugins={"numbabuf": types.SimpleNamespace(held=held)}, state=types.SimpleNamespace(nthreads=1)
    )
    monkeypatch.setitem(sys.modules, "distributed", types.SimpleNamespace(get_worker=lambda: held.worker))
    return held


def test_a_block_holds_the_manager_and_does_not_close_it(inside):
    with worker_manager() as manager:
        assert manager is inside.manager
        assert replay(manager, 3) == 3
    assert not inside.manager.closed
    with pytest.raises(ZeroDivisionError), worker_manager():
        raise ZeroDivisionError
    with worker_manager() as manager:
        assert replay(manager, 5) == 5


def test_a_block_within_a_block_of_one_thread_is_refused(inside):
    with worker_manager() as manager:
        with pytest.raises(BusyError, match="the outer block"), worker_manager():
            pass
        assert replay(manager, 3) == 3


def test_without_a_block_it_stands_for_the_manager(inside):
    assert replay(worker_manager(), 7) == 7
    assert worker_manager().stats() == inside.manager.stats()
    with pytest.raises(AttributeError):
        worker_manager().observer = None


def test_in_a_worker_of_more_threads_a_step_wants_the_block(inside):
    inside.worker.state.nthreads = 4
    for step in ("replay", "stage", "stage_inputs"):
        with pytest.raises(BusyError, match="with worker_manager\\(\\) as manager"):
            getattr(worker_manager(), step)
    assert worker_manager().stats().steps == inside.manager.stats().steps
    worker_manager().record_usage(3)
    with worker_manager():
        assert replay(worker_manager(), 7) == 7


def test_four_threads_read_their_own_results(inside):
    wrong, begin = [], threading.Barrier(4)

    def tasks(first):
        begin.wait()
        for size in range(first, CAPACITY, 4):
            if serve(size) != size:
                wrong.append(size)

    threads = [threading.Thread(target=tasks, args=(first,)) for first in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_task_waits_for_the_reading_of_another(inside):
    """A steps; B would step, and waits; A reads what is its own."""
    mine, theirs = threading.Event(), threading.Event()

    def other():
        mine.wait()
        with worker_manager() as manager:
            replay(manager, 9)
            theirs.set()

    thread = threading.Thread(target=other)
    thread.start()
    with worker_manager() as manager:
        result = manager.replay({"input_ids": np.full(5, 7)}, 5)
        mine.set()
        assert not theirs.wait(0.2)
        manager.synchronize()
        assert to_host(result, manager.stream)[0, :5].tolist() == [7] * 5
    thread.join()
    assert theirs.is_set()


def test_the_end_waits_for_the_task_inside(inside):
    with worker_manager():
        closing = threading.Thread(target=inside.close)
        closing.start()
        assert not inside.manager.closed and not inside.pool.closed
    closing.join()
    assert inside.manager.closed and inside.pool.closed


class Client:
    """What `Fleet` asks of a client, with the answers given."""

    def __init__(self, answers):
        self.answers, self.metadata, self.unregistered = answers, {}, 0

    def register_plugin(self, plugin, name):
        self.plugin = plugin

    def unregister_worker_plugin(self, name):
        self.unregistered += 1

    def run(self, call, name, method, arguments, on_error):
        assert on_error == "return"
        return self.answers[method]

    def scheduler_info(self, n_workers):
        return {"workers": dict.fromkeys(self.answers["own_demand"])}

    def set_metadata(self, keys, value):
        self.metadata[tuple(keys)] = value


@pytest.fixture
def answering():
    return Client({})


@pytest.fixture
def fleet(answering, monkeypatch):
    monkeypatch.setattr(ext, "plugin", lambda *arguments: arguments)
    return Fleet(answering, make)


def test_a_worker_that_leaves_is_left_out_and_logged(fleet, answering, caplog):
    answering.answers = {"stats": {"a": ("figures",), "b": OSError("connection broke"), "c": None}}
    assert fleet.stats() == {"a": "figures"}
    assert "worker b left" in caplog.text


def test_another_error_of_a_worker_is_raised(fleet, answering):
    answering.answers = {"stats": {"a": ("figures",), "b": ZeroDivisionError("mine")}}
    with pytest.raises(ZeroDivisionError, match="mine"):
        fleet.stats()


def test_steps_count_once_and_those_of_the_dead_stay(fleet, answering):
    one, two = packed(_model([3, 3])), packed(_model([40]))
    answers = {"own_demand": {"a": (one,), "b": (two,)}, "adopt": {"a": ((3,),), "b": ((),)}}
    answering.answers = answers
    for _ in range(2):
        shared = fleet.share_demand()
        assert sorted(size for _, size in shared.demand.seen) == [3, 3, 40]
    assert shared.captured == {"a": (3,), "b": ()}
    answers["own_demand"] = {"a": (one,), "new": (packed(_model([])),)}
    shared = fleet.share_demand()
    assert sorted(size for _, size in shared.demand.seen) == [3, 3, 40]
    assert answering.metadata == {("numbabuf-demand", "numbabuf"): packed(shared.demand)}
    assert "new" in kit.html(fleet) and "steps known" in kit.html(fleet)


def test_a_dead_worker_is_forgotten_once_its_steps_are_old(fleet, answering):
    late = DemandModel(window=256, clock=iter(range(1000, 2000)).__next__)
    for _ in range(256):
        late.observe(7)
    answers = {"own_demand": {"a": (packed(_model([3])),)}, "adopt": {}}
    answering.answers = answers
    fleet.share_demand()
    answers["own_demand"] = {"b": (packed(late),)}
    fleet.share_demand()
    shown = kit.html(fleet)
    assert ">b<" in shown and ">a<" not in shown


def test_nobody_there(fleet, answering):
    answering.answers = {"own_demand": {}}
    with pytest.raises(RuntimeError, match="no worker answered"):
        fleet.share_demand()


def test_the_end_of_a_fleet(fleet, answering):
    fleet.close()
    fleet.close()
    assert answering.unregistered == 1
    with pytest.raises(RuntimeError, match="closed"):
        fleet.stats()


# ------------------------------------------------------------------------------------------------------ on a cluster

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed", "ignore::DeprecationWarning:dask")


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # of the scheduler's health page, which there is without a dashboard too
        worker_dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with cluster.get_client() as client:
        client.wait_for_workers(2, timeout=30)
        yield client


def addresses(client):
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


def serve(size):
    """A task: one step on this worker's manager, and the reading of its result."""
    with worker_manager() as manager:
        return replay(manager, size)


def serve_unheld(size):
    return replay(worker_manager(), size)


def serve_many(sizes):
    return [serve(size) for size in sizes]


def die_once(marker, size):
    """A task whose first run kills its worker in the middle of a step; the second is like any other."""
    worker_manager().replay({"input_ids": np.ones(size, np.int64)}, size)
    if not os.path.exists(marker):
        with open(marker, "w") as file:
            file.write(str(os.getpid()))
        os._exit(1)
    return serve(size)


def remains():
    """What a closed fleet could leave behind in a worker."""
    return live_buffers(), [thread.name for thread in threading.enumerate() if thread.name.startswith("numbabuf")]


def test_each_worker_has_its_own_and_none_is_left(client):
    one, two = addresses(client)
    with Fleet(client, make) as fleet:
        for worker, size in ((one, 5), (two, 9), (two, 3)):
            assert client.submit(serve, size, workers=[worker], pure=False).result(timeout=30) == size
        stats = fleet.stats()
        assert {worker: figures.manager.live_tokens for worker, figures in stats.items()} == {one: 5, two: 12}
        assert all(figures.pool.in_use_count == 2 for figures in stats.values())
        assert {figures.device for figures in stats.values()} == {_cuda.device_name()}
        assert all(figures.prediction is not None for figures in stats.values())
        assert all(left == (2, ["numbabuf-prewarm"]) for left in client.run(remains).values())
    assert all(left == (0, []) for left in client.run(remains).values())
    with pytest.raises(LookupError, match="holds no manager"):
        client.submit(serve, 1, pure=False).result(timeout=30)


def test_every_worker_prewarms_what_the_fleet_needs(client):
    one, two = addresses(client)
    with Fleet(client, make) as fleet:
        tasks = [
            client.submit(serve_many, [size] * 100, workers=[worker], pure=False)
            for worker, size in ((one, 5), (two, 40))
        ]
        client.gather(tasks)
        shared = fleet.share_demand()
        sizes, counts = shared.demand.histogram()
        assert (sizes.tolist(), counts.tolist()) == ([5, 40], [100, 100])
        assert {worker: set(captured) for worker, captured in shared.captured.items()} == {one: {5, 40}, two: {5, 40}}
        assert fleet.share_demand().captured == {one: (), two: ()}, "nothing new was asked for"
        assert client.submit(serve, 40, workers=[one], pure=False).result(timeout=30) == 40
        assert fleet.stats()[one].manager.buckets[40] == 1


def test_a_worker_is_killed_in_mid_run(client, tmp_path):
    before = addresses(client)
    with Fleet(client, make) as fleet:
        client.gather([client.submit(serve_many, [7] * 100, workers=[worker], pure=False) for worker in before])
        fleet.share_demand()
        marker = tmp_path / "killed"
        tasks = [client.submit(die_once, str(marker), 11, pure=False, retries=3)]
        tasks += [client.submit(serve, size, pure=False) for size in range(1, 30)]
        assert client.gather(tasks) == [11, *range(1, 30)]
        client.wait_for_workers(2, timeout=30)
        (new,) = set(addresses(client)) - set(before)
        (dead,) = set(before) - set(addresses(client))
        assert client.submit(serve, 7, workers=[new], pure=False).result(timeout=30) == 7
        stats = fleet.stats()
        assert set(stats) == set(addresses(client))
        assert stats[new].manager.buckets[7] >= 1, "prewarmed before its first step, from the others' demand"
        shared = fleet.share_demand()
        assert len(shared.demand) > 200, "the dead worker's steps before the exchange count on"
        assert dead not in shared.captured
    assert all(left == (0, []) for left in client.run(remains).values())


def test_more_threads_than_one_a_worker():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=4,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        cluster.get_client() as client,
        Fleet(client, make),
    ):
        sizes = list(range(1, CAPACITY)) * 2
        assert client.gather(client.map(serve, sizes, pure=False)) == sizes
        with pytest.raises(BusyError, match="in a worker of 4 threads"):
            client.submit(serve_unheld, 3, pure=False).result(timeout=30)


def fail(pool):
    raise ZeroDivisionError("make went wrong")


def test_what_make_raises_reaches_the_client(client):
    with pytest.raises(ZeroDivisionError, match="make went wrong"):
        Fleet(client, fail, name="bad")
    client.unregister_worker_plugin("bad")
    assert all(left == (0, []) for left in client.run(remains).values())
