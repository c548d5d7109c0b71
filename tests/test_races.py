"""The staging ring under the stand-in driver's lazy mode, where queued work runs only when something waits for it.

A host that writes a block before its fill has read it shows as wrong data in a log that the captured graph itself
writes, one row per step, compared in full. Seeds give each run another, repeatable order of work.
"""

import threading

import kit
import numpy as np
import pytest

from numbabuf import InputBufferManager

pytestmark = pytest.mark.stub


@pytest.fixture(params=[1, 2, 3])
def lazy(request, stub):
    """The stand-in driver in its lazy mode, with a seed."""
    stub.set_async(1)
    stub.set_seed(request.param)
    yield request.param
    stub.set_seed(0)
    stub.set_async(kit.lazy_by_environment())


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_every_step_sees_its_own_inputs(lazy, ring, stub):
    steps = 300 if ring == 3 else 2000
    log = kit.Log(steps, ring=ring)
    random = np.random.default_rng(lazy)
    for _ in range(steps):
        log.step(random)
    assert log.wrong() == []
    stats = log.manager.stats()
    assert stats.steps == steps
    assert stats.ring_waits > 0, "nothing was ever queued: the run was not lazy, and shows nothing"
    log.manager.check()
    log.manager.close()


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
    log = kit.Log(200, ring=4)
    random = np.random.default_rng(lazy)
    still_queued = 0
    for _ in range(200):
        log.step(random)
        still_queued += log.manager._ring.pending > 1
    assert still_queued > 50
    assert log.wrong() == []
    log.manager.close()


def test_fills_and_replays_and_leases_share_the_ring(lazy):
    log = kit.Log(200, ring=2)
    random = np.random.default_rng(lazy)
    for turn in range(150):
        if turn % 3 == 0:
            log.manager.stage_inputs({"ids": random.integers(0, 9, 5)}, 5)
        elif turn % 7 == 1:
            tokens = int(random.integers(0, 17))
            with log.manager.stage(tokens) as lease:
                for slot in log.logs:
                    lease[slot][:] = turn
                lease.replay()
            bucket = 4 if tokens <= 4 else 16 if tokens <= 16 else 32
            row = np.concatenate([np.full(tokens, turn), np.full(bucket - tokens, -1), np.full(kit.WIDTH - bucket, -7)])
            for slot in log.logs:
                log.wanted[slot].append(row)
        elif turn % 11 == 2:
            log.manager.get_slot("other").set_data(np.arange(3))
        else:
            log.step(random)
    assert log.wrong() == []
    log.manager.check()
    log.manager.close()


def test_threads_in_lazy_mode(lazy):
    """Four threads, one manager: steps are whole, in some order."""
    threads, steps = 4, 40
    log = kit.Log(threads * steps, ring=3)
    barrier, failures = threading.Barrier(threads), []

    def work(number):
        random = np.random.default_rng(number)
        try:
            barrier.wait()
            for step in range(steps):
                tokens = int(random.integers(1, kit.WIDTH + 1))
                value = number * 1000 + step
                inputs = {slot: np.full(tokens, value) for slot in log.logs}
                log.manager.replay(inputs, tokens)
                for data in inputs.values():
                    data[:] = -99
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures
    found = [kit.to_host(array, log.manager.stream)[log.first :][: threads * steps] for array in log.logs.values()]
    assert (found[0] == found[1]).all(), "a step is a mixture of two"
    seen = set()
    for row in found[0]:
        live = row[row >= 0]
        assert (live == live[0]).all() and (row[live.size :] < 0).all()
        seen.add(int(live[0]))
    assert len(seen) == threads * steps
    log.manager.check()
    log.manager.close()


def test_recapture_while_the_old_graph_is_queued(lazy):
    log = kit.Log(60, ring=4)
    random = np.random.default_rng(lazy)
    for _ in range(3):
        for _ in range(10):
            log.step(random)
        log.manager.capture_buckets(log)
        extra = int(kit.to_host(log.row, log.manager.stream)[0]) - log.first - len(log.wanted["ids"])
        assert extra == len(kit.BUCKETS)
        for slot in log.logs:  # the warm runs write rows too: all padding
            log.wanted[slot] += [
                np.concatenate([np.full(b, -1), np.full(kit.WIDTH - b, -7)]) for b in sorted(kit.BUCKETS)[::-1]
            ]
    assert log.wrong() == []
    log.manager.close()


def test_a_captured_graph_reads_what_its_operands_hold(lazy):
    """A graph's operand dropped by the caller is not handed to the next allocation (see test_manager for the rest)."""
    with InputBufferManager(max_batch_size=1, max_seq_len=8, buckets=[8]) as manager:
        weights = kit.to_device(np.array([3, 10]))
        out = kit.to_device(np.zeros(8, np.int64))
        manager.capture_buckets(lambda step, w=weights: kit.run(kit.affine, step.stream, step["input_ids"], w, out))
        manager._function = None
        del weights
        kit.collect()
        noise = [kit.to_device(np.full(2, 99)) for _ in range(20)]
        manager.replay({"input_ids": np.arange(8)}, 8)
        assert kit.to_host(out, manager.stream).tolist() == [10, 13, 16, 19, 22, 25, 28, 31]
        del noise
